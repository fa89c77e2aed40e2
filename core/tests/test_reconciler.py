"""What a crash or a lost answer leaves open is found, destroyed and booked, or proven absent; nothing else is touched."""

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
from trio.testing import MockClock

from sandstorm import Constraints, SandboxSpec, Task
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import settings_of
from sandstorm._sqlite import SqliteStore
from sandstorm._store import AttemptRow
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

START = time.time()


def wall() -> float:
    """A wall clock that goes with trio's."""
    return START + trio.current_time()


@asynccontextmanager
async def router(path: Path, *providers: Any) -> AsyncIterator[Engine]:
    """An engine over these providers and a journal that it shares."""
    settings = settings_of({"strategy": "ordered"})
    plugins = Plugins.load(settings, extra=[(provider.name, plugin_for(provider)) for provider in providers])
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with open_engine(settings, plugins, store=store, wall=wall) as engine:
        yield engine


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal's file."""
    return tmp_path / "journal.db"


async def left_by_a_dead_router(path: Path, provider: Any, state: str, *, made: bool = True, **changes: Any) -> AttemptRow:
    """An attempt as a router leaves it that is killed in this state; `made` says whether the vendor has its sandbox."""
    async with router(path, provider) as engine:
        task = Task(argv=("sleep", "600"), timeout=900)
        plan = await engine.planned(engine.request(task, SandboxSpec(), Constraints(), lifetime=1000))
        trial = engine.trial(plan, plan.candidates[0], 1, {})
        await trial.open(engine.recorder.planned(plan, ()))
        sandbox = None
        if made:
            session = await engine.accounts.session(provider.name)
            sandbox = (await session.create(trial.order({}))).id
    # The lock of its epoch is free from here on, as it is after a SIGKILL.
    bound = sandbox if state not in ("intent", "ambiguous") else None
    row = attrs.evolve(trial.row, state=state, sandbox=bound, **changes)
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with store.open():
        assert await store.update(row, durable=True)
    return row


async def stored(path: Path, row: AttemptRow) -> Any:
    """The run, its attempts and its ledger."""
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with store.open():
        found = await store.run(row.run)
    assert found is not None
    return found


def balance(ledger: Any) -> tuple[Decimal, Decimal]:
    """What is still reserved, and what was settled."""
    total = {
        kind: sum((row.amount for row in ledger if row.kind == kind), Decimal(0)) for kind in ("reserve", "release", "settle")
    }
    return total["reserve"] - total["release"], total["settle"]


@pytest.mark.parametrize("state", ["intent", "ambiguous", "bound", "started", "releasing"])
async def test_what_a_dead_router_left_is_destroyed_and_booked(autojump_clock: MockClock, journal: Path, state: str) -> None:
    """Whatever it was doing: the sandbox goes, the reservation is released, the cost is what the vendor charges at most."""
    cloud = ReferenceProvider("cloud")
    row = await left_by_a_dead_router(journal, cloud, state)
    assert len(cloud.vendor.live()) == 1
    await trio.sleep(50)
    async with router(journal, cloud):
        await trio.sleep(5)
    assert cloud.vendor.live() == ()
    _, attempts, ledger = await stored(journal, row)
    assert [attempt.state for attempt in attempts] == ["released"]
    reserved, settled = balance(ledger)
    owed = cloud.vendor.owed()
    assert owed is not None
    assert reserved == 0
    assert settled >= owed > 0


@pytest.mark.parametrize(("outcome", "state"), [("maybe-started", "unknown"), ("not-started", "failed")])
async def test_the_run_of_a_dead_router_gets_an_end(autojump_clock: MockClock, journal: Path, outcome: str, state: str) -> None:
    """It failed if nothing was started, and is unknown else; it is never started again."""
    cloud = ReferenceProvider("cloud")
    row = await left_by_a_dead_router(journal, cloud, "started", outcome=outcome)
    async with router(journal, cloud):
        await trio.sleep(5)
    run, _, _ = await stored(journal, row)
    assert run.state == state
    assert "start" not in [call.step for call in cloud.vendor.log]


@pytest.mark.parametrize("state", ["intent", "ambiguous"])
async def test_absence_is_not_concluded_before_it_can_be(autojump_clock: MockClock, journal: Path, state: str) -> None:
    """Before the time to send is over an empty look-up proves nothing: the attempt stays open, and its money reserved."""
    cloud = ReferenceProvider("cloud")
    row = await left_by_a_dead_router(journal, cloud, state, made=False)
    async with router(journal, cloud) as engine:
        assert [reaped.closed for reaped in await engine.reconciler.sweep()] == [False]
        await trio.sleep(row.dispatch_by - wall() - 1)
        assert len(await engine.store.open_attempts()) == 1
        await trio.sleep(200)
        assert await engine.store.open_attempts() == []
    _, attempts, ledger = await stored(journal, row)
    assert [attempt.state for attempt in attempts] == ["absent"]
    assert balance(ledger) == (0, 0)


