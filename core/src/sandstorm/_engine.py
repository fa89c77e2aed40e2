"""One run, forwards only: decode, admit, offers and quotes, screen, rank, plan, attempts, result."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from secrets import token_hex
from typing import TypeVar

import attrs
import trio

from sandstorm._accounts import Accounts
from sandstorm._attempt import CREATE_SECONDS, Failed, Trial, given_up
from sandstorm._capture import Capture
from sandstorm._constraints import Constraints
from sandstorm._errors import BudgetExhausted, InvalidInput, NoCandidate, OutcomeUnknown, RunFailed, SandstormError
from sandstorm._events import Event, RunFinished, RunPlanned, RunRefused
from sandstorm._journal import Recorder
from sandstorm._keys import followed
from sandstorm._languages import Languages
from sandstorm._masker import scrub
from sandstorm._observatory import Observatory
from sandstorm._plan import Plan, Ranked, Request
from sandstorm._planner import Planner
from sandstorm._plugins import Plugins
from sandstorm._program import Program, fitted, not_compiled, program
from sandstorm._quote import ZERO
from sandstorm._reconciler import Reconciler
from sandstorm._result import Attempt, Outcome, RunResult
from sandstorm._secrets import resolve
from sandstorm._settings import Settings, default_store_url
from sandstorm._sinks import Sinks
from sandstorm._spec import SandboxSpec
from sandstorm._store import AttemptRow, KeyTaken, LimitReached, RunRow, Store
from sandstorm._task import Task
from sandstorm.provider import FULL, Command, Output, Provider, Sandbox

OVERHEAD_SECONDS = 120.0
"""Life that a sandbox is given beyond its program's timeout: for files, and for the destroy to arrive."""

OnOutput = Callable[[Output], None]
Made = TypeVar("Made")
Use = Callable[[Trial, RunRow], Awaitable[Made]]


@attrs.define
class Listener:
    """The caller's callback for output. What it raises is the caller's own error and says nothing of the provider."""

    _call: OnOutput
    error: Exception | None = None

    def __call__(self, output: Output) -> None:
        """Hands one piece of output on."""
        try:
            self._call(output)
        except Exception as exc:
            self.error = exc
            raise


