"""One try at one candidate: intent, create, start, output, release, each step written down before it is risked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs
import trio

from sandstorm._capture import Again, Capture, capture
from sandstorm._errors import (
    Ambiguous,
    BudgetExhausted,
    CallerError,
    InvalidInput,
    PreparationFailed,
    ProviderError,
    SandboxLost,
    SandstormError,
)
from sandstorm._events import AttemptClosed, AttemptOpened, AttemptReaped, Preparing, ProgramStarted, SandboxBound
from sandstorm._journal import key_of, masked, movement
from sandstorm._plan import Candidate, Plan
from sandstorm._program import Program, with_files
from sandstorm._quote import NANO, ZERO, cost
from sandstorm._result import Attempt, Outcome
from sandstorm._spec import own_snapshot
from sandstorm._store import AttemptRow, LedgerRow, LimitReached, RunRow
from sandstorm.provider import Command, Gate, OneShot, Order, Output, Prepare, Process, Reconnect, Sandbox, Session, Snapshot

if TYPE_CHECKING:
    from sandstorm._engine import Engine

Made = TypeVar("Made")

CREATE_SECONDS = 120.0
"""How long a create may take before its answer counts as lost."""

PREPARE_SECONDS = 900.0
"""How long an environment may take to build."""

TRANSFER_SECONDS = 120.0
"""How long the files of a run may take, up or down."""

RESENDS = (0.2, 1.0)
"""Seconds before each time that a start is sent again whose answer was lost."""

RELEASE_SECONDS = 30.0
"""How long a destroy may take before the sandbox is reported as left open."""


class Failed(Exception):
    """An attempt that ended without a result. `started` says whether the program may have begun."""

    def __init__(self, cause: Exception, *, started: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.started = started

    @property
    def movable(self) -> bool:
        """Whether the next candidate may be tried, as far as the class of the error decides it."""
        return not isinstance(self.cause, CallerError) and getattr(self.cause, "failover", True)


class GivenUp(Exception):
    """The caller does not wait for the attempt any more: no fault of the provider's."""


def given_up(exc: BaseException) -> Exception:
    """What is written down of an attempt that ended by an exception of the router's or the caller's own."""
    if isinstance(exc, trio.Cancelled):
        return GivenUp("cancelled by the caller")
    return exc if isinstance(exc, Exception) else GivenUp(f"cancelled by {type(exc).__name__}")


