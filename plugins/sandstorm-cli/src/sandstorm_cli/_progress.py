"""Says on the terminal where a run has got to, and how much of a file has been moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sandstorm import Environment, Sandstorm
from sandstorm.policy import AttemptOpened, Event, Preparing, ProgramStarted, SandboxBound, hookimpl
from sandstorm_cli._escape import one_line
from sandstorm_cli._terminal import Waiting, decorated

_PARTS_NAMED = 3
"""Packages that are named on the line; more are counted."""


class Progress:
    """A plugin that observes one run."""

    name = "cli-progress"

    def __init__(self, line: Waiting) -> None:
        self._line = line

    @hookimpl
    def sandstorm_observe(self, event: Event) -> None:
        """Names the account that is tried, and what it does."""
        if isinstance(event, AttemptOpened):
            self._line.say(f"starting on {event.provider}…")
        elif isinstance(event, Preparing):
            self._line.say(f"preparing {_named(event.environment)} on {event.provider}…")
        elif isinstance(event, SandboxBound):
            self._line.say(f"sandbox on {event.provider} is there…")
        elif isinstance(event, ProgramStarted):
            self._line.say(f"running on {event.provider}…")


def observed(settings: str | None, line: Waiting) -> Sandstorm:
    """A client, not opened yet, whose progress is shown on the line where there is one to see."""
    progress = [Progress(line)] if line.shown else []
    return Sandstorm(settings=settings, plugins=[(plugin.name, plugin) for plugin in progress])


def _named(environment: Environment) -> str:
    parts = [*([environment.image] if environment.image else []), *environment.requirements]
    more = len(parts) - _PARTS_NAMED
    return ", ".join(parts[:_PARTS_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def moving(name: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar with the rate while files are moved, fed with bytes; None where standard error is no terminal.

    `total` is in bytes, or None where it is not known.
    """
    console = decorated(err=True)
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(one_line(name), total=total)
        yield lambda count: bar.advance(task, count)
