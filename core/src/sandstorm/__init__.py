"""Routes code to the right sandbox.

>>> from sandstorm import Sandstorm, Constraints
>>> with Sandstorm() as sandstorm:
...     result = sandstorm.run("print('hello')", language="python", constraints=Constraints(max_cost="0.10"))

Importing this loads values only; trio, cattrs, pluggy, sqlite3 and the plugins load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from sandstorm._async_box import AsyncBox as AsyncBox
    from sandstorm._async_box import AsyncRunning as AsyncRunning
    from sandstorm._blocking import BlockingBox as BlockingBox
    from sandstorm._blocking import BlockingRunning as BlockingRunning
    from sandstorm._custody import KeptSandbox as KeptSandbox
    from sandstorm._prepare import Prepared as Prepared
    from sandstorm._reconciler import Reaped as Reaped

__version__ = "0.1.0"

_LATER = {
    "AsyncBox": "_async_box",
    "AsyncRunning": "_async_box",
    "BlockingBox": "_blocking",
    "BlockingRunning": "_blocking",
    "KeptSandbox": "_custody",
    "Prepared": "_prepare",
    "Reaped": "_reconciler",
}
"""What the clients hand out, for annotations: it loads on first use, with the engine, and so is not part of `*`."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sandstorm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sandstorm.{_LATER[name]}"), name)


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