@attrs.define
class Trial:
    """One try at one candidate, and what is known of it so far. `failed` are those that came before."""

    engine: Engine
    plan: Plan
    candidate: Candidate
    row: AttemptRow
    secrets: dict[str, str] = attrs.field(repr=False)
    began: float = attrs.field(factory=trio.current_time)
    sandbox: Sandbox | None = None
    abandoned: bool = False
    spent: Decimal | None = ZERO
    failed: tuple[Attempt, ...] = ()
    retry_after: float | None = None
    dispatch_by: float = attrs.field(factory=lambda: trio.current_time() + CREATE_SECONDS)

    # --- steps -------------------------------------------------------------------------------------------

    async def open(self, run: RunRow) -> None:
        """Makes the intent and the reservation durable: nothing is asked of the vendor before."""
        exposure = self.row.exposure
        reserved = None if not exposure else self._move("reserve", exposure, "exposure")
        await self.engine.store.begin(run, self.row, reserved, key_of(self.plan.request), self.plan.limits)
        row = self.row
        self._emit(AttemptOpened, attempt=row.id, provider=row.provider, offer=row.offer, region=row.region)

    async def create(self, files: dict[str, bytes]) -> Sandbox:
        """The sandbox, bound in the journal. Raises `Failed`."""
        session = await self._session()
        await self._prepare(session)
        order = self.order(files)
        return await self.bind(lambda: session.create(order))

    async def bind(self, create: Callable[[], Awaitable[Sandbox]]) -> Sandbox:
        """The sandbox that `create` makes, bound in the journal. Raises `Failed`."""
        sandbox = await self._dispatched(create)
        self.sandbox = sandbox
        self._bound(sandbox)
        return sandbox

    async def keep(self) -> None:
        """Makes the sandbox's id durable before it is handed out: the caller may start programs in it from then on."""
        self._set(state="started", outcome=Outcome.MAYBE_STARTED.value)
        if not await self.engine.store.update(self.row, durable=True):
            raise Failed(SandboxLost("another router took this run over"), started=False)

    async def launch(self, program: Program) -> Process:
        """The program, started as the main process of a new sandbox. Raises `Failed`, perhaps started."""
        session = await self._session()
        assert isinstance(session, OneShot)
        await self._prepare(session)
        order = self.order(program.files)
        sandbox, process = await self._dispatched(lambda: session.launch(order, program.commands[-1]), starts=True)
        self.sandbox = sandbox
        self._bound(sandbox)
        self._started()
        return process

    async def start(self, sandbox: Sandbox, command: Command) -> Process:
        """The program, started. The start is durable before it is asked for. Raises `Failed`, perhaps started."""
        await self.keep()
        try:
            process = await self._begun(sandbox, command)
        except Failed:
            raise
        except Exception as exc:
            never = isinstance(exc, ProviderError | CallerError) and not isinstance(exc, Ambiguous) and not _lost(exc)
            if never:
                self._set(outcome=Outcome.NOT_STARTED.value)
            raise Failed(exc, started=not never) from exc
        self._started()
        return process

    async def _begun(self, sandbox: Sandbox, command: Command) -> Process:
        """What the start gives. One whose answer is lost is sent again, which its id makes harmless; then its gate is burned."""
        try:
            return await sandbox.start(command)
        except Ambiguous as lost:
            for pause in RESENDS:
                await trio.sleep(pause)
                try:
                    return await sandbox.start(command)
                except (ProviderError, CallerError) as exc:
                    self.engine.log.info("%s: %s was sent again: %s", self.row.provider, command.start_id, self._told(exc))
                    if not isinstance(exc, Ambiguous):
                        break
            if self.candidate.offer.can("Gate") and isinstance(sandbox, Gate):
                with suppress(ProviderError, CallerError):
                    if await sandbox.burn(command.start_id):
                        self._set(outcome=Outcome.NOT_STARTED.value)
                        raise Failed(lost, started=False) from lost
            raise

    async def follow(self, process: Process, command: Command, on_output: Callable[[Output], None] | None) -> Capture:
        """What the program writes until it ends. Raises `Failed`, started."""
        try:
            return await capture(process, command, on_output, self.again(self.sandbox))
        except Exception as exc:
            raise Failed(exc, started=True) from exc

    def again(self, sandbox: Sandbox | None) -> Again | None:
        """What takes up the output of a running program there, or None where nothing can."""
        if not self.candidate.offer.can("Reconnect") or not isinstance(sandbox, Reconnect):
            return None
        return sandbox.process

    async def fetch(self, sandbox: Sandbox, paths: Sequence[str]) -> dict[str, bytes]:
        """The contents of those files that exist."""
        found = {}
        try:
            with trio.fail_after(TRANSFER_SECONDS):
                for path in paths:
                    try:
                        async with sandbox.download(path) as chunks:
                            found[path] = b"".join([chunk async for chunk in chunks])
                    except FileNotFoundError:
                        continue
        except Exception as exc:
            raise Failed(exc, started=True) from exc
        return found

    async def bind_process(self, process: Process) -> None:
        """Makes the id of a detached program durable before the run's id is shown."""
        self._set(process=process.id)
        if not await self.engine.store.update(self.row, durable=True):
            raise Failed(SandboxLost("another router took this run over"), started=True)

    async def ended(self, booked: Decimal | None = None) -> None:
        """Writes down that its vendor does not have it any more, and what it cost at most.

        `booked` is what was settled for it when it was closed before; None where it was not.
        """
        late = max(0.0, self.engine.wall() - self.row.expires_at)
        self.began += late
        self.spent = self.cost()
        self._set(state="released")
        rows = self._settled(self.spent)
        if booked is not None:
            more = (self.spent or ZERO) - booked
            rows = [self._move("settle", more, "estimated")] if more > 0 else []
        await self.engine.store.update(self.row, rows, durable=True)
        self._emit(AttemptReaped, attempt=self.row.id, provider=self.row.provider, cost=self.spent)

    async def absent(self) -> None:
        """Writes down that nothing came of it, and lets the reservation go."""
        self._set(state="absent")
        await self.engine.store.update(self.row, self._settled(ZERO), durable=True)

    async def lost(self, cause: Exception) -> None:
        """Writes down that it is gone with what its program did unknown."""
        self._set(error=self._told(cause), error_class=type(cause).__name__)
        await self.ended()

    async def prolong(self, expires_at: float, exposure: Decimal | None) -> None:
        """Makes a later end of its life durable, and what that may cost reserved: the vendor is asked after it."""
        row = self.row
        before, now = row.exposure or ZERO, exposure or ZERO
        more = [self._move("reserve", now - before, "exposure")] if now > before else []
        self._set(expires_at=max(expires_at, self.row.expires_at), exposure=max(before, now) if exposure is not None else None)
        try:
            owned = await self.engine.store.update(self.row, more, durable=True)
        except LimitReached as reached:
            self.row = row
            raise BudgetExhausted(str(reached)) from None
        if not owned:
            raise SandboxLost("another router took this sandbox over")

    async def snapshot(self, run: RunRow, capturing: Snapshot, retention: float) -> str:
        """The name of a snapshot of the sandbox, which has a row of its own, durable before it is asked for."""
        at = self.engine.wall()
        row = attrs.evolve(
            self.row,
            id=f"ss-{self.engine.new_id()}",
            number=self.row.number,
            kind="snapshot",
            state="intent",
            sandbox=None,
            dispatch_by=at + CREATE_SECONDS,
            expires_at=at + retention,
            exposure=ZERO if self.row.exposure == ZERO else None,
            created_at=at,
            kept=True,
            process=None,
        )
        await self.engine.store.begin(run, row, None)
        try:
            with trio.fail_after(TRANSFER_SECONDS):
                made = await capturing.snapshot(row.id, retention)
        except BaseException as exc:
            nothing = isinstance(exc, ProviderError | CallerError) and not isinstance(exc, Ambiguous)
            state = "absent" if nothing else "ambiguous"
            failed = attrs.evolve(row, state=state, error_class=type(exc).__name__)
            with trio.CancelScope(shield=True):
                await self.engine.store.update(failed, durable=True)
            raise
        await self.engine.store.update(attrs.evolve(row, state="bound", sandbox=made), durable=True)
        return f"{row.provider}/{made}"

    async def release(self) -> None:
        """Destroys the sandbox, shielded and bounded; what could not be destroyed stays open in the journal.

        The reservation is released, and the cost settled, only with a confirmed destroy.
        """
        if self.sandbox is None:
            return
        self.engine.busy.add(self.row.id)
        try:
            await self._destroy(self.sandbox)
        finally:
            self.engine.busy.discard(self.row.id)
            if self.row.state != "released":
                self.engine.reconciler.wake()

    async def _destroy(self, sandbox: Sandbox) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + RELEASE_SECONDS) as scope:
            try:
                await sandbox.destroy()
            except Exception as exc:
                self.engine.log.warning("%s: could not destroy %s: %s", self.row.provider, sandbox.id, self._told(exc))
            else:
                await self._released()
        if scope.cancelled_caught:
            self.engine.log.warning("%s: no answer to the destroy of %s", self.row.provider, sandbox.id)

    async def _released(self) -> None:
        """Writes down a confirmed destroy, with what was spent until it was confirmed: the vendor bills the destroy, too.

        Where the journal does not answer, whether it is written is not known: the reconciler looks, and books what is not.
        """
        spent = self.cost()
        released = attrs.evolve(self.row, state="released")
        try:
            await self.engine.store.update(released, self._settled(spent), durable=False)
        except CallerError as exc:
            self.engine.log.warning("the release of %s could not be written down: %s", self.row.id, exc)
        else:
            self.row, self.spent = released, spent

    async def fail(self, failed: Failed) -> Attempt:
        """Writes down how the attempt failed and lets go of what it made; the attempt as the caller sees it."""
        ambiguous = self.sandbox is None and isinstance(failed.cause, Ambiguous)
        nothing = self.sandbox is None and not ambiguous
        self._set(
            state="ambiguous" if ambiguous else "absent" if nothing else "releasing",
            outcome=(Outcome.MAYBE_STARTED if failed.started else Outcome.NOT_STARTED).value,
            error=self._told(failed.cause),
            error_class=type(failed.cause).__name__,
        )
        self.retry_after = getattr(failed.cause, "retry_after", None)
        if self.sandbox is not None:
            self.spent = self.cost()
        with trio.CancelScope(shield=True):
            await self.engine.store.update(self.row, self._settled(ZERO) if nothing else (), durable=True)
        if ambiguous:
            self.engine.reconciler.wake()
        await self.release()
        self.closed()
        return self.attempt

    # --- what is known -----------------------------------------------------------------------------------

    @property
    def attempt(self) -> Attempt:
        """The attempt as the caller sees it."""
        row = self.row
        return Attempt(
            provider=row.provider,
            offer=row.offer,
            marker=row.id,
            sandbox=row.sandbox,
            outcome=Outcome(row.outcome),
            error=row.error,
            error_class=row.error_class,
            create_seconds=row.create_seconds,
            start_seconds=row.start_seconds,
            open=row.state not in ("released", "absent"),
            exposure=row.exposure,
            cost=self.spent,
        )

    def cost(self) -> Decimal | None:
        """US dollars for the time since the create was asked for, or None where the price is unknown."""
        expected = self.candidate.quote.expected
        if expected is None:
            return None
        if not expected:
            return expected
        provider = self.engine.accounts.providers[self.row.provider]
        seconds = trio.current_time() - self.began
        if provider.rates is None or self.candidate.quote.source == "plugin":
            usage = self.candidate.quote.usage
            return (expected * Decimal(repr(seconds / usage.seconds))).quantize(NANO)
        return cost(provider.rates, self.candidate.offer, seconds, self.candidate.quote.usage.utilisation)

    def finish(self) -> None:
        """Marks the result as known and the release as begun; what is spent until now is what it cost."""
        self.spent = self.cost()
        self._set(state="releasing", outcome=Outcome.FINISHED.value)

    def closed(self) -> None:
        """Tells the event sinks that the attempt ended."""
        attempt = self.attempt
        self._emit(
            AttemptClosed,
            attempt=attempt.marker,
            provider=attempt.provider,
            offer=attempt.offer,
            region=self.row.region,
            outcome=attempt.outcome,
            error=attempt.error_class,
            retry_after=self.retry_after,
            open=attempt.open,
        )

    # --- inside ------------------------------------------------------------------------------------------

    def _set(self, **changes: Any) -> None:
        self.row = attrs.evolve(self.row, **changes)

    async def _session(self) -> Session:
        try:
            return await self.engine.accounts.session(self.row.provider)
        except Exception as exc:
            raise Failed(exc, started=False) from exc

    async def _prepare(self, session: Session) -> None:
        """Builds the environment, where it takes building and is not there yet. The time to send counts from its end."""
        environment = self.plan.request.spec.environment
        wanted = environment.requirements or environment.image is not None
        if not wanted or not self.candidate.offer.can("Prepare") or not isinstance(session, Prepare):
            return
        self._emit(Preparing, provider=self.row.provider, environment=environment)
        try:
            with trio.fail_after(PREPARE_SECONDS):
                await session.prepare(environment, f"{self.row.id}-e")
        except trio.TooSlowError as exc:
            failure = PreparationFailed(f"the environment was not built within {PREPARE_SECONDS:g} s")
            raise Failed(failure, started=False) from exc
        except Exception as exc:
            raise Failed(exc, started=False) from exc
        await self._postpone()

    async def _postpone(self) -> None:
        """Moves the time to send to the end of a preparation, durably: absence is concluded from it."""
        at = self.engine.wall() + CREATE_SECONDS
        self.dispatch_by = trio.current_time() + CREATE_SECONDS
        self._set(dispatch_by=at, expires_at=at + self.plan.request.lifetime)
        if not await self.engine.store.update(self.row, durable=True):
            raise Failed(SandboxLost("another router took this run over"), started=False)

    def order(self, files: dict[str, bytes]) -> Order:
        """What is asked of the vendor. Raises `Failed` where a file of the caller's is in the way of one of ours."""
        try:
            spec = own_snapshot(with_files(self.plan.request.spec, files))
        except InvalidInput as exc:
            raise Failed(exc, started=False) from exc
        return Order(
            spec=spec,
            offer=self.candidate.offer,
            marker=self.row.id,
            dispatch_by=self.dispatch_by,
            lifetime=self.plan.request.lifetime,
            keep=self.plan.request.keep,
            secrets=self.secrets,
        )

    async def _dispatched(self, call: Callable[[], Awaitable[Made]], *, starts: bool = False) -> Made:
        """What the create gives. The engine's nursery finishes it even if the caller is cancelled, and then destroys it."""
        creating = Creating(call, self)
        self.engine.background.start_soon(creating.finish)
        try:
            await creating.done.wait()
        except BaseException:
            self.abandoned = creating.abandoned = True
            if creating.done.is_set():  # both in one tick: nobody else will look at the answer
                self.engine.background.start_soon(creating.undo)
            raise
        if creating.error is None and creating.made is not None:
            return creating.made
        assert creating.error is not None
        # Without a program in it, a create starts nothing, however it ends.
        started = starts and (isinstance(creating.error, Ambiguous) or _lost(creating.error))
        raise Failed(creating.error, started=started) from creating.error

    def _bound(self, sandbox: Sandbox) -> None:
        seconds = trio.current_time() - self.began
        # It was made before now, so that the lifetime that was asked for ends no later than this.
        expires_at = self.engine.wall() + self.plan.request.lifetime
        self._set(state="bound", sandbox=sandbox.id, create_seconds=seconds, expires_at=expires_at)
        self._emit(SandboxBound, attempt=self.row.id, provider=self.row.provider, sandbox=sandbox.id, seconds=seconds)

    def _started(self) -> None:
        row, offer = self.row, self.candidate.offer
        seconds = trio.current_time() - self.began
        self._set(state="started", outcome=Outcome.MAYBE_STARTED.value, start_seconds=seconds)
        self._emit(
            ProgramStarted,
            attempt=row.id,
            provider=row.provider,
            offer=row.offer,
            region=offer.region,
            seconds=seconds,
        )

    def _settled(self, cost: Decimal | None) -> list[LedgerRow]:
        """What moves once nothing more can be billed: the reservation goes, the cost comes."""
        if not self.row.exposure or cost is None:
            return []
        released = self._move("release", self.row.exposure, "exposure")
        return [released, self._move("settle", cost, "estimated")] if cost else [released]

    def _told(self, exc: Exception) -> str:
        """What is written down of an error: without secrets, short and on one line."""
        text = str(exc) if isinstance(exc, SandstormError) else f"{type(exc).__name__}: {exc}"
        return " ".join(masked(text, self.secrets.values()).split())[:500]

    def _move(self, kind: str, amount: Decimal, basis: str) -> LedgerRow:
        return movement(self.plan, self.row.id, self.row.provider, kind, amount, basis, self.engine.wall())

    def _emit(self, kind: type, **fields: object) -> None:
        request = self.plan.request
        self.engine.emit(kind(at=self.engine.wall(), run=request.id, tenant=request.tenant, **fields))


