"""The chaos provider injects what its script says, where it says, and tells the truth about it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from sandstorm.provider import (
    FULL,
    Ambiguous,
    AuthError,
    CapacityError,
    Command,
    Conflict,
    Exit,
    Facts,
    InvalidInput,
    InvalidSpec,
    NotSupported,
    Offer,
    OneShot,
    Order,
    OutOfCredit,
    Output,
    PreparationFailed,
    Provider,
    ProviderDown,
    QuotaError,
    RateLimited,
    Reconnect,
    SandboxGone,
    SandboxLost,
    SandboxSpec,
    StreamLost,
)
from sandstorm.testing import KINDS, STEPS, ChaosProvider, Fault, ReferenceProvider

CLASSES: dict[str, type[Exception]] = {
    "capacity": CapacityError,
    "quota": QuotaError,
    "rate-limited": RateLimited,
    "out-of-credit": OutOfCredit,
    "auth": AuthError,
    "invalid-spec": InvalidSpec,
    "preparation-caller": PreparationFailed,
    "preparation-provider": PreparationFailed,
    "provider-down": ProviderDown,
    "ambiguous": Ambiguous,
    "stream-lost": StreamLost,
    "sandbox-lost": SandboxLost,
    "conflict": Conflict,
    "sandbox-gone": SandboxGone,
    "not-supported": NotSupported,
    "unexpected": RuntimeError,
}
IN_A_SANDBOX = ("start", "process", "burn", "upload", "download", "events", "kill", "destroy")
PROGRAM = b"out one\nsleep 1\nerr two\nsleep 1\nout three"
SPEC = SandboxSpec(files={"main.py": PROGRAM})
COMMAND = Command(argv=("python3", "main.py"), timeout=60.0, start_id="s")


def order(provider: Provider, marker: str = "m1") -> Order:
    """An order on the provider's only offer."""
    (offer,) = provider.offers(SPEC, Facts())
    assert isinstance(offer, Offer)
    return Order(spec=SPEC, offer=offer, marker=marker, dispatch_by=math.inf, lifetime=3600.0)


async def nothing() -> AsyncIterator[bytes]:
    """An empty file."""
    yield b""


async def every_step(provider: Provider) -> list[str]:
    """Goes through each step of the contract once; returns what was seen."""
    seen: list[str] = []
    async with provider.connect() as session:
        await session.refresh()
        await session.check()
        assert isinstance(session, OneShot)
        other, _ = await session.launch(order(provider, "m2"), COMMAND)
        await other.destroy()
        made = await session.create(order(provider))
        sandbox = await session.attach(made.id)
        async with session.find() as infos:
            seen += [f"found {info.marker}" async for info in infos]
        await sandbox.upload("x", nothing())
        async with sandbox.download("main.py") as chunks:
            seen += [f"read {len(chunk)}" async for chunk in chunks]
        started = await sandbox.start(COMMAND)
        assert isinstance(sandbox, Reconnect)
        process = await sandbox.process(started.id, {})
        assert await sandbox.burn("another start")
        async with process.events() as events:
            seen += [event.data.decode() if isinstance(event, Output) else repr(event) async for event in events]
        await process.kill()
        await sandbox.destroy()
    return seen


@asynccontextmanager
async def streaming(faults: Sequence[Fault]) -> AsyncIterator[tuple[ChaosProvider, ReferenceProvider, list[object]]]:
    """A run of the program under faults, with the events that came until the faults were done."""
    inner = ReferenceProvider()
    chaos = ChaosProvider(inner, faults)
    got: list[object] = []
    async with chaos.connect() as session:
        process = await (await session.create(order(chaos))).start(COMMAND)
        try:
            async with process.events() as events:
                async for event in events:
                    got.append(event)  # noqa: PERF401  # what came before the cut is kept
        except (StreamLost, SandboxLost) as exc:
            got.append(type(exc))
        yield chaos, inner, got


async def test_without_faults_it_changes_nothing(autojump_clock: MockClock) -> None:
    """An empty script gives what the provider behind it gives."""
    assert await every_step(ChaosProvider(ReferenceProvider(one_shot=True))) == await every_step(ReferenceProvider(one_shot=True))


