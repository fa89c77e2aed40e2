"""The engine under a virtual clock: failover, at most one start, nothing left live, and a journal that says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from sandstorm import (
    AsyncSandstorm,
    Constraints,
    InvalidInput,
    InvalidSpec,
    NotSupported,
    Outcome,
    OutcomeUnknown,
    PluginError,
    PreparationFailed,
    RunFailed,
    RunResult,
    SandboxSpec,
)
from sandstorm._sqlite import SqliteStore
from sandstorm.policy import (
    AttemptClosed,
    AttemptOpened,
    Candidate,
    Event,
    Knowledge,
    Limit,
    ProgramStarted,
    Ranked,
    Recipe,
    Request,
    RunFinished,
    RunPlanned,
    RunRefused,
    SandboxBound,
    Usage,
    hookimpl,
)
from sandstorm.provider import (
    Command,
    Facts,
    Order,
    Output,
    Process,
    Provider,
    ProviderDown,
    Session,
)
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

RETRYABLE = {
    "capacity": "CapacityError",
    "quota": "QuotaError",
    "rate-limited": "RateLimited",
    "out-of-credit": "OutOfCredit",
    "auth": "AuthError",
    "preparation-provider": "PreparationFailed",
    "provider-down": "ProviderDown",
    "ambiguous": "Ambiguous",
    "sandbox-lost": "SandboxLost",
    "unexpected": "Ambiguous",
}
"""Every kind of fault after which a create moves on, and the class that its attempt names."""


@pytest.fixture
def store() -> SqliteStore:
    """A journal in memory that needs no thread, so that the virtual clock never waits for one."""
    return SqliteStore("sqlite://", inline=True)


@asynccontextmanager
async def opened(
    store: SqliteStore, *providers: Provider, plugins: Iterable[object] = (), **settings: Any
) -> AsyncIterator[AsyncSandstorm]:
    """A client over these providers, tried in the order in which they stand here."""
    names = tuple(provider.name for provider in providers)
    settings.setdefault("strategy", "ordered")
    settings.setdefault("plugins", {"strategies": {"order": names}})
    extra = [("testing", plugin_for(*providers)), *((f"extra-{n}", plugin) for n, plugin in enumerate(plugins))]
    async with AsyncSandstorm(settings=settings, plugins=extra, store=store) as client:
        yield client


def pair(*faults: Fault, **options: Any) -> tuple[ChaosProvider, ReferenceProvider, ReferenceProvider]:
    """A first provider that fails as scripted, the vendor behind it, and a second one that works."""
    inner = ReferenceProvider("first", **options)
    return ChaosProvider(inner, faults), inner, ReferenceProvider("second")


class Sources:
    """A plugin with one source of secrets."""

    def __init__(self, **known: str) -> None:
        self.name = "vault"
        self._known = known

    @hookimpl
    def sandstorm_secrets(self) -> list[Sources]:
        """Itself."""
        return [self]

    async def lookup(self, secret: str) -> str | None:
        """The value of a secret."""
        return self._known.get(secret)


class Listener:
    """A plugin with a sink that takes `seconds` for each batch, and notices when two overlap."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.name = "listener"
        self.events: list[Event] = []
        self.flushed = 0
        self.overlapped = False
        self._seconds = seconds
        self._busy = False

    @hookimpl
    def sandstorm_sinks(self) -> list[Listener]:
        """Itself."""
        return [self]

    async def receive(self, events: Sequence[Event]) -> None:
        """Takes its time, and then the batch."""
        self.overlapped |= self._busy
        self._busy = True
        await trio.sleep(self._seconds)
        self.events += events
        self._busy = False

    async def flush(self) -> None:
        """Counts."""
        self.flushed += 1


# --- failover ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RETRYABLE)
async def test_retryable_create(autojump_clock: MockClock, store: SqliteStore, kind: str) -> None:
    """A create that fails through the provider's fault is followed by the next candidate, and the result says why."""
    first, _, second = pair(Fault(step="create", kind=kind))
    async with opened(store, first, second) as client:
        result = await client.run("out hello", "python")
        assert (result.stdout, result.provider, result.exit.ok) == (b"hello\n", "second", True)
        failed, succeeded = result.attempts
        assert (failed.provider, failed.error_class, failed.outcome) == ("first", RETRYABLE[kind], Outcome.NOT_STARTED)
        assert failed.error is not None
        assert "injected" in failed.error
        assert (succeeded.provider, succeeded.error, succeeded.outcome) == ("second", None, Outcome.FINISHED)
        assert failed.open == (RETRYABLE[kind] == "Ambiguous")


@pytest.mark.parametrize("step", ["connect", "refresh"])
async def test_unreachable(autojump_clock: MockClock, store: SqliteStore, step: str) -> None:
    """An account that cannot be reached is excluded by the rule `unreachable`, and the others still run it."""
    first, _, second = pair(Fault(step=step, kind="provider-down"))
    async with opened(store, first, second) as client:
        result = await client.run("out hello", "python")
        (excluded,) = (e for e in result.plan.exclusions if e.provider == "first")
        assert (result.provider, excluded.provider, excluded.by.rule) == ("second", "first", "unreachable")
        assert excluded.by.reason == "ProviderDown: injected: refused"


