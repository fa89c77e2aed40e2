"""Money is reserved before it is risked: no limit is passed, even if everything that is open costs what it can."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from sandstorm import BudgetExhausted, Constraints, RunFailed, RunResult, SandboxSpec, Task
from sandstorm._box import open_box
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import settings_of
from sandstorm._sqlite import SqliteStore
from sandstorm._store import AttemptRow, LedgerRow, LimitReached, RunRow
from sandstorm.policy import Limit, Request, hookimpl
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

START = time.time() // 3600 * 3600
HELLO = Task(argv=("out", "hello"), timeout=10)


class Purse:
    """A policy that limits what each tenant spends."""

    name = "purse"

    def __init__(self, usd: str, window: float = 3600.0) -> None:
        self._usd = Decimal(usd)
        self._window = window

    @hookimpl
    def sandstorm_limits(self, request: Request) -> list[Limit]:
        """One limit for the tenant."""
        return [Limit(key=f"tenant:{request.tenant}", usd=self._usd, window=self._window)]


@asynccontextmanager
async def router(path: Path, *providers: Any, purse: Purse) -> AsyncIterator[Engine]:
    """An engine over these providers and this policy, whose wall clock goes with trio's."""
    chosen = settings_of({"strategy": "ordered", "plugins": {"strategies": {"order": [each.name for each in providers]}}})
    extra = [(provider.name, plugin_for(provider)) for provider in providers]
    plugins = Plugins.load(chosen, extra=[*extra, ("purse", purse)])
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with open_engine(chosen, plugins, store=store, wall=lambda: START + trio.current_time()) as engine:
        yield engine


async def run(engine: Engine, task: Task = HELLO, tenant: str = "acme") -> RunResult:
    """One run of a tenant."""
    return await engine.run(engine.request(task, SandboxSpec(), Constraints(), tenant=tenant))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal's file."""
    return tmp_path / "journal.db"


async def test_a_run_that_does_not_fit_is_refused_before_anything_is_asked(autojump_clock: MockClock, journal: Path) -> None:
    """The error has what it can cost and what is left; the vendor hears nothing, and nothing is written."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud, purse=Purse("0.0001")) as engine:
        with pytest.raises(BudgetExhausted, match=r"cloud: it can cost up to \$0\.00143, and \$0\.0001 of \$0\.0001"):
            await run(engine)
        assert "create" not in [call.step for call in cloud.vendor.log]
        assert await engine.store.runs() == []


async def test_what_is_open_counts_with_all_that_it_can_cost(autojump_clock: MockClock, journal: Path) -> None:
    """Of ten at once only as many start as fit in the worst case; once those have ended, more do."""
    cloud = ReferenceProvider("cloud")
    task = Task(argv=("sleep", "5"), timeout=10)
    done: list[Any] = []

    async def ask(engine: Engine) -> None:
        try:
            done.append(await run(engine, task))
        except BudgetExhausted as exc:
            done.append(exc)

    async with router(journal, cloud, purse=Purse("0.0045")) as engine:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask, engine)
        assert [type(each).__name__ for each in done].count("RunResult") == 3
        assert (await run(engine, task)).exit.ok


async def test_a_reservation_ends_with_its_window(autojump_clock: MockClock, journal: Path) -> None:
    """What was spent counts until the window is over, and not after."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud, purse=Purse("0.0025", window=600.0)) as engine:
        spent = 0
        with pytest.raises(BudgetExhausted):
            while True:
                await run(engine, Task(argv=("sleep", "9"), timeout=10))
                spent += 1
        assert spent > 1
        await trio.sleep(600)
        assert (await run(engine)).exit.ok


async def test_two_routers_share_a_limit(autojump_clock: MockClock, journal: Path) -> None:
    """It is kept in the journal: what one reserves the other does not have."""
    cloud = ReferenceProvider("cloud")
    task = Task(argv=("sleep", "5"), timeout=10)
    async with router(journal, cloud, purse=Purse("0.002")) as one, router(journal, cloud, purse=Purse("0.002")) as two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, one, task)
            await trio.sleep(1)
            with pytest.raises(BudgetExhausted):
                await run(two, task)
        assert (await run(two, task)).exit.ok


