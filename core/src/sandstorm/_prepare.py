"""Environments built ahead of the runs that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from sandstorm._errors import NotSupported
from sandstorm._events import Preparing
from sandstorm._plan import Request
from sandstorm.provider import Prepare

if TYPE_CHECKING:
    from sandstorm._engine import Engine


PLANNED_SECONDS = 300.0
"""The life of the run for which an environment is prepared, as far as the choice of the provider goes: a task's default."""


@attrs.frozen(kw_only=True)
class Prepared:
    """An environment that is ready.

    Attributes:
        provider: The account that has it.
        name: The vendor's name of it.
        seconds: How long that took; next to nothing where it was there.
    """

    provider: str
    name: str
    seconds: float


async def prepare(engine: Engine, request: Request) -> Prepared:
    """Builds the environment of a request where its first candidate would run it.

    Raises `NoCandidate`, `NotSupported`, `PreparationFailed`.
    """
    plan = await engine.planned(request)
    candidate = plan.candidates[0].candidate
    session = await engine.accounts.session(candidate.provider)
    if not candidate.offer.can("Prepare") or not isinstance(session, Prepare):
        raise NotSupported(f"{candidate.provider} prepares no environments: {candidate.offer.reason('Prepare')}")
    environment = request.spec.environment
    engine.emit(
        Preparing(at=engine.wall(), run=request.id, tenant=request.tenant, provider=candidate.provider, environment=environment)
    )
    began = trio.current_time()
    name = await session.prepare(environment, f"ss-{request.id}-e")
    return Prepared(provider=candidate.provider, name=name, seconds=trio.current_time() - began)