@attrs.define
class Engine:
    """Routes requests over the configured accounts. Made by `open_engine`.

    `epoch` is this router's among all over its journal; `busy` are the attempts that it releases just now.
    """

    settings: Settings
    plugins: Plugins
    planner: Planner
    store: Store
    accounts: Accounts
    languages: Languages
    sinks: Sinks
    background: trio.Nursery
    wall: Callable[[], float]
    recorder: Recorder
    epoch: int
    busy: set[str] = attrs.field(factory=set)
    observatory: Observatory = attrs.field(factory=Observatory)
    log: logging.Logger = attrs.field(factory=lambda: logging.getLogger("sandstorm"))
    reconciler: Reconciler = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.reconciler = Reconciler(self)

    # --- deciding ----------------------------------------------------------------------------------------

    def request(
        self,
        task: Task | None,
        spec: SandboxSpec,
        constraints: Constraints,
        strategy: str | None = None,
        tenant: str = "default",
        lifetime: float | None = None,
        *,
        keep: bool = False,
        key: str | None = None,
    ) -> Request:
        """A decoded call. Raises `InvalidInput` for a language or snapshot that cannot be."""
        if spec.snapshot is not None and not all(spec.snapshot.partition("/")):
            raise InvalidInput("snapshot", "the name of a snapshot, such as local/ss-1a2b", spec.snapshot)
        if task is not None:
            spec = fitted(spec, task, self.languages)
            program(task, self.languages, "")
        return Request(
            id=self.new_id(),
            task=task,
            spec=spec,
            constraints=constraints,
            strategy=strategy or self.settings.strategy,
            tenant=tenant,
            lifetime=lifetime or (task.timeout if task else 3600.0) + OVERHEAD_SECONDS,
            keep=keep,
            key=key,
        )

    def new_id(self) -> str:
        """An id that nothing had before, and that sorts by time."""
        return f"{int(self.wall() * 1_000_000):014x}{token_hex(5)}"

    async def plan(self, request: Request) -> Plan:
        """The decision; runs nothing. Raises `Denied`. A plan without candidates says why in its exclusions."""
        try:
            limits = self.planner.admit(request)
        except SandstormError as exc:
            self.emit(RunRefused(at=self.wall(), run=request.id, tenant=request.tenant, by=type(exc).__name__, reason=str(exc)))
            raise
        invited, excluded = self.planner.invite(request)
        facts = await self.accounts.facts([provider.name for provider in invited])
        return self.planner.plan(request, invited, excluded, facts, self.observatory.knowledge, self.wall(), limits)

    # --- running -----------------------------------------------------------------------------------------

    async def run(self, request: Request, on_output: OnOutput | None = None) -> RunResult:
        """What came of the program.

        Raises `Denied`, `NoCandidate`, `RunFailed` (it did not start), `OutcomeUnknown` (it may have run), and the
        caller's mistakes as the provider names them.
        """
        began = trio.current_time()
        listener = None if on_output is None else Listener(on_output)
        while True:
            try:
                return await self.first(request, lambda trial, row: self._try(trial, row, began, listener), listener)
            except KeyTaken as taken:
                result = await followed(self, request, taken.held, on_output)
                if result is not None:
                    return result

    async def first(self, request: Request, use: Use[Made], listener: Listener | None = None, plan: Plan | None = None) -> Made:
        """What `use` makes of the first candidate of the plan that does not fail. Raises as `run` does."""
        plan = plan or await self.planned(request)
        secret_values = await self.secrets(request.spec.secrets)
        row = self.recorder.planned(plan, secret_values.values())
        failed: list[Attempt] = []
        refused: list[str] = []
        for number, ranked in enumerate(plan.candidates, 1):
            trial = self.trial(plan, ranked, number, secret_values)
            trial.failed = tuple(failed)
            try:
                return await use(trial, row)
            except KeyTaken:
                raise
            except LimitReached as reached:
                refused.append(f"{ranked.candidate.provider}: {reached}")
            except Failed as failure:
                if listener is None or listener.error is not failure.cause:  # what the caller's own code raises is its own
                    scrub(failure.cause, secret_values.values())
                failed.append(await trial.fail(failure))
                error = self._verdict(failure, failed, plan, listener)
                if error is not None:
                    await self.give_up(row, error, secret_values)
                    raise error from (None if error is failure.cause else failure.cause)
            except BaseException as exc:
                # Ctrl-C comes this way too, and what a store raises: the sandbox is released whatever it was.
                state = "cancelled" if isinstance(exc, trio.Cancelled) else "failed"
                with trio.CancelScope(shield=True):
                    if not trial.abandoned:
                        # By its outcome: a journal that fails after the program has ended does not undo that.
                        begun = trial.row.state != "intent" and trial.row.outcome != Outcome.NOT_STARTED.value
                        started = begun and request.task is not None
                        await trial.fail(Failed(given_up(exc), started=started))
                    await self.give_up(row, given_up(exc), secret_values, state)
                raise
        if not failed:
            exhausted = BudgetExhausted("; ".join(refused))
            run, tenant = request.id, request.tenant
            self.emit(RunRefused(at=self.wall(), run=run, tenant=tenant, by="BudgetExhausted", reason=str(exhausted)))
            raise exhausted
        started = any(attempt.outcome is Outcome.MAYBE_STARTED for attempt in failed)
        ended: Exception = OutcomeUnknown(failed, plan) if started else RunFailed(failed, plan)
        await self.give_up(row, ended, secret_values)
        raise ended

    def _verdict(self, failure: Failed, failed: Sequence[Attempt], plan: Plan, listener: Listener | None) -> Exception | None:
        """What the caller is told of a failed attempt; None where the next candidate is tried."""
        if listener is not None and listener.error is not None:
            return listener.error
        task = plan.request.task
        if failure.started and task is not None and task.effects == "unknown":
            return OutcomeUnknown(failed, plan)
        return None if failure.movable else failure.cause

    async def planned(self, request: Request) -> Plan:
        """The decision, where there is something to try. Raises `Denied`, `NoCandidate`."""
        plan = await self.plan(request)
        at, run, tenant = self.wall(), request.id, request.tenant
        if not plan.candidates:
            refused = NoCandidate(plan)
            self.emit(RunRefused(at=at, run=run, tenant=tenant, by="NoCandidate", reason=str(refused)))
            raise refused
        names = tuple(ranked.candidate.provider for ranked in plan.candidates)
        self.emit(RunPlanned(at=at, run=run, tenant=tenant, candidates=names, excluded=len(plan.exclusions)))
        return plan

    def trial(self, plan: Plan, ranked: Ranked, number: int, secret_values: dict[str, str]) -> Trial:
        """One try at a candidate, not yet written down."""
        candidate, at = ranked.candidate, self.wall()
        row = AttemptRow(
            id=f"ss-{plan.request.id}-{number}",
            run=plan.request.id,
            number=number,
            provider=candidate.provider,
            offer=candidate.offer.id,
            region=candidate.offer.region or "",
            dispatch_by=at + CREATE_SECONDS,
            expires_at=at + CREATE_SECONDS + plan.request.lifetime,
            exposure=candidate.quote.high,
            created_at=at,
            epoch=self.epoch,
            kept=plan.request.keep,
        )
        return Trial(engine=self, plan=plan, candidate=candidate, row=row, secrets=secret_values)

    async def _try(self, trial: Trial, row: RunRow, began: float, on_output: OnOutput | None) -> RunResult:
        task = trial.plan.request.task
        assert task is not None
        prepared = program(task, self.languages, trial.row.id)
        one_shot = trial.candidate.offer.abilities.get("OneShot") == FULL and len(prepared.commands) == 1 and not task.outputs
        if one_shot:
            # The program starts with the create, so the intent itself says that it may have started.
            trial.row = attrs.evolve(trial.row, outcome=Outcome.MAYBE_STARTED.value)
        await trial.open(row)
        started = trio.current_time()
        if one_shot:
            process = await trial.launch(prepared)
            got = await trial.follow(process, prepared.commands[0], on_output)
            outputs: dict[str, bytes] = {}
        else:
            got = await self.steps(trial, prepared, on_output)
            outputs = await trial.fetch(trial.sandbox, task.outputs) if trial.sandbox and task.outputs else {}
        return await self.finish(trial, row, got, outputs, (began, started))

    async def steps(self, trial: Trial, prepared: Program, on_output: OnOutput | None) -> Capture:
        """Compile steps and the program in one sandbox; stops at the first step that does not succeed."""
        sandbox = await trial.create(prepared.files)
        *compiling, running = prepared.commands
        failed = await self.compiled(trial, sandbox, compiling)
        return failed or await trial.follow(await trial.start(sandbox, running), running, on_output)

    async def compiled(self, trial: Trial, sandbox: Sandbox, commands: Sequence[Command]) -> Capture | None:
        """What the first compile step said that did not succeed, or None where all did."""
        for command in commands:
            got = await trial.follow(await trial.start(sandbox, command), command, None)
            assert got.exit is not None
            if not got.exit.ok:
                got.exit = not_compiled(got.exit)
                return got
        return None

    async def finish(
        self,
        trial: Trial,
        row: RunRow,
        got: Capture,
        outputs: dict[str, bytes],
        times: tuple[float, float],
    ) -> RunResult:
        """The result, written down, with the sandbox released. `times` are trio's at the call and at the start."""
        assert got.exit is not None
        began, started = times
        now = trio.current_time()
        start = trial.row.start_seconds
        run_seconds = now - started if start is None else max(0.0, now - trial.began - start)
        trial.finish()
        attempts = (*trial.failed, trial.attempt)
        money = total_cost(attempts)
        offer = trial.candidate.offer
        result = RunResult(
            id=row.id,
            stdout=bytes(got.stdout),
            stderr=bytes(got.stderr),
            exit=got.exit,
            outputs=outputs,
            artifacts=tuple(got.artifacts),
            outcome=Outcome.FINISHED,
            provider=trial.row.provider,
            isolation=offer.isolation,
            isolation_detail=offer.isolation_detail,
            total_seconds=now - began,
            run_seconds=run_seconds,
            cost=money,
            cost_open=open_cost(attempts),
            attempts=attempts,
            plan=trial.plan,
        )
        with trio.CancelScope(shield=True):
            done = self.recorder.finished(row, result, tuple(trial.secrets.values()))
            await self.store.finish(done, trial.row, ())
            await trial.release()
        trial.closed()
        language = trial.plan.request.spec.environment.language
        if language is not None:
            self.store.observe_nowait([self.observatory.learn_duration(language, run_seconds)])
        self.emit(
            RunFinished(
                at=self.wall(),
                run=row.id,
                tenant=row.tenant,
                provider=result.provider,
                exit=result.exit,
                seconds=result.total_seconds,
                cost=money,
            )
        )
        attempts = (*trial.failed, trial.attempt)
        total_seconds = trio.current_time() - began
        cost, left = total_cost(attempts), open_cost(attempts)
        return attrs.evolve(result, attempts=attempts, cost=cost, cost_open=left, total_seconds=total_seconds)

    async def give_up(self, row: RunRow, error: Exception, secrets: Mapping[str, str], state: str = "failed") -> None:
        """Writes down that a run has no result, and why."""
        if isinstance(error, OutcomeUnknown):
            state = "unknown"
        ended = attrs.evolve(row, state=state, result=self.recorder.error(error, secrets.values()))
        with trio.CancelScope(shield=True):
            await self.store.finish(ended, None, ())

    async def secrets(self, names: Sequence[str]) -> dict[str, str]:
        """The values of secrets, looked up now. Raises `InvalidInput` for one that no source has."""
        return await resolve(names, self.plugins.secrets())

    # --- events ------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Tells plugins and sinks, and learns from it. Never fails and never waits."""
        changed = self.observatory.learn(event)
        if changed:
            self.store.observe_nowait(changed)
        self.plugins.observe(event)
        self.sinks.put_nowait(event)


