"""Says on the terminal where a run has got to, from the events that plugins are told."""

from __future__ import annotations

from sandstorm.policy import AttemptOpened, Event, ProgramStarted, hookimpl
from sandstorm_cli._terminal import Waiting


class Progress:
    """A plugin that observes one run."""

    name = "cli-progress"

    def __init__(self, line: Waiting) -> None:
        self._line = line

    @hookimpl
    def sandstorm_observe(self, event: Event) -> None:
        """Names the account that is tried."""
        if isinstance(event, AttemptOpened):
            self._line.say(f"starting on {event.provider}…")
        elif isinstance(event, ProgramStarted):
            self._line.say(f"running on {event.provider}…")
