"""What the engine writes down: rows of the store from values, as far as the settings let it keep them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from decimal import Decimal

import attrs

from sandstorm._converter import to_json
from sandstorm._plan import Plan, Request
from sandstorm._result import RunResult
from sandstorm._store import LedgerRow, RunRow
from sandstorm._task import Task

MASK = b"***"


@attrs.frozen
class Recorder:
    """Encodes what is kept.

    Attributes:
        keep: `everything`; `results`: no code, input, files and environment; `nothing`: no output either.
    """

    keep: str = "everything"

    def planned(self, plan: Plan) -> RunRow:
        """The row of a run that has its plan."""
        request = plan.request
        kept = self._request(request)
        plan = attrs.evolve(plan, request=kept)
        return RunRow(
            id=request.id,
            tenant=request.tenant,
            created_at=plan.at,
            title=title(request),
            request=to_json(kept),
            plan=to_json(plan),
        )

    def finished(self, row: RunRow, result: RunResult, secrets: Sequence[str]) -> RunRow:
        """The row of a run that has its result; the values of secrets are masked in it."""
        kept = attrs.evolve(
            result,
            stdout=self._output(result.stdout, secrets),
            stderr=self._output(result.stderr, secrets),
            outputs={path: self._output(data, secrets) for path, data in result.outputs.items()},
            artifacts=() if self.keep == "nothing" else result.artifacts,
        )
        # Without the plan, which the row has already: encoding it is the larger part of the work.
        document = {field.name: getattr(kept, field.name) for field in attrs.fields(RunResult) if field.name != "plan"}
        return attrs.evolve(
            row,
            state="finished",
            result=to_json(document),
            provider=result.provider,
            exit=result.exit.status,
            seconds=result.total_seconds,
            cost=result.cost,
        )

    def error(self, error: Exception, secrets: Iterable[str]) -> str:
        """What is stored of a run that has no result; the values of secrets are masked in it."""
        return json.dumps({"error": {"class": type(error).__name__, "message": masked(str(error), secrets)}})

    def _request(self, request: Request) -> Request:
        if self.keep == "everything":
            return request
        task = request.task
        if task is not None:
            task = Task(
                code=None if task.code is None else "",
                language=task.language,
                argv=task.argv[:1],
                timeout=task.timeout,
                output_limit=task.output_limit,
                effects=task.effects,
            )
        return attrs.evolve(request, task=task, spec=attrs.evolve(request.spec, files={}, env={}))

    def _output(self, data: bytes, secrets: Sequence[str]) -> bytes:
        if self.keep == "nothing":
            return b""
        for secret in secrets:
            if secret:
                data = data.replace(secret.encode(), MASK)
        return data


def masked(text: str, secrets: Iterable[str]) -> str:
    """The text without the values of secrets, which vendors' errors may quote."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, MASK.decode())
    return text


def title(request: Request) -> str:
    """What people see of a run in a list: its language or command."""
    if request.task is None:
        return "sandbox"
    return request.task.language or request.task.argv[0]


def movement(plan: Plan, attempt: str, provider: str, kind: str, amount: Decimal, basis: str, at: float) -> LedgerRow:
    """A movement of money for an attempt of the plan's run."""
    return LedgerRow(
        attempt=attempt,
        run=plan.request.id,
        tenant=plan.request.tenant,
        provider=provider,
        kind=kind,
        amount=amount,
        basis=basis,
        at=at,
    )
