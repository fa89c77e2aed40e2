"""For authors of policies, strategies, prices, stores, sinks and sources of secrets."""

from __future__ import annotations

from sandstorm._events import (
    AttemptClosed,
    AttemptOpened,
    AttemptReaped,
    Event,
    Preparing,
    ProgramStarted,
    RunFinished,
    RunPlanned,
    RunRefused,
    SandboxBound,
    Sink,
)
from sandstorm._hookspecs import hookimpl
from sandstorm._knowledge import Knowledge, Observed, Strategy
from sandstorm._languages import Recipe
from sandstorm._limits import Limit, SecretSource
from sandstorm._offer import Facts
from sandstorm._plan import Candidate, Denial, Exclusion, Latency, Ranked, Request
from sandstorm._quote import Quote, Usage
from sandstorm._store import (
    OPEN_STATES,
    AttemptRow,
    KeyRow,
    KeyTaken,
    LedgerRow,
    LimitReached,
    Observation,
    RunRow,
    Store,
)

API_VERSION = 1
"""The version of this contract. A plugin says which one it needs as `SANDSTORM_API`; the loader refuses another, by name."""

__all__ = [
    "API_VERSION",
    "OPEN_STATES",
    "AttemptClosed",
    "AttemptOpened",
    "AttemptReaped",
    "AttemptRow",
    "Candidate",
    "Denial",
    "Event",
    "Exclusion",
    "Facts",
    "KeyRow",
    "KeyTaken",
    "Knowledge",
    "Latency",
    "LedgerRow",
    "Limit",
    "LimitReached",
    "Observation",
    "Observed",
    "Preparing",
    "ProgramStarted",
    "Quote",
    "Ranked",
    "Recipe",
    "Request",
    "RunFinished",
    "RunPlanned",
    "RunRefused",
    "RunRow",
    "SandboxBound",
    "SecretSource",
    "Sink",
    "Store",
    "Strategy",
    "Usage",
    "hookimpl",
]
