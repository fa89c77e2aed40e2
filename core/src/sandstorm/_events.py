"""What happened, as frozen records, and who is told."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Protocol

import attrs

from sandstorm._result import Exit, Outcome
from sandstorm._spec import Environment


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened to a run.

    Attributes:
        at: Wall-clock seconds since 1970.
        run: The id of the run.
        tenant: Its tenant.
    """

    at: float
    run: str
    tenant: str


@attrs.frozen(kw_only=True)
class RunRefused(Event):
    """A run ended before anything was tried: `by` is the class of the error."""

    by: str
    reason: str


@attrs.frozen(kw_only=True)
class RunPlanned(Event):
    """The plan is frozen: candidates in order, and how many were ruled out."""

    candidates: tuple[str, ...]
    excluded: int


@attrs.frozen(kw_only=True)
class AttemptOpened(Event):
    """The intent is durable; the vendor is called next."""

    attempt: str
    provider: str
    offer: str
    region: str = ""


@attrs.frozen(kw_only=True)
class Preparing(Event):
    """An environment is being built, or looked up where it was built before."""

    provider: str
    environment: Environment


@attrs.frozen(kw_only=True)
class SandboxBound(Event):
    """The sandbox exists: `seconds` since its create was called."""

    attempt: str
    provider: str
    sandbox: str
    seconds: float


@attrs.frozen(kw_only=True)
class ProgramStarted(Event):
    """The program runs: `seconds` since the create was called."""

    attempt: str
    provider: str
    offer: str
    region: str | None
    seconds: float


@attrs.frozen(kw_only=True)
class AttemptClosed(Event):
    """An attempt ended. `error` is the class of what went wrong, or None; `open` if something may be left.

    `retry_after` is when its vendor wants to be asked again, in seconds, or None where it does not say.
    """

    attempt: str
    provider: str
    offer: str
    region: str = ""
    outcome: Outcome
    error: str | None
    retry_after: float | None = None
    open: bool


@attrs.frozen(kw_only=True)
class AttemptReaped(Event):
    """What an attempt had left open is closed: its sandbox is gone, and `cost` US dollars were settled (None: unknown)."""

    attempt: str
    provider: str
    cost: Decimal | None


@attrs.frozen(kw_only=True)
class RunFinished(Event):
    """The program ended and its result is known."""

    provider: str
    exit: Exit
    seconds: float
    cost: Decimal | None


class Sink(Protocol):
    """Receives events in batches, through a bounded queue; what does not fit is dropped and counted."""

    @property
    def name(self) -> str:
        """The name by which it is shown."""
        ...

    async def receive(self, events: Sequence[Event]) -> None:
        """Takes a batch, in order."""
        ...

    async def flush(self) -> None:
        """Writes out what is held; called at the end, with a deadline."""
        ...
