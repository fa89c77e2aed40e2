"""Idempotency keys: of a tenant's runs with one key one is started, and the others follow it to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from sandstorm._converter import decode, from_json
from sandstorm._errors import Conflict, OutcomeUnknown
from sandstorm._journal import key_of
from sandstorm._plan import Plan, Request
from sandstorm._result import Attempt, Outcome, RunResult
from sandstorm._store import OPEN_STATES, AttemptRow, KeyRow, RunRow
from sandstorm.provider import Output

if TYPE_CHECKING:
    from sandstorm._engine import Engine

SOONEST, LATEST = 0.02, 1.0
"""Seconds between two looks at the run that is followed."""


async def followed(
    engine: Engine, request: Request, held: KeyRow, on_output: Callable[[Output], None] | None
) -> RunResult | None:
    """What came of the run that holds the key, waited for; None where it ended without having started anything.

    Ending this early leaves that run alone. Raises `Conflict` where the key is in use for something else, and
    `OutcomeUnknown` where its result is lost.
    """
    run, attempts = await _ended(engine, followed_id(request, held))
    if run.state == "finished" and run.plan and run.result:
        return stored_result(run, on_output)
    if run.state in ("failed", "cancelled") and all(row.outcome == Outcome.NOT_STARTED.value for row in attempts):
        return None
    raise OutcomeUnknown([_attempt(row) for row in attempts], from_json(Plan, run.plan or ""))


def followed_id(request: Request, held: KeyRow) -> str:
    """The id of the run that holds the key. Raises `Conflict` where that is one of something else."""
    wanted = key_of(request)
    assert wanted is not None
    if held.fingerprint != wanted.fingerprint:
        raise Conflict(f"the idempotency key {held.key!r} is in use for another program or machine, by run {held.run}")
    return held.run


async def _ended(engine: Engine, run_id: str) -> tuple[RunRow, Sequence[AttemptRow]]:
    """The run once it has ended; the end of one whose router died is written down here."""
    pause = SOONEST
    while True:
        found = await engine.store.run(run_id)
        assert found is not None
        run, attempts, _ = found
        if run.state != "running":
            return run, attempts
        if not any(row.state in OPEN_STATES for row in attempts):
            living = await engine.store.living({row.epoch for row in attempts})
            if not living:
                await engine.reconciler.conclude(run, attempts)
                continue
        await trio.sleep(pause)
        pause = min(pause * 2, LATEST)


def stored_result(run: RunRow, on_output: Callable[[Output], None] | None) -> RunResult:
    """The result as it was stored; its output is handed out again."""
    document = {**json.loads(run.result or "{}"), "plan": json.loads(run.plan or "{}")}
    result = decode(RunResult, document)
    if on_output is not None:
        for stream in ("stdout", "stderr"):
            if data := getattr(result, stream):
                on_output(Output(stream, data, 0))
    return result


def _attempt(row: AttemptRow) -> Attempt:
    return Attempt(
        provider=row.provider,
        offer=row.offer,
        marker=row.id,
        sandbox=row.sandbox,
        outcome=Outcome(row.outcome),
        error=row.error,
        error_class=row.error_class,
        open=row.state in OPEN_STATES,
        exposure=row.exposure,
        cost=None,
    )
