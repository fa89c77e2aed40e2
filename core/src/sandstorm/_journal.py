"""What the engine writes down: rows of the store from values, as far as the settings let it keep them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import attrs

from sandstorm._converter import to_json
from sandstorm._masker import Masker
from sandstorm._plan import Plan, Request
from sandstorm._result import RunResult
from sandstorm._spec import SandboxSpec
from sandstorm._store import KeyRow, LedgerRow, RunRow
from sandstorm._task import Task


@attrs.frozen
class Recorder:
    """Encodes what is kept.

    Attributes:
        keep: `everything`; `results`: no code, input, files and environment; `nothing`: no output either.
    """

    keep: str = "everything"

    def planned(self, plan: Plan, secrets: Iterable[str]) -> RunRow:
        """The row of a run that has its plan; the values of secrets are masked in it, where the caller wrote them out."""
        values = tuple(secrets)
        request = _masked_request(plan.request, Masker(values)) if values else plan.request
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

    def finished(self, row: RunRow, result: RunResult, secrets: Iterable[str]) -> RunRow:
        """The row of a run that has its result; the values of secrets are masked in it."""
        if self.keep == "nothing":
            kept = attrs.evolve(result, stdout=b"", stderr=b"", outputs=dict.fromkeys(result.outputs, b""), artifacts=())
        else:
            mask = Masker(secrets)
            kept = attrs.evolve(
                result,
                stdout=mask.data(result.stdout),
                stderr=mask.data(result.stderr),
                outputs=_masked_files(result.outputs, mask),
                artifacts=tuple(
                    attrs.evolve(artifact, name=mask.text(artifact.name), data=mask.data(artifact.data))
                    for artifact in result.artifacts
                ),
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


def key_of(request: Request) -> KeyRow | None:
    """The idempotency key of a request, with the digest of what it asks for; None where it has none."""
    if request.key is None:
        return None
    asked = to_json([request.task, attrs.evolve(request.spec, labels={})])
    fingerprint = hashlib.sha256(asked.encode()).hexdigest()
    return KeyRow(tenant=request.tenant, key=request.key, run=request.id, fingerprint=fingerprint)


def masked(text: str, secrets: Iterable[str]) -> str:
    """The text without the values of secrets, which vendors' errors may quote."""
    return Masker(secrets).text(text)


def _masked_request(request: Request, mask: Masker) -> Request:
    task = None if request.task is None else _masked_task(request.task, mask)
    return attrs.evolve(request, task=task, spec=_masked_spec(request.spec, mask))


def _masked_task(task: Task, mask: Masker) -> Task:
    return attrs.evolve(
        task,
        code=None if task.code is None else mask.text(task.code),
        argv=[mask.text(part) for part in task.argv],
        args=[mask.text(part) for part in task.args],
        stdin=mask.data(task.stdin),
    )


def _masked_spec(spec: SandboxSpec, mask: Masker) -> SandboxSpec:
    return attrs.evolve(
        spec,
        env={name: mask.text(value) for name, value in spec.env.items()},
        labels={name: mask.text(value) for name, value in spec.labels.items()},
        files=_masked_files(spec.files, mask),
        provider_options=_masked_options(spec.provider_options, mask),
    )


def _masked_options(value: Any, mask: Masker) -> Any:
    """Free-form data, with every text in it masked."""
    if isinstance(value, str):
        return mask.text(value)
    if isinstance(value, Mapping):
        return {name: _masked_options(item, mask) for name, item in value.items()}
    return [_masked_options(item, mask) for item in value] if isinstance(value, (list, tuple)) else value


def _masked_files(files: Mapping[str, bytes], mask: Masker) -> dict[str, bytes]:
    return {path: mask.data(contents) for path, contents in files.items()}


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
