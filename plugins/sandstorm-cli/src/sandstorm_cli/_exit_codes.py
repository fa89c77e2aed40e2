"""What each exit status of `sandstorm` means. The one table: `sandstorm run --help` and the README show it."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """The exit statuses that are Sandstorm's own; every other one is the program's."""

    OK = 0
    BAD_INPUT = 120
    REFUSED = 121
    ALL_FAILED = 122
    UNKNOWN = 123
    DEADLINE = 124
    BROKEN = 125
    PIPE_CLOSED = 141
    INTERRUPTED = 130


MEANINGS = {
    Status.BAD_INPUT: "bad input: an option, file, spec or setting",
    Status.REFUSED: "refused: denied by a policy, over the budget, or no candidate is left",
    Status.ALL_FAILED: "every candidate failed; the program did not start",
    Status.UNKNOWN: "the outcome is unknown: the program may have run",
    Status.DEADLINE: "the program reached its deadline",
    Status.BROKEN: "a plugin or Sandstorm itself failed",
    Status.INTERRUPTED: "interrupted",
    Status.PIPE_CLOSED: "the reader of the output went away",
}
"""One line for each status."""

_BY_CLASS = {
    "PluginError": Status.BROKEN,
    "Denied": Status.REFUSED,
    "NoCandidate": Status.REFUSED,
    "BudgetExhausted": Status.REFUSED,
    "CallerError": Status.BAD_INPUT,
    "UsageError": Status.BAD_INPUT,
    "RunFailed": Status.ALL_FAILED,
    "ProviderError": Status.ALL_FAILED,
    "OutcomeUnknown": Status.UNKNOWN,
    "Abort": Status.INTERRUPTED,
    "KeyboardInterrupt": Status.INTERRUPTED,
}


def status_of(error: BaseException) -> Status:
    """The exit status for an error: that of its nearest class in the table, else `BROKEN`."""
    if getattr(error, "fault", None) == "caller":
        return Status.BAD_INPUT
    return next((_BY_CLASS[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in _BY_CLASS), Status.BROKEN)


def clamp(status: int) -> int:
    """A program's status as one that the shell can show: 1 to 255 never turns into 0."""
    return status if 0 <= status <= 255 else 255


def help_text() -> str:
    """The table as `--help` shows it."""
    rows = "\n".join(f"{int(status)}  {meaning}" for status, meaning in MEANINGS.items())
    return f"\b\nExit status: the program's own, else\n{rows}"