@pytest.mark.parametrize("kind", sorted(CLASSES))
@pytest.mark.parametrize("step", STEPS)
async def test_every_error_at_every_step(autojump_clock: MockClock, step: str, kind: str) -> None:
    """Each kind reaches the caller of each step as its class, once, and is recorded as a change."""
    inner = ReferenceProvider(one_shot=True)
    fault = Fault(step=step, kind=kind)
    chaos = ChaosProvider(inner, [fault])
    assert [*chaos.unspent] == [fault]
    with pytest.raises(CLASSES[kind], match="injected"):
        await every_step(chaos)
    assert [(injected.fault, injected.call, injected.changed) for injected in chaos.injected] == [(fault, 0, True)]
    assert [*chaos.unspent] == []
    if step in ("connect", "refresh", "check", "create", "launch"):
        assert "create" not in [call.step for call in inner.vendor.log]
    if kind in ("sandbox-lost", "sandbox-gone") and step in IN_A_SANDBOX:
        assert inner.vendor.live() == ()


def test_every_kind_is_tested() -> None:
    """The table of this test names each kind that raises."""
    assert {*CLASSES, "delay", "hang"} == set(KINDS)


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_never_answers(autojump_clock: MockClock, step: str) -> None:
    """A hang lasts until the caller gives up."""
    chaos = ChaosProvider(ReferenceProvider(one_shot=True), [Fault(step=step, kind="hang")])
    with trio.move_on_after(1000) as scope:
        await every_step(chaos)
    assert scope.cancelled_caught
    assert [injected.changed for injected in chaos.injected] == [True]


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_a_late_answer_is_still_the_answer(autojump_clock: MockClock, step: str, committed: bool) -> None:
    """A delay changes when, and nothing else."""
    expected = await every_step(ReferenceProvider(one_shot=True))
    began = trio.current_time()
    chaos = ChaosProvider(ReferenceProvider(one_shot=True), [Fault(step=step, kind="delay", seconds=7.0, committed=committed)])
    assert await every_step(chaos) == expected
    waited = trio.current_time() - began
    # A program goes on at the vendor while its reader waits.
    assert waited == (7.0 if step in ("process", "burn", "events") or (step == "start" and committed) else 9.0)


@pytest.mark.parametrize("committed", [False, True])
async def test_ambiguous_before_and_after_the_commit(committed: bool) -> None:
    """The same error to the caller; at the vendor there is nothing, or a sandbox, or a started program."""
    inner = ReferenceProvider()
    chaos = ChaosProvider(
        inner,
        [
            Fault(step="create", kind="ambiguous", committed=committed),
            Fault(step="start", kind="ambiguous", committed=committed),
            Fault(step="destroy", kind="ambiguous", committed=committed),
        ],
    )
    async with chaos.connect() as session:
        with pytest.raises(Ambiguous):
            await session.create(order(chaos))
        assert len(inner.vendor.live()) == committed
        sandbox = await session.create(order(chaos))
        with pytest.raises(Ambiguous):
            await sandbox.start(COMMAND)
        assert inner.vendor.starts("s") == committed
        with pytest.raises(Ambiguous):
            await sandbox.destroy()
        assert len(inner.vendor.live()) == (not committed)
        await sandbox.destroy()
        assert inner.vendor.live() == ()


async def test_a_step_that_fails_by_itself_is_not_changed() -> None:
    """Where a step was to take effect first and fails, the caller gets its own error, and the record says so."""
    chaos = ChaosProvider(ReferenceProvider(), [Fault(step="attach", kind="ambiguous", committed=True)])
    async with chaos.connect() as session:
        with pytest.raises(SandboxGone, match="no sandbox"):
            await session.attach("no-such")
    assert [injected.changed for injected in chaos.injected] == [False]


@pytest.mark.parametrize("kind", ["stream-lost", "sandbox-lost"])
@pytest.mark.parametrize("items", [0, 1, 2, 3, 4])
async def test_a_stream_is_cut_after_so_many_items(autojump_clock: MockClock, items: int, kind: str) -> None:
    """Exactly the items come through; a fault behind the exit changes nothing, and the record says so."""
    full = [Output("stdout", b"one\n", 0), Output("stderr", b"two\n", 0), Output("stdout", b"three\n", 4), Exit(code=0)]
    async with streaming([Fault(step="events", kind=kind, items=items)]) as (chaos, inner, got):
        cut = items < len(full)
        assert got == ([*full[:items], CLASSES[kind]] if cut else full)
        assert [injected.changed for injected in chaos.injected] == [cut]
        assert len(inner.vendor.live()) == (0 if cut and kind == "sandbox-lost" else 1)


async def test_a_stream_stalls_and_goes_on(autojump_clock: MockClock) -> None:
    """A delay in mid-stream holds back what follows and loses nothing."""
    async with streaming([Fault(step="events", kind="delay", items=1, seconds=30.0)]) as (chaos, _, got):
        assert (len(got), trio.current_time()) == (4, 30.0)
        assert [(injected.at, injected.changed) for injected in chaos.injected] == [(0.0, True)]


