"""Idempotency keys: one run is started, however many ask, from however many routers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from sandstorm import Conflict, Constraints, OutcomeUnknown, RunFailed, RunResult, SandboxSpec, Task
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import settings_of
from sandstorm._sqlite import SqliteStore
from sandstorm._store import KeyRow, KeyTaken
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

START = time.time()
HELLO = Task(argv=("out", "hello"))


@asynccontextmanager
async def router(path: Path, *providers: Any) -> AsyncIterator[Engine]:
    """An engine over these providers, whose wall clock goes with trio's."""
    settings = settings_of({"strategy": "ordered"})
    plugins = Plugins.load(settings, extra=[(provider.name, plugin_for(provider)) for provider in providers])
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with open_engine(settings, plugins, store=store, wall=lambda: START + trio.current_time()) as engine:
        yield engine


async def run(engine: Engine, task: Task = HELLO, key: str | None = "once", tenant: str = "default") -> RunResult:
    """One run with a key."""
    return await engine.run(engine.request(task, SandboxSpec(), Constraints(), tenant=tenant, key=key))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal's file."""
    return tmp_path / "journal.db"


def starts(provider: ReferenceProvider) -> int:
    """How many programs were started there."""
    return [call.step for call in provider.vendor.log].count("start")


async def test_a_repeat_gives_the_first_result(autojump_clock: MockClock, journal: Path) -> None:
    """From the same router and from another one, with the output once more; other keys and tenants are runs of their own."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as engine:
        first = await run(engine)
        assert (await run(engine)).id == first.id
        assert (await run(engine, key="twice")).id != first.id
        assert (await run(engine, tenant="other")).id != first.id
        assert (await run(engine, key=None)).id != first.id
    heard: list[Any] = []
    async with router(journal, cloud) as engine:
        request = engine.request(HELLO, SandboxSpec(), Constraints(), key="once")
        again = await engine.run(request, heard.append)
    assert (again.id, again.stdout, again.exit) == (first.id, first.stdout, first.exit)
    assert b"".join(output.data for output in heard) == b"hello\n"
    assert starts(cloud) == 4


async def test_many_at_once_start_one(autojump_clock: MockClock, journal: Path) -> None:
    """Twenty that ask in the same moment, of two routers, share one program and its result."""
    cloud = ReferenceProvider("cloud")
    results: list[RunResult] = []

    async def ask(engine: Engine) -> None:
        results.append(await run(engine, Task(argv=("sleep", "30"), timeout=60)))

    async with router(journal, cloud) as one, router(journal, cloud) as two, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(ask, (one, two)[number % 2])
    assert len({result.id for result in results}) == 1
    assert len(results) == 20
    assert starts(cloud) == 1


async def test_leaving_a_duplicate_leaves_the_run(autojump_clock: MockClock, journal: Path) -> None:
    """Cancelling one that follows does not end what it follows."""
    cloud = ReferenceProvider("cloud")
    task = Task(argv=("sleep", "30"), timeout=60)
    async with router(journal, cloud) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, engine, task)
            await trio.sleep(5)
            with trio.move_on_after(5) as left:
                await run(engine, task)
            assert left.cancelled_caught
            assert len(cloud.vendor.live()) == 1
        assert (await run(engine, task)).exit.ok


async def test_the_same_key_for_something_else_is_a_conflict(autojump_clock: MockClock, journal: Path) -> None:
    """Another program or machine under a key in use is refused, and the error names the run."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as engine:
        first = await run(engine)
        with pytest.raises(Conflict, match=f"in use for another program or machine, by run {first.id}"):
            await run(engine, Task(argv=("out", "other")))
        with pytest.raises(Conflict):
            await engine.run(engine.request(HELLO, SandboxSpec(memory=1024), Constraints(), key="once"))
        assert starts(cloud) == 1


async def test_a_run_that_started_nothing_frees_its_key(autojump_clock: MockClock, journal: Path) -> None:
    """What failed before its start may be asked for again under the same key."""
    cloud = ReferenceProvider("cloud")
    chaos = ChaosProvider(cloud, [Fault(step="create", kind="capacity")])
    async with router(journal, chaos) as engine:
        with pytest.raises(RunFailed):
            await run(engine)
        assert (await run(engine)).exit.ok


async def test_an_unknown_outcome_keeps_its_key(autojump_clock: MockClock, journal: Path) -> None:
    """What may have run is not started again under its key, by any router."""
    cloud = ReferenceProvider("cloud")
    chaos = ChaosProvider(cloud, [Fault(step="events", kind="sandbox-lost")])
    async with router(journal, chaos) as engine:
        with pytest.raises(OutcomeUnknown):
            await run(engine)
    async with router(journal, cloud) as engine:
        with pytest.raises(OutcomeUnknown):
            await run(engine)
    assert starts(cloud) == 1


async def test_the_run_of_a_dead_router_is_not_waited_for_forever(autojump_clock: MockClock, journal: Path) -> None:
    """A router that died between two attempts had started nothing: whoever repeats the key starts it."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as engine:
        request = engine.request(HELLO, SandboxSpec(), Constraints(), key="once")
        plan = await engine.planned(request)
        trial = engine.trial(plan, plan.candidates[0], 1, {})
        await trial.open(engine.recorder.planned(plan, ()))
        assert await engine.store.update(attrs.evolve(trial.row, state="absent"), durable=True)
    async with router(journal, cloud) as engine:
        assert (await run(engine)).id != request.id
    assert starts(cloud) == 1


async def test_a_detached_run_has_one_start_too(autojump_clock: MockClock, journal: Path) -> None:
    """A second `detach` under the key gives the id of the first."""
    from sandstorm._custody import detach

    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as engine:
        request = engine.request(HELLO, SandboxSpec(), Constraints(), lifetime=600, keep=True, key="once")
        first = await detach(engine, request)
        again = engine.request(HELLO, SandboxSpec(), Constraints(), lifetime=600, keep=True, key="once")
        assert await detach(engine, again) == first == request.id
    assert starts(cloud) == 1


async def test_the_key_and_the_intent_are_one_commit(autojump_clock: MockClock, journal: Path) -> None:
    """Where the key is taken nothing of the run is written: no row, no attempt, no reservation."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as engine:
        first = await run(engine)
        request = engine.request(HELLO, SandboxSpec(), Constraints())
        plan = await engine.planned(request)
        trial = engine.trial(plan, plan.candidates[0], 1, {})
        key = KeyRow(tenant="default", key="once", run=request.id, fingerprint="x")
        with pytest.raises(KeyTaken) as caught:
            await engine.store.begin(engine.recorder.planned(plan, ()), trial.row, None, key)
        assert caught.value.held.run == first.id
        assert await engine.store.run(request.id) is None
        assert await engine.store.attempts([trial.row.id]) == []
