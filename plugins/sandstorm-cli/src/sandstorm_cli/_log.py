"""Warnings of the core and its plugins, on standard error."""

from __future__ import annotations

import logging
import os

from sandstorm_cli._escape import lines, one_line


class LineFormatter(logging.Formatter):
    """One line for each warning, with control characters escaped; the traceback only where it is asked for."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = f"sandstorm: {record.levelname.lower()}: {one_line(record.getMessage())}"
        if record.exc_info and os.environ.get("SANDSTORM_TRACEBACK") == "1":
            line += "\n" + lines(self.formatException(record.exc_info))
        return line


def show_warnings() -> None:
    """Shows what is logged as a warning or worse."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("sandstorm")
    logger.addHandler(handler)
    logger.propagate = False
