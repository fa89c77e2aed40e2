"""Everything Sandstorm raises.

What a program does in a sandbox is a result and never an exception: a non-zero exit, a signal or a deadline
is named in `RunResult.exit`.

::

    SandstormError
      CallerError                 the caller can fix it
        InvalidInput              a value, setting, file or option is wrong          (also ValueError)
          SettingsError           ... and it stands in the settings
        PluginError               a plugin is missing, broken or misused
        Denied                    a policy refused the run before anything was tried
        NoCandidate               nothing is left that may run it
        BudgetExhausted           the money set aside for a run is used up
        InvalidSpec               the vendor says that the machine asked for does not exist
        NotSupported              this provider does not do that
        Conflict                  the same name or key is in use for something else
        SandboxGone               the sandbox was released before the call
      ProviderError               the provider failed
        CapacityError             no room for the sandbox at the moment
        QuotaError                the account's own cap is reached
        RateLimited               too many requests; `retry_after` says when to come back
        OutOfCredit               the account is suspended or has no money left
        AuthError                 the key is wrong or may not do this
        ProviderDown              refused, unreachable or 503 before the request was taken
        Ambiguous                 sent, and the answer was lost: it may have happened
        StreamLost                the output stream was cut; the program may still run
        SandboxLost               the sandbox was evicted, expired or deleted under us
        PreparationFailed         an environment could not be built; `fault` says whose mistake it is
      RunFailed                   every candidate failed before the program started
      OutcomeUnknown              the program may have started, and its result cannot be had
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandstorm._plan import Plan
    from sandstorm._result import Attempt


class SandstormError(Exception):
    """The root of everything that Sandstorm raises on purpose."""


class CallerError(SandstormError):
    """The caller can fix it: by another value, setting, plugin or constraint."""


class ProviderError(SandstormError):
    """A provider failed. The class says whether the next candidate may be tried.

    `failover` is whether another candidate may be tried, and `started` whether the program may have begun:
    both are facts of the class, from the table in `docs/design.md`.
    """

    failover: bool = True
    started: bool = False


class InvalidInput(CallerError, ValueError):
    """A value that cannot be used. Says where it stands, what was expected and what came instead."""

    def __init__(self, field: str, expected: str, got: object = None) -> None:
        super().__init__(field, expected, got)
        self.field = field
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {_shown(self.got)}"

    def below(self, parent: str) -> InvalidInput:
        """The same error, located inside `parent`."""
        return type(self)(f"{parent}.{self.field}" if self.field else parent, self.expected, self.got)


class SettingsError(InvalidInput):
    """A line of the settings cannot be used."""


class PluginError(CallerError):
    """A plugin is missing, broken, of another contract version, or raised where it may not.

    `plugin` is its name, `stage` the hook or step in which it failed.
    """

    def __init__(self, plugin: str, stage: str, reason: str) -> None:
        super().__init__(f"plugin {plugin!r} ({stage}): {reason}")
        self.plugin = plugin
        self.stage = stage
        self.reason = reason


class Denied(CallerError):
    """A policy refused the run before anything was tried. Names the plugin and its rule."""

    def __init__(self, plugin: str, rule: str, reason: str) -> None:
        super().__init__(f"denied by {plugin} ({rule}): {reason}")
        self.plugin = plugin
        self.rule = rule
        self.reason = reason


class NoCandidate(CallerError):
    """Nothing is left that may run it. `plan` lists every exclusion with its rule."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("no provider may run this: " + ("; ".join(plan.exclusion_lines) or "none is installed"))
        self.plan = plan


class BudgetExhausted(CallerError):
    """The money set aside for a run is used up."""


class InvalidSpec(CallerError):
    """The vendor says that the machine asked for does not exist: an unknown image, size or region."""


class NotSupported(CallerError):
    """The provider does not do that, and said so at once."""


class Conflict(CallerError):
    """The same name or idempotency key is in use for something else."""


class SandboxGone(CallerError):
    """The sandbox was released before the call."""


class CapacityError(ProviderError):
    """The provider has no room for the sandbox at the moment."""


class QuotaError(ProviderError):
    """The account's own cap is reached; a slot frees when one of its sandboxes ends."""


class RateLimited(ProviderError):
    """Too many requests. `retry_after` is in seconds, or None where the vendor does not say."""

    def __init__(self, message: str = "too many requests", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OutOfCredit(ProviderError):
    """The account is suspended or has no money left."""


class AuthError(ProviderError):
    """The key is wrong, or may not do this."""


class ProviderDown(ProviderError):
    """Refused, unreachable, or 503 before the request was taken: nothing happened there."""


class Ambiguous(ProviderError):
    """The request was sent and its answer lost: what it asked for may have happened."""


class StreamLost(ProviderError):
    """The output stream ended without an exit. The sandbox may be alive and the program running."""

    started = True


class SandboxLost(ProviderError):
    """The sandbox was evicted, expired or deleted under us. `reason` is in the vendor's words."""

    started = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PreparationFailed(ProviderError):
    """An environment could not be built. `fault` is `"caller"` (no failover) or `"provider"`."""

    def __init__(self, message: str, *, fault: str = "provider") -> None:
        super().__init__(message)
        self.fault = fault
        self.failover = fault == "provider"


class RunFailed(SandstormError):
    """Every candidate failed before the program started: it did not run. `attempts` says how each failed."""

    def __init__(self, attempts: Sequence[Attempt], plan: Plan) -> None:
        tried = "; ".join(f"{attempt.provider}: {attempt.error}" for attempt in attempts)
        super().__init__(f"the program did not start: {tried}")
        self.attempts = tuple(attempts)
        self.plan = plan


class OutcomeUnknown(SandstormError):
    """The program may have started, and its result cannot be had. It is not started again unless `effects` allow it."""

    def __init__(self, attempts: Sequence[Attempt], plan: Plan) -> None:
        lost = next((attempt for attempt in reversed(attempts) if attempt.outcome.value == "maybe-started"), attempts[-1])
        super().__init__(f"the program may have run on {lost.provider}, and its result is lost: {lost.error}")
        self.attempts = tuple(attempts)
        self.plan = plan


def _shown(value: object) -> str:
    """A value as an error may show it: short and on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
