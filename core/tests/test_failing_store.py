"""A journal that stops answering: the program is not taken for one that never ran, and money is moved once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sandstorm import AsyncSandstorm, Constraints, OutcomeUnknown, PluginError, SandboxSpec, Task
from sandstorm._engine import open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import Settings
from sandstorm._sqlite import SqliteStore
from sandstorm.policy import AttemptRow, LedgerRow, RunRow
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for


class Silent(SqliteStore):
    """A journal whose answer to one step is lost. `written` says whether what it was told is written all the same."""

    def __init__(self, path: Path, step: str, *, written: bool) -> None:
        super().__init__(f"sqlite:///{path}", inline=True)
        self._step = step
        self._written = written

    async def finish(self, run: RunRow, attempt: AttemptRow | None, booked: Sequence[LedgerRow]) -> bool:
        """The end of a run, once without an answer."""
        return await self._lost("finish", super().finish(run, attempt, booked))

    async def update(self, attempt: AttemptRow, booked: Sequence[LedgerRow] = (), *, durable: bool) -> bool:
        """The progress of an attempt, once without an answer where it is released."""
        step = "release" if attempt.state == "released" else "update"
        return await self._lost(step, super().update(attempt, booked, durable=durable))

    async def _lost(self, step: str, writing: Any) -> bool:
        if step != self._step:
            return bool(await writing)
        self._step = ""
        if self._written:
            await writing
        else:
            writing.close()
        raise PluginError("sqlite", step, "the journal does not answer")


def client(store: SqliteStore, provider: Any) -> AsyncSandstorm:
    """A client over one provider."""
    return AsyncSandstorm(settings={}, plugins=[("testing", plugin_for(provider))], store=store)


async def booked(store: SqliteStore, run: str) -> dict[str, Decimal]:
    """What the ledger says of a run, by the kind of movement."""
    found = await store.run(run)
    assert found is not None
    total: dict[str, Decimal] = {}
    for row in found[2]:
        total[row.kind] = total.get(row.kind, Decimal(0)) + row.amount
    return total


@pytest.mark.parametrize("written", [True, False])
async def test_a_release_without_an_answer_does_not_fail_the_run(
    autojump_clock: MockClock, tmp_path: Path, *, written: bool
) -> None:
    """The result is durable before it: it is returned, and the reservation goes and the cost comes exactly once."""
    store, cloud = Silent(tmp_path / "journal.db", "release", written=written), ReferenceProvider("cloud")
    plugins = Plugins.load(Settings(), extra=[("testing", plugin_for(cloud))])
    start = time.time()
    async with open_engine(Settings(), plugins, store=store, wall=lambda: start + trio.current_time()) as engine:
        task = Task(argv=("sleep", "2"))
        result = await engine.run(engine.request(task, SandboxSpec(), Constraints()))
        assert result.exit.ok
        await trio.sleep(120)
        assert await store.open_attempts() == []
        moved = await booked(store, result.id)
    assert moved["reserve"] == moved["release"]
    owed = cloud.vendor.owed()
    assert owed is not None
    # Where it was not written, it is booked when it is looked for: a second later, and so for a second more.
    assert moved["settle"] == owed if written else owed <= moved["settle"] <= 2 * owed
    assert cloud.vendor.live() == ()


@pytest.mark.parametrize("written", [True, False])
async def test_a_program_whose_end_could_not_be_written_keeps_its_key(
    autojump_clock: MockClock, tmp_path: Path, *, written: bool
) -> None:
    """The caller is told of the journal, and asking again with the key starts nothing a second time."""
    store, cloud = Silent(tmp_path / "journal.db", "finish", written=written), ReferenceProvider("cloud")
    async with client(store, cloud) as sandstorm:
        with pytest.raises(PluginError, match="does not answer"):
            await sandstorm.run(argv=["out", "once"], key="k")
        with pytest.raises(OutcomeUnknown):
            await sandstorm.run(argv=["out", "once"], key="k")
    assert [call.step for call in cloud.vendor.log].count("start") == 1
    assert cloud.vendor.live() == ()


async def test_what_a_slow_destroy_costs_is_booked(autojump_clock: MockClock, tmp_path: Path) -> None:
    """The vendor bills until the destroy has taken effect, and so does the ledger."""
    cloud = ReferenceProvider("cloud")
    slow = ChaosProvider(cloud, [Fault(step="destroy", kind="delay", seconds=17.0)])
    store = SqliteStore(f"sqlite:///{tmp_path}/journal.db", inline=True)
    async with client(store, slow) as sandstorm:
        result = await sandstorm.run(argv=["out", "hello"])
        moved = await booked(store, result.id)
    assert moved["settle"] == cloud.vendor.owed() == result.cost
    assert moved["settle"] > 0
