"""What outlives the router that made it: kept sandboxes and detached runs, found again by another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import TYPE_CHECKING

import attrs
import trio

from sandstorm._attempt import CREATE_SECONDS, Failed, Trial
from sandstorm._box import Box, held
from sandstorm._capture import capture
from sandstorm._converter import from_json
from sandstorm._engine import Listener, OnOutput
from sandstorm._errors import (
    CallerError,
    InvalidInput,
    NotSupported,
    OutcomeUnknown,
    ProviderError,
    SandboxGone,
    SandboxLost,
)
from sandstorm._keys import followed_id, stored_result
from sandstorm._plan import Plan, Request
from sandstorm._program import program
from sandstorm._result import RunResult
from sandstorm._store import AttemptRow, KeyTaken, RunRow
from sandstorm.provider import Process, Reconnect, ResourceInfo, Sandbox

if TYPE_CHECKING:
    from sandstorm._engine import Engine

COLLECT_SECONDS = 600.0
"""How long the output of a detached run can be collected after its timeout, by default."""


@attrs.frozen(kw_only=True)
class KeptSandbox:
    """A sandbox that outlives its router.

    Attributes:
        id: The vendor's id.
        run: The id of the run that made it.
        provider: The account.
        tenant: Its tenant.
        title: `sandbox`, or the language or command of a detached run.
        state: The vendor's word for its state; `unknown` where the account does not answer.
        created_at: Wall-clock seconds since 1970.
        expires_at: Likewise: when it ends at the latest.
        idle: Seconds without activity, or None where the vendor does not say.
        cost: US dollars so far, or None where the price is unknown.
        most: US dollars that it can cost in all, or None where the price is unknown.
        labels: Those of its spec.
    """

    id: str
    run: str
    provider: str
    tenant: str
    title: str
    state: str
    created_at: float
    expires_at: float
    idle: float | None
    cost: Decimal | None
    most: Decimal | None
    labels: dict[str, str] = attrs.field(factory=dict)


async def detach(engine: Engine, request: Request) -> str:
    """Starts the program of a request that is kept, and gives the id of its run, for `attach`.

    Returns once it has been started; compile steps are waited for. Raises as `Engine.run` does, and `RunFailed` with what a
    compile step said.
    """
    task = request.task
    assert task is not None

    async def begin(trial: Trial, row: RunRow) -> str:
        *compiling, running = program(task, engine.languages, trial.row.id).commands
        await trial.open(row)
        sandbox = await trial.create(program(task, engine.languages, trial.row.id).files)
        refused = await engine.compiled(trial, sandbox, compiling)
        if refused is not None:
            said = bytes(refused.stderr or refused.stdout).decode(errors="replace").strip()
            raise Failed(InvalidInput("code", "a program that compiles", said[-500:]), started=False)
        process = await trial.start(sandbox, attrs.evolve(running, detached=True))
        await trial.bind_process(process)
        return row.id

    try:
        return await engine.first(request, begin)
    except KeyTaken as taken:
        return followed_id(request, taken.held)


async def attach(engine: Engine, run_id: str, on_output: OnOutput | None = None) -> RunResult:
    """What came of a detached run, whose output comes from its beginning. Ending this early leaves it running.

    Raises `InvalidInput` for a run that is not known or was not detached, and `OutcomeUnknown` where its sandbox is gone.
    """
    run, attempts = await _stored(engine, run_id)
    if run.state == "finished" and run.result and run.plan:
        return stored_result(run, on_output)
    row = next((each for each in attempts if each.process is not None and each.kind == "sandbox"), None)
    if row is None or row.sandbox is None or row.process is None or run.plan is None:
        raise InvalidInput("run", "a run that was detached", run_id)
    trial = await _trial(engine, run, row)
    task = trial.plan.request.task
    assert task is not None
    try:
        sandbox = await _reached(engine, row)
        process = await _process(sandbox, row)
        trial.sandbox = sandbox
        command = program(task, engine.languages, row.id).commands[-1]
        listener = None if on_output is None else Listener(on_output)
        got = await capture(process, command, listener, trial.again(sandbox))
    except (SandboxGone, SandboxLost) as exc:
        await trial.lost(exc)
        unknown = OutcomeUnknown([trial.attempt], trial.plan)
        await engine.give_up(run, unknown, trial.secrets)
        raise unknown from exc
    outputs = await trial.fetch(sandbox, task.outputs)
    return await engine.finish(trial, run, got, outputs, (trial.began, trial.began + (row.start_seconds or 0.0)))


@asynccontextmanager
async def reopen(engine: Engine, name: str) -> AsyncIterator[Box]:
    """A kept sandbox by its id or the id of its run. It is let be at the end. Raises `InvalidInput`, `SandboxGone`."""
    rows = [row for row in await engine.store.open_attempts() if row.kept and row.kind == "sandbox"]
    row = next((row for row in rows if name in (row.sandbox, row.id, row.run)), None)
    if row is None:
        raise InvalidInput("sandbox", "the id of a sandbox that is kept", name)
    run, _ = await _stored(engine, row.run)
    trial = await _trial(engine, run, row)
    trial.sandbox = await _reached(engine, row)
    async with held(engine, trial, trial.sandbox, run, f"{engine.new_id()[-10:]}-") as box:
        yield box


async def kept_sandboxes(engine: Engine) -> tuple[KeptSandbox, ...]:
    """Every kept sandbox of the journal, asked for now. What has ended by itself is settled and left out."""
    rows = [row for row in await engine.store.open_attempts() if row.kept and row.kind == "sandbox" and row.sandbox]
    began = engine.wall()
    seen = {name: await _seen(engine, name) for name in {row.provider for row in rows}}
    kept = []
    for row in rows:
        run, _ = await _stored(engine, row.run)
        trial = await _trial(engine, run, row, secrets=False)
        found = seen[row.provider]
        info = None if found is None else found.get(row.id)
        if found is not None and info is None and began >= _shown_by(engine, row):
            await trial.ended()
            continue
        kept.append(_kept(trial, run, info))
    return tuple(kept)


def _shown_by(engine: Engine, row: AttemptRow) -> float:
    """From when on a look-up has to show it, on the wall clock: before, that it is not listed says nothing."""
    lag = engine.accounts.providers[row.provider].traits.find_lag.seconds
    return row.created_at + (CREATE_SECONDS if row.create_seconds is None else row.create_seconds) + lag


def _kept(trial: Trial, run: RunRow, info: ResourceInfo | None) -> KeptSandbox:
    row = trial.row
    assert row.sandbox is not None
    return KeptSandbox(
        id=row.sandbox,
        run=row.run,
        provider=row.provider,
        tenant=run.tenant,
        title=run.title,
        state="unknown" if info is None else info.state,
        created_at=row.created_at,
        expires_at=row.expires_at,
        idle=None if info is None else info.idle,
        cost=trial.cost(),
        most=row.exposure,
        labels=trial.plan.request.spec.labels,
    )


async def _seen(engine: Engine, account: str) -> dict[str, ResourceInfo] | None:
    """What an account has, by marker; None where it does not answer: a look-up that failed is no sighting."""
    try:
        session = await engine.accounts.session(account)
        async with session.find() as found:
            return {info.marker: info async for info in found if info.marker is not None}
    except (ProviderError, CallerError, KeyError) as exc:
        engine.log.warning("%s: could not look up what is there: %s", account, exc)
        return None


async def _stored(engine: Engine, run_id: str) -> tuple[RunRow, Sequence[AttemptRow]]:
    found = await engine.store.run(run_id)
    if found is None:
        raise InvalidInput("run", "the id of a stored run, or the beginning of one", run_id)
    run, attempts, _ = found
    return run, attempts


async def _trial(engine: Engine, run: RunRow, row: AttemptRow, *, secrets: bool = True) -> Trial:
    """The attempt as it stands in the journal. The values of its secrets are looked up anew, if they are needed."""
    plan = from_json(Plan, run.plan or "")
    offers = [ranked for ranked in plan.candidates if ranked.candidate.provider == row.provider]
    ranked = next(ranked for ranked in offers if ranked.candidate.offer.id == row.offer)
    began = trio.current_time() - (engine.wall() - row.created_at)
    values = await engine.secrets(plan.request.spec.secrets) if secrets else {}
    return Trial(engine=engine, plan=plan, candidate=ranked.candidate, row=row, secrets=values, began=began)


async def _reached(engine: Engine, row: AttemptRow) -> Sandbox:
    if row.provider not in engine.accounts.providers:
        raise InvalidInput("sandbox", f"the account {row.provider} in the settings, since it runs there", row.sandbox)
    session = await engine.accounts.session(row.provider)
    assert row.sandbox is not None
    return await session.attach(row.sandbox)


async def _process(sandbox: Sandbox, row: AttemptRow) -> Process:
    if not isinstance(sandbox, Reconnect):
        raise NotSupported(f"{row.provider} cannot take up the output of a running program")
    assert row.process is not None
    try:
        return await sandbox.process(row.process, {})
    except LookupError as exc:
        raise SandboxGone(str(exc)) from exc