@pytest.mark.parametrize("step", ["connect", "refresh"])
async def test_silent(autojump_clock: MockClock, store: SqliteStore, step: str) -> None:
    """An account that never answers is excluded after 30 s, with a sentence that says so."""
    first, _, second = pair(Fault(step=step, kind="hang"))
    async with opened(store, first, second) as client:
        result = await client.run("out hello", "python")
        (excluded,) = (e for e in result.plan.exclusions if e.provider == "first")
        assert (result.provider, excluded.by.rule) == ("second", "unreachable")
        assert "30 s" in excluded.by.reason
        assert trio.current_time() == pytest.approx(30.0)


async def test_lost_answer_to_a_create(autojump_clock: MockClock, store: SqliteStore) -> None:
    """The run moves on at once; the attempt is open until what was made is found and destroyed."""
    first, inner, second = pair(Fault(step="create", kind="ambiguous", committed=True))
    async with opened(store, first, second) as client:
        result = await client.run("out hello", "python")
        lost = result.attempts[0]
        assert (lost.provider, lost.error_class, lost.open) == ("first", "Ambiguous", True)
        assert lost.exposure is not None
        assert lost.exposure > 0
        assert trio.current_time() == 0.0
        await trio.sleep(5)
        assert inner.vendor.live() == ()
        assert inner.vendor.creates(lost.marker) == 1
        assert await store.open_attempts() == []


async def test_cost_open_names_what_failed_attempts_may_still_cost(autojump_clock: MockClock, store: SqliteStore) -> None:
    """What an earlier attempt that is still open may cost is part of `cost_open`."""
    first, _, second = pair(Fault(step="create", kind="ambiguous", committed=True))
    async with opened(store, first, second) as client:
        result = await client.run("out hello", "python")
        assert result.cost_open == result.attempts[0].exposure