async def test_what_appears_after_its_absence_is_ended_at_the_second_sighting(autojump_clock: MockClock, journal: Path) -> None:
    """A create that took effect late is destroyed and booked, and one look at it is not enough."""
    cloud = ReferenceProvider("cloud")
    row = await left_by_a_dead_router(journal, cloud, "absent")
    other = await left_by_a_dead_router(journal, ReferenceProvider("other"), "intent", made=False)
    assert other.state == "intent"
    async with router(journal, cloud) as engine:
        first = await engine.reconciler.sightings("cloud")
        assert (first, len(cloud.vendor.live())) == ((), 1)
        (reaped,) = await engine.reconciler.sightings("cloud")
        assert (reaped.marker, reaped.done) == (row.id, "destroyed")
    assert cloud.vendor.live() == ()


async def test_ten_lost_answers_leave_nothing(autojump_clock: MockClock, journal: Path) -> None:
    """Ten creates whose answers were lost, all of which took effect: no sandbox is left, and all of them are booked."""
    cloud, other = ReferenceProvider("cloud"), ReferenceProvider("other")
    chaos = ChaosProvider(cloud, [Fault(step="create", kind="ambiguous", committed=True, times=10)])
    went: list[str] = []

    async def run(engine: Engine) -> None:
        task = Task(argv=("out", "hello"))
        result = await engine.run(engine.request(task, SandboxSpec(), Constraints(prefer=("cloud",))))
        went.append(result.provider)

    async with router(journal, chaos, other) as engine:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(run, engine)
        assert went == ["other"] * 10
        await trio.sleep(60)
        assert await engine.store.open_attempts() == []
    assert len(cloud.vendor.bill()) == 10
    assert cloud.vendor.live() == ()


async def test_what_a_living_router_uses_is_let_be(autojump_clock: MockClock, journal: Path) -> None:
    """Neither a second router nor a sweep touches a sandbox whose owner lives, nor one that is kept and not yet due."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as first, router(journal, cloud) as second:
        request = first.request(Task(argv=("sleep", "50"), timeout=100), SandboxSpec(), Constraints())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run, request)
            await trio.sleep(10)
            assert await second.reconciler.sweep() == ()
            assert len(cloud.vendor.live()) == 1
    kept = await left_by_a_dead_router(journal, cloud, "bound", kept=True)
    async with router(journal, cloud) as engine:
        assert await engine.reconciler.sweep() == ()
        assert [info.marker for info in cloud.vendor.live()] == [kept.id]
        await trio.sleep(1200)
        assert await engine.store.open_attempts() == []


async def test_a_foreign_sandbox_is_let_be(autojump_clock: MockClock, journal: Path) -> None:
    """What carries a marker that this journal does not know belongs to somebody else, however often it is seen."""
    cloud, elsewhere = ReferenceProvider("cloud"), journal.with_name("elsewhere.db")
    foreign = await left_by_a_dead_router(elsewhere, cloud, "started")
    await left_by_a_dead_router(journal, cloud, "started")
    async with router(journal, cloud) as engine:
        for _ in range(3):
            await engine.reconciler.sweep()
            await engine.reconciler.sightings("cloud")
    assert [info.marker for info in cloud.vendor.live()] == [foreign.id]


async def test_an_account_that_does_not_answer_closes_nothing(autojump_clock: MockClock, journal: Path) -> None:
    """A look-up that fails is no absence: the attempt stays open with the reason, and is closed once the account answers."""
    cloud = ReferenceProvider("cloud")
    await left_by_a_dead_router(journal, cloud, "started")
    chaos = ChaosProvider(cloud, [Fault(step="find", kind="provider-down", times=2)])
    async with router(journal, chaos) as engine:
        (reaped,) = await engine.reconciler.sweep()
        assert (reaped.closed, reaped.done) == (False, "its account does not answer")
        await trio.sleep(120)
        assert await engine.store.open_attempts() == []
    assert cloud.vendor.live() == ()


async def test_a_destroy_that_fails_is_tried_again(autojump_clock: MockClock, journal: Path) -> None:
    """What the run itself could not destroy stays open, reserved, and is destroyed later."""
    cloud = ReferenceProvider("cloud")
    chaos = ChaosProvider(cloud, [Fault(step="destroy", kind="provider-down", times=3)])
    async with router(journal, chaos) as engine:
        result = await engine.run(engine.request(Task(argv=("out", "hello")), SandboxSpec(), Constraints()))
        assert result.attempts[0].open
        assert len(cloud.vendor.live()) == 1
        await trio.sleep(120)
        assert await engine.store.open_attempts() == []
    assert cloud.vendor.live() == ()


async def test_only_one_router_takes_over(autojump_clock: MockClock, journal: Path) -> None:
    """The epoch is compared and set: of two that want an attempt one gets it, and its former owner can write nothing more."""
    cloud = ReferenceProvider("cloud")
    row = await left_by_a_dead_router(journal, cloud, "started")
    first, second = (SqliteStore(f"sqlite:///{journal}", inline=True) for _ in range(2))
    async with first.open(), second.open(), first.enlisted() as one, second.enlisted() as two:
        assert one != two
        assert await second.living({row.epoch, one, two}) == {one, two}
        taken = await first.take(row, one)
        assert taken == attrs.evolve(row, epoch=one)
        assert await second.take(row, two) is None
        assert not await second.update(attrs.evolve(row, state="released"), durable=True)
    async with first.open():
        assert await first.living({one, two}) == frozenset()
