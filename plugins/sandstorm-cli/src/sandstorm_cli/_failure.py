"""Errors as the user sees them: one line on stderr, a JSON document with `--json`, and the exit status."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import click

from sandstorm_cli._escape import one_line
from sandstorm_cli._exit_codes import Status, status_of

_DETAILS = ("field", "expected", "plugin", "stage", "rule", "reason", "retry_after", "fault")
_VALUES = ("attempts", "plan")


def report(error: BaseException, *, as_json: bool) -> Status:
    """Tells the user about `error` and answers the exit status."""
    if os.environ.get("SANDSTORM_TRACEBACK") == "1":
        traceback.print_exception(error)
    if as_json:
        click.echo(json.dumps({"error": document(error)}, indent=2))
    click.echo(f"sandstorm: {message(error)}", err=True)
    sys.stderr.flush()
    return status_of(error)


def message(error: BaseException) -> str:
    """One line that says what went wrong and, for bad input, where and what was expected."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted"
    if isinstance(error, click.ClickException):
        return one_line(error.format_message().replace("\n", " "))
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return message(error.exceptions[0])
    text = one_line(str(error)) or "no details"
    if status_of(error) is not Status.BROKEN or type(error).__name__ == "PluginError":
        return text
    return f"{type(error).__name__}: {text} (SANDSTORM_TRACEBACK=1 shows where)"


def document(error: BaseException) -> dict[str, Any]:
    """The error as JSON data: its class, message, exit status, and whatever else it knows."""
    found: dict[str, Any] = {"class": type(error).__name__, "message": message(error), "status": int(status_of(error))}
    if isinstance(error, click.BadParameter) and error.param is not None:
        found["field"] = error.param.opts[0]
    elif isinstance(error, click.NoSuchOption):
        found["field"] = error.option_name
    found |= {name: getattr(error, name) for name in _DETAILS if isinstance(getattr(error, name, None), (str, int, float))}
    values = {name: getattr(error, name) for name in _VALUES if hasattr(error, name)}
    if values:
        from sandstorm import encode

        found |= {name: encode(value) for name, value in values.items()}
    return found