async def test_create_without_an_answer(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A create that never answers counts as lost after 120 s."""
    first, _, second = pair(Fault(step="create", kind="hang"))
    async with opened(store, first, second) as client:
        result = await client.run("out hello", "python")
        assert (result.provider, result.attempts[0].error_class) == ("second", "Ambiguous")
        assert trio.current_time() == pytest.approx(120.0)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("invalid-spec", InvalidSpec),
        ("preparation-caller", PreparationFailed),
        ("not-supported", NotSupported),
    ],
)
async def test_callers_mistake(autojump_clock: MockClock, store: SqliteStore, kind: str, error: type[Exception]) -> None:
    """A caller's mistake comes out as itself and no other candidate is asked."""
    first, _, second = pair(Fault(step="create", kind=kind))
    async with opened(store, first, second) as client:
        with pytest.raises(error, match="injected") as caught:
            await client.run("out hello", "python")
        assert caught.value.__cause__ is not caught.value
        assert [call.step for call in second.vendor.log if call.step == "create"] == []
        (run,) = await store.runs()
        assert run.state == "failed"


async def test_all_fail(autojump_clock: MockClock, store: SqliteStore) -> None:
    """When every candidate fails before the start, `RunFailed` names each with its error."""
    first, _, _ = pair(Fault(step="create", kind="capacity"))
    second = ChaosProvider(ReferenceProvider("second"), [Fault(step="create", kind="auth")])
    async with opened(store, first, second) as client:
        with pytest.raises(RunFailed, match=r"first: injected: no room; second: injected: bad key") as caught:
            await client.run("out hello", "python")
        assert [attempt.error_class for attempt in caught.value.attempts] == ["CapacityError", "AuthError"]


async def test_pin_ends_failover(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A pinned account has nobody to fail over to."""
    first, _, second = pair(Fault(step="create", kind="capacity"))
    async with opened(store, first, second) as client:
        with pytest.raises(RunFailed):
            await client.run("out hello", "python", constraints=Constraints(pin="first"))
        assert second.vendor.log == []


# --- nothing runs twice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize(("kind", "items"), [("stream-lost", 0), ("sandbox-lost", 1), ("unexpected", 1)])
async def test_lost_with_unknown_effects(
    autojump_clock: MockClock, store: SqliteStore, kind: str, items: int, one_shot: bool
) -> None:
    """A program whose output is lost is not started again, and `OutcomeUnknown` tells."""
    first, inner, second = pair(Fault(step="events", kind=kind, items=items, times=9), one_shot=one_shot)
    async with opened(store, first, second) as client:
        with pytest.raises(OutcomeUnknown, match="may have run on first") as caught:
            await client.run("out one\nsleep 1\nout two", "python")
        (attempt,) = caught.value.attempts
        assert (attempt.outcome, attempt.open) == (Outcome.MAYBE_STARTED, False)
        assert inner.vendor.starts(attempt.marker) == 1
        assert not [call for call in second.vendor.log if call.step == "create"]
        assert inner.vendor.live() == ()
        (run,) = await store.runs()
        assert run.state == "unknown"


@pytest.mark.parametrize("one_shot", [False, True])
async def test_a_stream_that_is_cut_is_taken_up_again(autojump_clock: MockClock, store: SqliteStore, one_shot: bool) -> None:
    """Cut three times, the output is complete, each byte once, and the program was started once."""
    first, inner, second = pair(Fault(step="events", kind="stream-lost", items=1, times=3), one_shot=one_shot)
    heard: list[Output] = []
    async with opened(store, first, second) as client:
        result = await client.run("out one\nsleep 1\nout two\nsleep 1\nerr three", "python", on_output=heard.append)
        assert (result.provider, result.stdout, result.stderr, result.exit.code) == ("first", b"one\ntwo\n", b"three\n", 0)
        assert b"".join(output.data for output in heard if output.stream == "stdout") == b"one\ntwo\n"
        assert inner.vendor.starts(result.attempts[0].marker) == 1


@pytest.mark.parametrize("effects", ["none", "idempotent"])
@pytest.mark.parametrize("kind", ["stream-lost", "sandbox-lost"])
async def test_lost_with_declared_effects(autojump_clock: MockClock, store: SqliteStore, kind: str, effects: str) -> None:
    """A program that may run twice runs on the next candidate once its output is lost."""
    first, inner, second = pair(Fault(step="events", kind=kind, items=0, times=9))
    async with opened(store, first, second) as client:
        result = await client.run("out one\nsleep 1\nout two", "python", effects=effects)
        lost, _ = result.attempts
        assert (result.provider, result.stdout) == ("second", b"one\ntwo\n")
        assert (lost.outcome, inner.vendor.starts(lost.marker)) == (Outcome.MAYBE_STARTED, 1)
        assert inner.vendor.live() == second.vendor.live() == ()


async def test_lost_everywhere(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Where every candidate lost a program that may run twice, nobody claims that it did not start."""
    first, _, _ = pair(Fault(step="events", kind="stream-lost", times=9))
    second = ChaosProvider(ReferenceProvider("second"), [Fault(step="create", kind="capacity")])
    async with opened(store, first, second) as client:
        with pytest.raises(OutcomeUnknown) as caught:
            await client.run("out one", "python", effects="none")
        outcomes = [attempt.outcome for attempt in caught.value.attempts]
        assert outcomes == [Outcome.MAYBE_STARTED, Outcome.NOT_STARTED]
        (run,) = await store.runs()
        assert run.state == "unknown"


@pytest.mark.parametrize("kind", ["ambiguous", "unexpected"])
async def test_lost_answer_to_a_start(autojump_clock: MockClock, store: SqliteStore, kind: str) -> None:
    """A start whose answer is lost counts as a program that may have started."""
    first, inner, second = pair(Fault(step="start", kind=kind, committed=True, times=3))
    async with opened(store, first, second) as client:
        with pytest.raises(OutcomeUnknown) as caught:
            await client.run("out one", "python")
        assert inner.vendor.starts(caught.value.attempts[0].marker) == 1


@pytest.mark.parametrize("committed", [True, False])
async def test_a_start_is_sent_again(autojump_clock: MockClock, store: SqliteStore, committed: bool) -> None:
    """One whose answer is lost is sent again under its id, so that the program runs there, and once."""
    first, inner, second = pair(Fault(step="start", kind="ambiguous", committed=committed, times=2))
    async with opened(store, first, second) as client:
        result = await client.run("out one", "python")
        assert (result.text, result.provider) == ("one\n", "first")
        assert inner.vendor.starts(result.attempts[0].marker) == 1


async def test_a_burned_gate_lets_the_run_move_on(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Where a start surely did not happen and never will, the next candidate runs the program, of whatever effects."""
    first, inner, second = pair(Fault(step="start", kind="ambiguous", times=3))
    async with opened(store, first, second) as client:
        result = await client.run("out one", "python")
        assert result.attempts[0].outcome is Outcome.NOT_STARTED
        assert (result.provider, inner.vendor.starts(result.attempts[0].marker), inner.vendor.live()) == ("second", 0, ())


async def test_a_gate_that_does_not_answer_proves_nothing(autojump_clock: MockClock, store: SqliteStore) -> None:
    """What could not be burned may have started."""
    first, _, second = pair(Fault(step="start", kind="ambiguous", times=3), Fault(step="burn", kind="ambiguous"))
    async with opened(store, first, second) as client:
        with pytest.raises(OutcomeUnknown):
            await client.run("out one", "python")


async def test_refused_start(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A start that was refused has started nothing, so the next candidate runs the program."""
    first, inner, second = pair(Fault(step="start", kind="provider-down"))
    async with opened(store, first, second) as client:
        result = await client.run("out one", "python")
        assert result.attempts[0].outcome is Outcome.NOT_STARTED
        assert (result.provider, inner.vendor.starts(result.attempts[0].marker), inner.vendor.live()) == ("second", 0, ())


@pytest.mark.parametrize(("kind", "runs_elsewhere"), [("capacity", True), ("ambiguous", False), ("sandbox-lost", False)])
async def test_launch(autojump_clock: MockClock, store: SqliteStore, kind: str, runs_elsewhere: bool) -> None:
    """A create that carries the program counts as a start wherever its answer was lost."""
    first, _, second = pair(Fault(step="launch", kind=kind), one_shot=True)
    async with opened(store, first, second) as client:
        if runs_elsewhere:
            assert (await client.run("out one", "python")).provider == "second"
        else:
            with pytest.raises(OutcomeUnknown):
                await client.run("out one", "python")


async def test_compile_step(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A compile step that fails ends the run with `compile-error`, and the program is never started."""
    provider = ReferenceProvider("only")

    class Plugin:
        """A language whose compiler fails."""

        @hookimpl
        def sandstorm_languages(self) -> list[Recipe]:
            """The language."""
            return [Recipe(language="toy", file="main.toy", compile=("exit", "3"), run=("run", "main.toy"))]

    async with opened(store, provider, plugins=[Plugin()]) as client:
        result = await client.run("out never", "toy")
        assert (result.exit.kind, result.exit.code, result.stdout) == ("compile-error", 3, b"")
        assert provider.vendor.starts(result.attempts[0].marker) == 1


# --- nothing leaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("after", [0.0, 0.5, 1.0, 1.5, 3.0, 3.5])
async def test_cancelled_at_a_time(autojump_clock: MockClock, store: SqliteStore, after: float, one_shot: bool) -> None:
    """Cancelled before, during or after its create, start and output, a run leaves nothing live and nothing open."""
    provider = ReferenceProvider("only", start_seconds=1.0, one_shot=one_shot)
    async with opened(store, provider) as client:
        with trio.move_on_after(after) as scope:
            await client.run("out a\nsleep 2\nout b", "python", outputs=() if one_shot else ("main.py",))
        assert scope.cancelled_caught == (after <= 3.0)
        await trio.sleep(5)
        assert provider.vendor.live() == ()
        assert await store.open_attempts() == []
        assert [run.state for run in await store.runs()] in ([], ["cancelled"], ["finished"])


async def test_cancelled_at_every_checkpoint(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Whichever checkpoint of a run the cancellation meets, nothing is live or open afterwards, and the journal says so."""
    provider = ReferenceProvider("only")
    finished = False
    async with opened(store, provider) as client:
        for ticks in range(200):
            scope = trio.CancelScope()

            async def cancel_later(scope: trio.CancelScope = scope, ticks: int = ticks) -> None:
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_later)
                with scope:
                    await client.run("out a\nout b\nout c", "python", outputs=("main.py",))
            await trio.testing.wait_all_tasks_blocked()
            assert provider.vendor.live() == ()
            assert await store.open_attempts() == []
            if not scope.cancelled_caught:
                finished = True
                break
        states = [run.state for run in await store.runs(limit=1000)]
    assert finished
    assert ticks > 10
    assert set(states) == {"cancelled", "finished"}
    assert states.count("finished") == 1


@pytest.mark.parametrize("after", [0.5, 1.5])
async def test_cancelled_and_closed(autojump_clock: MockClock, store: SqliteStore, after: float) -> None:
    """A client that is closed by a cancellation has let go of everything by the time it is closed."""
    provider = ReferenceProvider("only", start_seconds=1.0)
    with trio.move_on_after(after):
        async with opened(store, provider) as client:
            await client.run("sleep 5", "python")
    assert provider.vendor.live() == ()


async def test_cancelled_create_is_finished_first(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A create under way is not aborted by a cancellation: its sandbox is awaited and destroyed."""
    provider = ReferenceProvider("only", start_seconds=10.0)
    async with opened(store, provider) as client:
        with trio.move_on_after(1):
            await client.run("out a", "python")
        assert trio.current_time() == 1.0
        assert len(provider.vendor.live()) == 1
        await trio.sleep(20)
        assert provider.vendor.live() == ()
        assert [call.at for call in provider.vendor.log if call.step == "destroy"] == [10.0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_interrupted(autojump_clock: MockClock, store: SqliteStore, error: type[BaseException]) -> None:
    """Ctrl-C in the middle of a run releases its sandbox before it goes on."""
    provider = ReferenceProvider("only")

    def interrupt(_: Output) -> None:
        raise error

    with pytest.raises(error):
        async with opened(store, provider) as client:
            await client.run("out a", "python", on_output=interrupt)
    assert provider.vendor.live() == ()


@pytest.mark.parametrize("kind", ["provider-down", "hang"])
async def test_destroy_fails(autojump_clock: MockClock, store: SqliteStore, kind: str) -> None:
    """A sandbox that could not be destroyed is reported as open, with the most that it can still cost."""
    first, inner, _ = pair(Fault(step="destroy", kind=kind))
    async with opened(store, first) as client:
        result = await client.run("out a\nsleep 1", "python")
        (attempt,) = result.attempts
        assert (result.stdout, attempt.open, len(inner.vendor.live())) == (b"a\n", True, 1)
        assert attempt.exposure is not None
        assert result.cost is not None
        assert result.cost_open == attempt.exposure - result.cost > 0
        (row,) = await store.open_attempts()
        assert (row.state, row.sandbox) == ("releasing", attempt.sandbox)


async def test_box_is_in_the_journal(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Before a sandbox is handed out, its id is durable and it counts as perhaps started: a successor can find it."""
    provider = ReferenceProvider("only")
    async with opened(store, provider) as client, client.sandbox() as box:
        (row,) = await store.open_attempts()
        assert (row.sandbox, row.state, row.outcome) == (box.id, "started", "maybe-started")


async def test_box_cancelled(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A sandbox whose context is cancelled while it is made, or while a program runs, is destroyed."""
    provider = ReferenceProvider("only", start_seconds=1.0)
    async with opened(store, provider) as client:
        for after in (0.0, 0.5, 1.5):
            with trio.move_on_after(after) as scope:
                async with client.sandbox() as box:
                    await box.run(argv=["sleep", "100"])
            assert scope.cancelled_caught
            await trio.sleep(5)
            assert provider.vendor.live() == ()
            assert await store.open_attempts() == []
            assert "running" not in {run.state for run in await store.runs()}


# --- backstops --------------------------------------------------------------------------------------------


class Unbounded:
    """A provider that ignores the deadline and the output limit of every command."""

    def __init__(self, inner: ReferenceProvider) -> None:
        self.inner = inner
        self.name, self.traits, self.rates = inner.name, inner.traits, inner.rates

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Any]:
        """Those of the provider behind it."""
        return self.inner.offers(spec, facts)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Session]:
        """A session whose sandboxes know no bounds."""
        async with self.inner.connect() as session:
            create = session.create

            async def unbounded(order: Order) -> Any:
                sandbox = await create(order)
                return UnboundedSandbox(sandbox)

            session.create = unbounded  # type: ignore[method-assign]
            yield session


class UnboundedSandbox:
    """A sandbox that ignores bounds."""

    def __init__(self, inner: Any) -> None:
        self.id, self.native, self.destroy = inner.id, inner.native, inner.destroy
        self._inner = inner

    async def start(self, command: Command) -> Process:
        """The program, without bounds."""
        process: Process = await self._inner.start(attrs.evolve(command, timeout=1e6, output_limit=2**40))
        return process


async def test_deadline_backstop(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A program that its provider lets run past its deadline is killed by the engine, and the exit says `deadline`."""
    provider = Unbounded(ReferenceProvider("lax"))
    async with opened(store, provider) as client:
        result = await client.run("out a\nsleep 1000\nout b", "python", timeout=10)
        assert (result.exit.kind, result.exit.status, result.stdout) == ("deadline", 124, b"a\n")
        assert trio.current_time() == pytest.approx(15.0)
        assert "kill" in {call.step for call in provider.inner.vendor.log}


async def test_output_backstop(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Output beyond its limit is cut off exactly there by the engine, and the exit says `output-limit`."""
    provider = Unbounded(ReferenceProvider("lax"))
    async with opened(store, provider) as client:
        result = await client.run("err 123\nflood 100000", "python", output_limit=70_000)
        assert (result.exit.kind, len(result.stdout), result.stderr) == ("output-limit", 70_000 - 4, b"123\n")
        assert provider.inner.vendor.live() == ()


async def test_output_at_its_limit(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Output of exactly its limit is no more than allowed."""
    provider = Unbounded(ReferenceProvider("lax"))
    async with opened(store, provider) as client:
        result = await client.run("flood 100", "python", output_limit=100)
        assert (result.exit.ok, len(result.stdout)) == (True, 100)


# --- the journal ------------------------------------------------------------------------------------------


async def ledger_of(store: SqliteStore, run_id: str) -> list[tuple[str, str, Decimal]]:
    """Number of the attempt, kind and amount of each movement."""
    found = await store.run(run_id)
    assert found is not None
    return [(row.attempt.rpartition("-")[2], row.kind, row.amount) for row in found[2]]


async def test_journal_of_a_success(autojump_clock: MockClock, store: SqliteStore) -> None:
    """After a success the journal has the result, the released attempt, and the reservation released and settled."""
    provider = ReferenceProvider("only", start_seconds=1.0)
    async with opened(store, provider) as client:
        result = await client.run("out a\nsleep 2\nexit 3", "python")
        found = await store.run(result.id)
        assert found is not None
        run, (attempt,), _ = found
        assert (run.state, run.provider, run.exit, run.cost, run.title) == ("finished", "only", 3, result.cost, "python")
        assert (attempt.state, attempt.outcome, attempt.id) == ("released", "finished", result.attempts[0].marker)
        assert attempt.sandbox == result.attempts[0].sandbox
        assert (attempt.create_seconds, attempt.start_seconds) == (1.0, 1.0)
        assert attempt.exposure is not None
        assert result.cost == provider.vendor.owed() == Decimal("0.000033")
        assert await ledger_of(store, result.id) == [
            ("1", "reserve", attempt.exposure),
            ("1", "release", attempt.exposure),
            ("1", "settle", result.cost),
        ]


async def test_journal_of_a_failover(autojump_clock: MockClock, store: SqliteStore) -> None:
    """What was reserved for an attempt that made nothing is released by the time its run has ended."""
    first, _, second = pair(Fault(step="create", kind="capacity"))
    async with opened(store, first, second) as client:
        result = await client.run("out a", "python")
        exposure = result.attempts[0].exposure
        assert exposure is not None
        movements = await ledger_of(store, result.id)
        assert ("1", "release", exposure) in movements
        assert {kind for number, kind, _ in movements if number == "1"} == {"reserve", "release"}


async def test_journal_of_a_failure(autojump_clock: MockClock, store: SqliteStore) -> None:
    """After a failure the journal has the error of the run and of each attempt, and nothing stays reserved."""
    first, _, _ = pair(Fault(step="create", kind="capacity"))
    async with opened(store, first) as client:
        with pytest.raises(RunFailed) as caught:
            await client.run("out a", "python")
        (listed,) = await store.runs()
        found = await store.run(listed.id)
        assert found is not None
        run, (attempt,), _ = found
        assert (run.state, run.exit, run.provider) == ("failed", None, None)
        assert json.loads(run.result or "")["error"] == {"class": "RunFailed", "message": str(caught.value)}
        assert (attempt.state, attempt.error_class, attempt.outcome) == ("absent", "CapacityError", "not-started")
        assert await ledger_of(store, run.id) == [
            ("1", "reserve", attempt.exposure),
            ("1", "release", attempt.exposure),
        ]


async def test_journal_of_a_lost_program(autojump_clock: MockClock, store: SqliteStore) -> None:
    """After a lost program whose sandbox was destroyed, its reservation is settled to what it cost."""
    first, inner, _ = pair(Fault(step="events", kind="stream-lost", items=0, times=9), start_seconds=1.0)
    async with opened(store, first) as client:
        with pytest.raises(OutcomeUnknown) as caught:
            await client.run("out a\nsleep 5\nout b", "python")
        run_id = caught.value.plan.request.id
        exposure = caught.value.attempts[0].exposure
        assert await ledger_of(store, run_id) == [
            ("1", "reserve", exposure),
            ("1", "release", exposure),
            ("1", "settle", inner.vendor.owed()),
        ]


async def test_journal_of_an_ambiguous_create(autojump_clock: MockClock, store: SqliteStore) -> None:
    """What may exist stays reserved."""
    first, _, _ = pair(Fault(step="create", kind="ambiguous", committed=True))
    async with opened(store, first) as client:
        with pytest.raises(RunFailed) as caught:
            await client.run("out a", "python")
        assert [kind for _, kind, _ in await ledger_of(store, caught.value.plan.request.id)] == ["reserve"]


@pytest.mark.parametrize(("after", "outcome"), [(0.5, "not-started"), (1.5, "maybe-started")])
async def test_journal_of_a_cancellation(autojump_clock: MockClock, store: SqliteStore, after: float, outcome: str) -> None:
    """A cancelled run ends in the journal too, with its sandbox released."""
    provider = ReferenceProvider("only", start_seconds=1.0)
    async with opened(store, provider) as client:
        with trio.move_on_after(after):
            await client.run("sleep 9", "python")
        await trio.sleep(3)
        (listed,) = await store.runs()
        found = await store.run(listed.id)
        assert found is not None
        run, (attempt,), _ = found
        assert (run.state, attempt.state, attempt.outcome) == ("cancelled", "released", outcome)
        assert "cancelled" in (run.result or "")


async def test_refused_run_leaves_no_row(autojump_clock: MockClock, store: SqliteStore) -> None:
    """Nothing is stored of a run that no provider may take."""
    async with opened(store, ReferenceProvider("only", declines=("runtime-missing", "no python"))) as client:
        with pytest.raises(Exception, match="no python"):
            await client.run("out a", "python")
        assert await store.runs() == []


@pytest.mark.parametrize(("keep", "code", "output"), [("everything", True, True), ("nothing", False, False)])
async def test_keep(autojump_clock: MockClock, store: SqliteStore, keep: str, code: bool, output: bool) -> None:
    """`keep = "nothing"` stores neither code nor output, input, files, environment or arguments."""
    secrets = ["CODE-X", "STDIN-X", "FILE-X", "ENV-X", "ARG-X"]
    spec = SandboxSpec(files={"data": b"FILE-X"}, env={"NAME": "ENV-X"})
    async with opened(store, ReferenceProvider("only"), keep=keep) as client:
        result = await client.run(
            "# CODE-X\nout OUTPUT-X\nread data", "python", args=["ARG-X"], stdin="STDIN-X", spec=spec, outputs=["data"]
        )
        assert (result.stdout, result.outputs) == (b"OUTPUT-X\nFILE-X", {"data": b"FILE-X"})
        found = await store.run(result.id)
        assert found is not None
        stored = " ".join(filter(None, (found[0].request, found[0].plan, found[0].result)))
        assert all((secret in stored) == code for secret in secrets)
        assert ("OUTPUT-X" in stored) == output


# --- secrets ----------------------------------------------------------------------------------------------


async def test_secrets_are_masked_where_they_are_recorded(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A secret's value reaches the program and the caller, and never the journal."""
    spec = SandboxSpec(secrets=["TOKEN"])
    async with opened(store, ReferenceProvider("only"), plugins=[Sources(TOKEN="hunter2")]) as client:
        result = await client.run("env TOKEN\nout fine", "python", spec=spec)
        assert result.stdout == b"hunter2\nfine\n"
        found = await store.run(result.id)
        assert found is not None
        assert "fine" in (found[0].result or "")
        assert "hunter2" not in repr(found)


class Leaky(ReferenceProvider):
    """A provider whose errors quote the secrets that it was given."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Session]:
        """A session that fails."""
        async with super().connect() as session:

            async def create(order: Order) -> Any:
                raise ProviderDown(f"bad request: {dict(order.secrets)}")

            session.create = create  # type: ignore[method-assign]
            yield session


async def test_secrets_in_errors(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A vendor's error that quotes a secret is masked in the journal, in the events and in what is raised."""
    listener = Listener()
    with pytest.raises(RunFailed) as caught:
        async with opened(store, Leaky("leaky"), plugins=[Sources(TOKEN="hunter2"), listener]) as client:
            try:
                await client.run("out a", "python", spec=SandboxSpec(secrets=["TOKEN"]))
            finally:
                (run,) = await store.runs()
                found = await store.run(run.id)
                assert "TOKEN" in repr(found)
                assert "hunter2" not in repr(found)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(listener.events)


async def test_unknown_secret(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A secret that no source has is the caller's mistake, and nothing is created or stored."""
    provider = ReferenceProvider("only")
    async with opened(store, provider, plugins=[Sources(OTHER="x")]) as client:
        with pytest.raises(InvalidInput, match=r"spec\.secrets: expected .*, got 'TOKEN'"):
            await client.run("out a", "python", spec=SandboxSpec(secrets=["TOKEN"]))
        with pytest.raises(InvalidInput, match=r"spec\.secrets"):
            async with client.sandbox(SandboxSpec(secrets=["TOKEN"])):
                pass
        assert not [call for call in provider.vendor.log if call.step == "create"]
        assert await store.runs() == []


# --- plugins ----------------------------------------------------------------------------------------------


async def test_limits_are_never_ignored(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A limit that this version cannot reserve against refuses the run."""

    class Plugin:
        """Sets a limit."""

        @hookimpl
        def sandstorm_limits(self, request: Request) -> list[Limit]:
            """One limit."""
            return [Limit(key=f"tenant:{request.tenant}", kind="concurrency", count=1)]

    provider = ReferenceProvider("only")
    async with opened(store, provider, plugins=[Plugin()]) as client:
        with pytest.raises(NotSupported, match=r"tenant:acme.*cannot be enforced"):
            await client.run("out a", "python", tenant="acme")
        assert provider.vendor.log == []


async def test_price_plugin_after_instant_runs(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A plugin's price stays usable once programs were seen to end in no time at all."""

    class Plugin:
        """Prices by the second."""

        @hookimpl
        def sandstorm_price(self, request: Request, candidate: Candidate, usage: Usage) -> Decimal:
            """A cent for a predicted second."""
            return Decimal(repr(usage.seconds)) / 100

    async with opened(store, ReferenceProvider("only"), plugins=[Plugin()]) as client:
        for _ in range(2):
            result = await client.run("out a", "python")
            assert result.cost == 0
            high = result.plan.candidates[0].candidate.quote.high
            assert high is not None
            assert high == pytest.approx(Decimal("4.2"))


async def test_price_of_a_plugin_is_settled_by_the_second(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A plugin's price for the predicted time is charged for the time that it took."""

    class Plugin:
        """Prices by the second."""

        @hookimpl
        def sandstorm_price(self, request: Request, candidate: Candidate, usage: Usage) -> Decimal:
            """A cent for a predicted second."""
            return Decimal(repr(usage.seconds)) / 100

    async with opened(store, ReferenceProvider("only"), plugins=[Plugin()]) as client:
        assert (await client.run("sleep 7", "python")).cost == Decimal("0.07")


async def test_broken_strategy(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A strategy that drops a candidate, returns something else or raises is named, and nothing is created."""

    @attrs.frozen
    class Broken:
        """Ranks as told."""

        name: str
        answer: Callable[[Sequence[Candidate]], Any]

        def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Any:
            """Something wrong."""
            return self.answer(candidates)

    broken = [
        Broken("drops", lambda candidates: [Ranked(c, "") for c in candidates[1:]]),
        Broken("doubles", lambda candidates: [Ranked(candidates[0], "")] * len(candidates)),
        Broken("bare", lambda candidates: candidates),
        Broken("none", lambda candidates: None),
        Broken("raises", lambda candidates: candidates[99]),
    ]

    class Plugin:
        """Has the strategies."""

        @hookimpl
        def sandstorm_strategies(self) -> list[Broken]:
            """All of them."""
            return broken

    first, second = ReferenceProvider("first"), ReferenceProvider("second")
    async with opened(store, first, second, plugins=[Plugin()]) as client:
        for strategy in broken:
            with pytest.raises(PluginError, match=rf"plugin '{strategy.name}' \(rank\)"):
                await client.run("out a", "python", strategy=strategy.name)
        assert await store.runs() == []


# --- events and knowledge ---------------------------------------------------------------------------------


async def test_events(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A sink receives what happened in its order, and is flushed once as the client closes."""
    listener = Listener()
    first, _, second = pair(Fault(step="create", kind="capacity"))
    async with opened(store, first, second, plugins=[listener]) as client:
        result = await client.run("out a", "python")
    assert [type(event) for event in listener.events] == [
        RunPlanned,
        AttemptOpened,
        AttemptClosed,
        AttemptOpened,
        SandboxBound,
        ProgramStarted,
        AttemptClosed,
        RunFinished,
    ]
    assert {event.run for event in listener.events} == {result.id}
    assert listener.flushed == 1


async def test_events_of_a_refusal(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A run that nobody may take is told as refused."""
    listener = Listener()
    async with opened(store, ReferenceProvider("only"), plugins=[listener]) as client:
        with pytest.raises(Exception, match="pins"):
            await client.run("out a", "python", constraints=Constraints(pin="other"))
    (event,) = listener.events
    assert isinstance(event, RunRefused)
    assert event.by == "NoCandidate"


async def test_slow_sink(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A sink that takes its time never holds up a run, gets everything in order, and one batch at a time."""
    listener = Listener(seconds=2.0)
    async with opened(store, ReferenceProvider("only"), plugins=[listener]) as client:
        for _ in range(5):
            await client.run("out a", "python")
        assert trio.current_time() == 0.0
    assert len(listener.events) == 5 * 6
    assert [event.at for event in listener.events] == sorted(event.at for event in listener.events)
    assert (listener.overlapped, listener.flushed) == (False, 1)


async def test_stuck_sink(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A sink that never returns delays closing by no more than its deadline."""
    listener = Listener(seconds=1e9)
    async with opened(store, ReferenceProvider("only"), plugins=[listener]) as client:
        for _ in range(300):
            await client.run("out a", "python")
        assert trio.current_time() == 0.0
    assert trio.current_time() <= 5.0


async def test_sinks_are_flushed_after_an_error(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A sink is flushed as well where the block of the client ends by an exception."""
    listener = Listener()
    with pytest.raises(ZeroDivisionError):
        async with opened(store, ReferenceProvider("only"), plugins=[listener]) as client:
            await client.run("out a", "python")
            raise ZeroDivisionError
    assert (len(listener.events), listener.flushed) == (6, 1)


async def test_learned_starts(autojump_clock: MockClock, store: SqliteStore) -> None:
    """What a start took, the set-up of the sandbox included, is what the next plan predicts."""
    slow = ReferenceProvider("only", start_seconds=4.0)
    slow.traits = attrs.evolve(slow.traits, start_p50=0.1, start_p95=0.2)
    async with opened(store, slow) as client:
        before = (await client.plan("out a", "python")).candidates[0].candidate.latency
        await client.run("sleep 6", "python")
        plan = await client.plan("out a", "python")
        after = plan.candidates[0].candidate
        assert (before.p50, before.p95, before.source) == (0.1, 0.2, "in memory")
        assert (after.latency.p50, after.latency.p95, after.latency.source) == (4.0, 4.0, "observed")
        assert (before.weight, after.latency.weight) == (0.0, 1.0)
        assert after.quote.usage.seconds == 6.0


async def test_knowledge_moves_the_choice(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A provider that turned out to be slow is no longer put first by `fastest`."""
    boaster = ReferenceProvider("boaster", start_seconds=4.0)
    boaster.traits = attrs.evolve(boaster.traits, start_p50=0.1, start_p95=0.1)
    steady = ReferenceProvider("steady", start_seconds=1.0)
    async with opened(store, boaster, steady) as client:
        ran = [(await client.run("out a", "python", strategy="fastest")).provider for _ in range(2)]
    assert ran == ["boaster", "steady"]


async def test_only_the_providers_faults_are_learned(autojump_clock: MockClock, store: SqliteStore) -> None:
    """A cancellation and a caller's mistake are no failures of the provider; its own are."""
    seen: list[float] = []

    @attrs.frozen
    class Watching:
        """Notes the failure rate that it is shown."""

        name: str = "watching"

        def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> list[Ranked]:
            """The candidates as they are."""
            seen.append(knowledge.of("first", "default", None).failure_rate)
            return [Ranked(candidate, "as it is") for candidate in candidates]

    class Plugin:
        """Has the strategy."""

        @hookimpl
        def sandstorm_strategies(self) -> list[Watching]:
            """It."""
            return [Watching()]

    first, _, _ = pair(Fault(step="create", kind="invalid-spec"), Fault(step="create", kind="capacity", after=2))
    async with opened(store, first, plugins=[Plugin()], strategy="watching") as client:
        with pytest.raises(InvalidSpec):
            await client.run("out a", "python")
        with trio.move_on_after(1):
            await client.run("sleep 9", "python")
        await client.plan("out a", "python")
        with pytest.raises(RunFailed):
            await client.run("out a", "python")
        await client.plan("out a", "python")
    assert seen[2] == 0.0
    assert seen[4] > 0.0


async def test_output_as_it_comes(autojump_clock: MockClock, store: SqliteStore) -> None:
    """`on_output` is called with each piece as it comes, and the result has all of it."""
    pieces: list[tuple[float, str, bytes]] = []

    def note(output: Output) -> None:
        pieces.append((trio.current_time(), output.stream, output.data))

    async with opened(store, ReferenceProvider("only")) as client:
        result: RunResult = await client.run("out a\nsleep 1\nerr b", "python", on_output=note)
    assert pieces == [(0.0, "stdout", b"a\n"), (1.0, "stderr", b"b\n")]
    assert (result.stdout, result.stderr) == (b"a\n", b"b\n")
