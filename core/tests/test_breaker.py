"""Accounts that fail through their own fault are left alone for a while, and never the last one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from sandstorm import Constraints, RunFailed, RunResult, SandboxSpec, Task
from sandstorm._breaker import BREAKING, CLOSED, FAILURES, FIRST, LONG, LONGEST, PROBE, SHORT, Breaker, closed, opened
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import settings_of
from sandstorm._sqlite import SqliteStore
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

START = time.time()

errors = st.sampled_from(
    [None, *sorted(BREAKING), "CapacityError", "RateLimited", "OutOfCredit", "AuthError", "GivenUp", "Denied"]
)


@given(st.lists(st.tuples(errors, st.floats(0, 1000), st.booleans()), max_size=40))
def test_whatever_happens_a_pause_is_bounded_and_a_success_ends_it(outcomes: list[tuple[str | None, float, bool]]) -> None:
    """No pause is longer than the longest of its class, and one success forgets everything."""
    breaker, at = CLOSED, 1000.0
    for error, later, begins in outcomes:
        at += later
        if begins:
            breaker = opened(breaker, at)
        breaker = closed(breaker, error, at)
        assert breaker.until - at <= max(LONGEST, LONG) + 1e-6
        assert breaker.reason or not breaker.keeps_away(at)
        if error is None:
            assert breaker == CLOSED
    assert closed(breaker, None, at) == CLOSED


@pytest.mark.parametrize("error", sorted(BREAKING))
def test_failures_in_a_row_open_it_for_longer_and_longer(error: str) -> None:
    """Only the fifth counts; after each pause one probe is let through, and its failure doubles the next pause."""
    breaker, at = CLOSED, 0.0
    for _ in range(FAILURES - 1):
        breaker = closed(breaker, error, at)
        assert not breaker.keeps_away(at)
    pauses = []
    for _ in range(7):
        breaker = closed(breaker, error, at)
        pauses.append(breaker.until - at)
        assert breaker.keeps_away(at)
        at = breaker.until
        assert not breaker.keeps_away(at)
        breaker = opened(breaker, at)
        assert breaker.probing
        assert breaker.keeps_away(at + PROBE - 1)
    assert pauses == [min(FIRST * 2**n, LONGEST) for n in range(7)]


def test_what_says_nothing_of_the_account_changes_nothing() -> None:
    """The caller's mistakes and cancellations are not held against it, and a probe that ended so lets the next one through."""
    three = Breaker(failures=3)
    assert closed(three, "InvalidSpec", 5.0) == three
    assert closed(three, "GivenUp", 5.0) == three
    probing = opened(Breaker(failures=5, ejections=1, until=10.0, reason="x"), 20.0)
    assert not closed(probing, "GivenUp", 21.0).keeps_away(21.0)


def test_a_vendor_that_says_when_is_obeyed() -> None:
    """`retry_after` is the pause, whatever the class would ask for."""
    assert closed(CLOSED, "RateLimited", 100.0, retry_after=42.0).until == 142.0
    assert closed(CLOSED, "RateLimited", 100.0).until == 100.0 + SHORT


@asynccontextmanager
async def router(path: Path, *providers: Any) -> AsyncIterator[Engine]:
    """An engine over these providers, in this order, whose wall clock goes with trio's."""
    settings = settings_of({"strategy": "ordered", "plugins": {"strategies": {"order": [each.name for each in providers]}}})
    plugins = Plugins.load(settings, extra=[(provider.name, plugin_for(provider)) for provider in providers])
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with open_engine(settings, plugins, store=store, wall=lambda: START + trio.current_time()) as engine:
        yield engine


async def run(engine: Engine) -> RunResult:
    """One run."""
    return await engine.run(engine.request(Task(argv=("out", "hello")), SandboxSpec(), Constraints()))


async def test_a_failing_account_is_left_alone_and_probed_again(autojump_clock: MockClock, tmp_path: Path) -> None:
    """After five failures no run asks it any more and each says why; after the pause one does, and its success ends it."""
    inner = ReferenceProvider("first")
    first = ChaosProvider(inner, [Fault(step="create", kind="provider-down", times=FAILURES)])
    async with router(tmp_path / "journal.db", first, ReferenceProvider("second")) as engine:
        for _ in range(FAILURES):
            assert [attempt.provider for attempt in (await run(engine)).attempts] == ["first", "second"]
        result = await run(engine)
        assert [attempt.provider for attempt in result.attempts] == ["second"]
        assert "left alone" in " ".join(result.plan.reasons)
        assert "5 failures in a row, the last ProviderDown (core/cooling-down)" in " ".join(result.plan.reasons)
        await trio.sleep(FIRST * 1.3)
        assert (await run(engine)).provider == "first"
        assert (await run(engine)).provider == "first"


async def test_the_last_candidate_is_never_left_alone(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Where every account is failing, each is still tried: a chance is better than none."""
    only = ChaosProvider(ReferenceProvider("only"), [Fault(step="create", kind="provider-down", times=FAILURES + 1)])
    async with router(tmp_path / "journal.db", only) as engine:
        for _ in range(FAILURES + 1):
            with pytest.raises(RunFailed):
                await run(engine)
        assert (await run(engine)).provider == "only"


async def test_a_lack_of_room_is_a_short_pause(autojump_clock: MockClock, tmp_path: Path) -> None:
    """One refusal for want of room is enough to go elsewhere, for some seconds."""
    first = ChaosProvider(ReferenceProvider("first"), [Fault(step="create", kind="capacity")])
    async with router(tmp_path / "journal.db", first, ReferenceProvider("second")) as engine:
        await run(engine)
        assert [attempt.provider for attempt in (await run(engine)).attempts] == ["second"]
        await trio.sleep(SHORT * 1.3)
        assert (await run(engine)).provider == "first"


async def test_what_was_learned_outlives_the_router(autojump_clock: MockClock, tmp_path: Path) -> None:
    """The next router over the journal leaves the account alone, too; a refused key it tries, since it may be corrected."""
    journal = tmp_path / "journal.db"
    first = ChaosProvider(ReferenceProvider("first"), [Fault(step="create", kind="out-of-credit")])
    async with router(journal, first, ReferenceProvider("second")) as engine:
        await run(engine)
    async with router(journal, ReferenceProvider("first"), ReferenceProvider("second")) as engine:
        assert (await run(engine)).provider == "second"
        assert "top the account up" in " ".join((await run(engine)).plan.reasons)
    other = tmp_path / "other.db"
    first = ChaosProvider(ReferenceProvider("first"), [Fault(step="create", kind="auth")])
    async with router(other, first, ReferenceProvider("second")) as engine:
        await run(engine)
        assert "correct its key in the settings" in " ".join((await run(engine)).plan.reasons)
    async with router(other, ReferenceProvider("first"), ReferenceProvider("second")) as engine:
        assert (await run(engine)).provider == "first"


def test_a_breaker_is_stored_as_it_is() -> None:
    """Its fields are plain JSON."""
    breaker = closed(CLOSED, "RateLimited", 100.0, retry_after=42.0)
    assert Breaker(**attrs.asdict(breaker)) == breaker