async def test_a_cut_stream_can_be_taken_up_again(autojump_clock: MockClock) -> None:
    """After StreamLost the program runs on, and Reconnect gives the rest from the offsets."""
    chaos = ChaosProvider(ReferenceProvider(), [Fault(step="events", kind="stream-lost", items=1)])
    async with chaos.connect() as session:
        sandbox = await session.create(order(chaos))
        process = await sandbox.start(COMMAND)
        with pytest.raises(StreamLost):
            async with process.events() as events:
                async for _ in events:
                    pass
        assert isinstance(sandbox, Reconnect)
        again = await sandbox.process(process.id, {"stdout": 4, "stderr": 0})
        async with again.events() as events:
            rest = [event async for event in events]
    assert rest == [Output("stderr", b"two\n", 0), Output("stdout", b"three\n", 4), Exit(code=0)]


@pytest.mark.parametrize("step", ["find", "download"])
async def test_lists_and_files_are_torn(step: str) -> None:
    """A look-up and a download can break off after their first item."""
    chaos = ChaosProvider(ReferenceProvider(), [Fault(step=step, kind="provider-down", items=1)])
    got: list[object] = []
    async with chaos.connect() as session:
        sandbox = await session.create(order(chaos))
        await session.create(order(chaos, "m2"))
        with pytest.raises(ProviderDown):
            async with session.find() if step == "find" else sandbox.download("main.py") as items:
                async for item in items:
                    got.append(item)  # noqa: PERF401  # what came before the cut is kept
    assert len(got) == 1


async def test_a_rate_limit_says_when_to_come_back() -> None:
    """`seconds` is the `retry_after`; preparation says whose fault it was."""
    chaos = ChaosProvider(
        ReferenceProvider(),
        [
            Fault(step="check", kind="rate-limited", seconds=3.0),
            Fault(step="check", kind="rate-limited", after=1),
            Fault(step="check", kind="preparation-caller", after=2),
        ],
    )
    async with chaos.connect() as session:
        with pytest.raises(RateLimited) as told:
            await session.check()
        assert told.value.retry_after == 3.0
        with pytest.raises(RateLimited) as silent:
            await session.check()
        assert silent.value.retry_after is None
        with pytest.raises(PreparationFailed) as prepared:
            await session.check()
        assert (prepared.value.fault, prepared.value.failover) == ("caller", False)


@given(
    faults=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4), st.sampled_from(["capacity", "auth", "quota"])), max_size=5)
)
@settings(max_examples=60, deadline=None)
def test_the_script_alone_decides(faults: list[tuple[int, int, str]]) -> None:
    """The nth call is hit by the first fault whose range holds n, across sessions, and by no other."""

    async def main() -> list[type[Exception] | None]:
        chaos = ChaosProvider(
            ReferenceProvider(), [Fault(step="check", kind=kind, after=after, times=times) for after, times, kind in faults]
        )
        outcomes: list[type[Exception] | None] = []
        for _ in range(12):
            async with chaos.connect() as session:
                try:
                    await session.check()
                except Exception as exc:
                    outcomes.append(type(exc))
                else:
                    outcomes.append(None)
        return outcomes

    expected = [
        next((CLASSES[kind] for after, times, kind in faults if after <= number < after + times), None) for number in range(12)
    ]
    assert trio.run(main) == expected


def test_a_wrong_script_is_refused() -> None:
    """A misspelt step or kind, and a fault that never happens, are located input errors."""
    for wrong in ({"step": "crate"}, {"kind": "capacities"}, {"times": 0}, {"after": -1}, {"seconds": -1.0}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            Fault(**{"step": "create", "kind": "capacity", **wrong})  # type: ignore[arg-type]


async def test_abilities_that_it_cannot_pass_are_not_declared() -> None:
    """OneShot is declared and there exactly where the provider behind it has it; unknown methods are refused by name."""

    class Wider(ReferenceProvider):
        """Declares an ability with methods that the chaos provider does not know."""

        def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer]:
            abilities = {"Pause": FULL, "Gpu": FULL}
            return [Offer(provider=self.name, cpu=1.0, memory=1, disk=1, isolation="gvisor", abilities=abilities)]

    (offer,) = ChaosProvider(Wider()).offers(SPEC, Facts())
    assert isinstance(offer, Offer)
    assert (offer.can("Pause"), offer.can("Gpu")) == (False, True)
    for one_shot in (False, True):
        chaos = ChaosProvider(ReferenceProvider(one_shot=one_shot))
        async with chaos.connect() as session:
            assert isinstance(session, OneShot) == order(chaos).offer.can("OneShot") == one_shot