@attrs.define
class Creating(Generic[Made]):
    """A create under way. It is never aborted: an answer that nobody waits for any more is destroyed."""

    call: Callable[[], Awaitable[Made]]
    trial: Trial
    done: trio.Event = attrs.field(factory=trio.Event)
    made: Made | None = None
    error: Exception | None = None
    abandoned: bool = False

    async def finish(self) -> None:
        """Runs the create to its end, whatever became of its caller."""
        with trio.CancelScope(shield=True):
            try:
                with trio.fail_after(CREATE_SECONDS):
                    self.made = await self.call()
            except trio.TooSlowError:
                self.error = Ambiguous(f"no answer to the create within {CREATE_SECONDS:g} s")
            except SandstormError as exc:
                self.error = exc
            except Exception as exc:
                # An adapter that lets a foreign error through says nothing about whether the vendor acted.
                self.error = Ambiguous(f"{type(exc).__name__}: {exc}")
                self.error.__cause__ = exc
            self.done.set()
            if self.abandoned:
                await self.undo()

    async def undo(self) -> None:
        """Destroys what was made for a caller that is gone."""
        if self.made is None:
            await self.trial.fail(Failed(self.error or Ambiguous("cancelled"), started=False))
            return
        self.trial.sandbox = self.made[0] if isinstance(self.made, tuple) else self.made  # type: ignore[assignment]
        await self.trial.fail(Failed(GivenUp("cancelled by the caller"), started=isinstance(self.made, tuple)))


def _lost(exc: Exception) -> bool:
    return bool(getattr(exc, "started", False))
