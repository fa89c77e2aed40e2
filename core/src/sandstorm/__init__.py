"""Routes code to the right sandbox.

>>> from sandstorm import Sandstorm, Constraints
>>> with Sandstorm() as sandstorm:
...     result = sandstorm.run("print('hello')", language="python", constraints=Constraints(max_cost="0.10"))

Importing this loads values only; trio, cattrs, pluggy, sqlite3 and the plugins load on first use.
"""

from __future__ import annotations

from sandstorm._async_client import AsyncSandstorm
from sandstorm._client import Sandstorm
from sandstorm._constraints import Constraints
from sandstorm._errors import (
    Ambiguous,
    AuthError,
    BudgetExhausted,
    CallerError,
    CapacityError,
    Conflict,
    Denied,
    InvalidInput,
    InvalidSpec,
    NoCandidate,
    NotSupported,
    OutcomeUnknown,
    OutOfCredit,
    PluginError,
    PreparationFailed,
    ProviderDown,
    ProviderError,
    QuotaError,
    RateLimited,
    RunFailed,
    SandboxGone,
    SandboxLost,
    SandstormError,
    SettingsError,
    StreamLost,
)
from sandstorm._json import decode, encode
from sandstorm._plan import Plan
from sandstorm._result import Artifact, Attempt, Exit, Outcome, RunResult
from sandstorm._spec import Environment, Gpu, Network, SandboxSpec
from sandstorm._task import Task

__version__ = "0.1.0"

__all__ = [
    "Ambiguous",
    "Artifact",
    "AsyncSandstorm",
    "Attempt",
    "AuthError",
    "BudgetExhausted",
    "CallerError",
    "CapacityError",
    "Conflict",
    "Constraints",
    "Denied",
    "Environment",
    "Exit",
    "Gpu",
    "InvalidInput",
    "InvalidSpec",
    "Network",
    "NoCandidate",
    "NotSupported",
    "OutOfCredit",
    "Outcome",
    "OutcomeUnknown",
    "Plan",
    "PluginError",
    "PreparationFailed",
    "ProviderDown",
    "ProviderError",
    "QuotaError",
    "RateLimited",
    "RunFailed",
    "RunResult",
    "SandboxGone",
    "SandboxLost",
    "SandboxSpec",
    "Sandstorm",
    "SandstormError",
    "SettingsError",
    "StreamLost",
    "Task",
    "decode",
    "encode",
]