def total_cost(attempts: Sequence[Attempt]) -> Decimal | None:
    """What all attempts have cost so far, or None where a price is unknown."""
    costs = [attempt.cost for attempt in attempts]
    return None if None in costs else sum(filter(None, costs), ZERO)


def open_cost(attempts: Sequence[Attempt]) -> Decimal | None:
    """The most that open attempts may still add, or None where a price is unknown."""
    left = [(attempt.exposure, attempt.cost) for attempt in attempts if attempt.open]
    if any(exposure is None or cost is None for exposure, cost in left):
        return None
    return sum((max(ZERO, (exposure or ZERO) - (cost or ZERO)) for exposure, cost in left), ZERO)


async def _outliving(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery that a cancellation of the client does not reach: releasing sandboxes needs its sessions."""
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            task_status.started(nursery)
            await trio.sleep_forever()


CLOSE_SECONDS = 60.0
"""How long closing waits for creates under way and destroys; what is left then is in the journal."""


@asynccontextmanager
async def open_engine(
    settings: Settings,
    plugins: Plugins,
    *,
    store: Store | None = None,
    wall: Callable[[], float] = time.time,
) -> AsyncIterator[Engine]:
    """An engine over the loaded plugins."""
    store = store or plugins.store(settings.store or default_store_url())
    providers: tuple[Provider, ...] = plugins.providers()
    planner = Planner(providers=providers, plugins=plugins, strategies=plugins.strategies(), invited=tuple(settings.providers))
    async with store.open(), store.enlisted() as epoch, trio.open_nursery() as outer:
        sessions = await outer.start(_outliving)
        try:
            accounts = Accounts(providers, sessions, store, wall)
            accounts.restore(await store.facts())
            sinks = Sinks(plugins.sinks())
            sessions.start_soon(sinks.deliver)
            observatory = Observatory()
            observatory.restore(await store.observations())
            try:
                with trio.CancelScope() as closing:
                    async with trio.open_nursery() as background:
                        engine = Engine(
                            settings=settings,
                            plugins=plugins,
                            planner=planner,
                            store=store,
                            accounts=accounts,
                            languages=plugins.languages(),
                            sinks=sinks,
                            background=background,
                            wall=wall,
                            recorder=Recorder(settings.keep),
                            epoch=epoch,
                            observatory=observatory,
                        )
                        sessions.start_soon(engine.reconciler.serve)
                        try:
                            yield engine
                        finally:
                            closing.deadline = trio.current_time() + CLOSE_SECONDS
            finally:
                with trio.CancelScope(shield=True):
                    await sinks.close()
        finally:
            sessions.cancel_scope.cancel()