async def test_a_cheaper_candidate_may_still_fit(autojump_clock: MockClock, journal: Path) -> None:
    """One that does not fit is passed over, and the next one is tried."""
    dear, free = ReferenceProvider("dear"), ReferenceProvider("free", rates=attrs.evolve(ReferenceProvider().rates, rates=()))
    async with router(journal, dear, free, purse=Purse("0.0001")) as engine:
        assert (await run(engine)).provider == "free"
    assert "create" not in [call.step for call in dear.vendor.log]


async def test_an_unknown_price_cannot_be_reserved(autojump_clock: MockClock, journal: Path) -> None:
    """Unknown is not free: under a limit it is refused."""
    unknown = ReferenceProvider("unknown", rates=None)
    async with router(journal, unknown, purse=Purse("100")) as engine:
        with pytest.raises(BudgetExhausted, match="its price is unknown"):
            await run(engine)


async def test_what_is_ambiguous_stays_reserved(autojump_clock: MockClock, journal: Path) -> None:
    """An attempt that may exist counts in full until it is found or proven absent."""
    chaos = ChaosProvider(ReferenceProvider("cloud"), [Fault(step="create", kind="ambiguous", committed=False)])
    async with router(journal, chaos, purse=Purse("0.0025")) as engine:
        with pytest.raises(RunFailed):
            await run(engine)
        with pytest.raises(BudgetExhausted):
            await run(engine)
        await trio.sleep(400)
        assert await engine.store.open_attempts() == []
        assert (await run(engine)).exit.ok


async def test_a_failed_attempt_gives_its_reservation_back(autojump_clock: MockClock, journal: Path) -> None:
    """What was refused by the vendor cost nothing and is reserved no more."""
    chaos = ChaosProvider(ReferenceProvider("cloud"), [Fault(step="create", kind="capacity", times=5)])
    async with router(journal, chaos, purse=Purse("0.002")) as engine:
        for _ in range(5):
            with pytest.raises(RunFailed):
                await run(engine)
        assert (await run(engine)).exit.ok


async def test_a_longer_life_has_to_fit_as_well(autojump_clock: MockClock, journal: Path) -> None:
    """`extend` reserves before it asks; what does not fit is refused, and the sandbox lives on as before."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud, purse=Purse("0.002")) as engine:
        request = engine.request(None, SandboxSpec(), Constraints(), tenant="acme", lifetime=100)
        async with open_box(engine, request) as box:
            with pytest.raises(BudgetExhausted):
                await box.extend(3000)
            assert "extend" not in [call.step for call in cloud.vendor.log]
            await box.extend(150)
            await box.upload("alive", b"")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 70), st.booleans()), max_size=25), st.integers(0, 200))
def test_the_window_never_holds_more_than_its_limit(steps: list[tuple[int, int, bool]], cents: int) -> None:
    """For any order of reservations and settlements at or below them, reserved plus settled stays within the limit."""

    async def check() -> None:
        store = SqliteStore("sqlite://", inline=True)
        limit = Limit(key="k", usd=Decimal(cents) / 100, window=3600.0)
        reserved, settled = Decimal(0), Decimal(0)
        async with store.open():
            for number, (wanted, cost, ends) in enumerate(steps):
                amount = Decimal(wanted) / 100
                row, attempt, ledger = _rows(number, amount)
                fits = reserved + settled + amount <= limit.usd
                try:
                    await store.begin(row, attempt, ledger("reserve", amount), None, [limit])
                except LimitReached:
                    assert not fits
                    continue
                assert fits
                reserved += amount
                if ends:
                    paid = min(Decimal(cost) / 100, amount)
                    moved = [ledger("release", amount), *([ledger("settle", paid)] if paid else [])]
                    assert await store.update(attrs.evolve(attempt, state="released"), moved, durable=True)
                    reserved, settled = reserved - amount, settled + paid
                assert reserved + settled <= limit.usd

    trio.run(check)


def _rows(number: int, amount: Decimal) -> Any:
    row = RunRow(id=f"r{number}", tenant="acme", created_at=100.0)
    attempt = AttemptRow(
        id=f"a{number}",
        run=row.id,
        number=1,
        provider="p",
        offer="o",
        dispatch_by=0,
        expires_at=0,
        created_at=100.0,
        exposure=amount,
    )

    def ledger(kind: str, usd: Decimal) -> LedgerRow:
        return LedgerRow(
            attempt=attempt.id, run=row.id, tenant="acme", provider="p", kind=kind, amount=usd, basis="exposure", at=100.0
        )

    return row, attempt, ledger
