"""A run as it is shown: its output as it comes, its files, and the explanation at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sandstorm import RunResult, encode
from sandstorm_cli._exit_codes import Status, clamp
from sandstorm_cli._outputs import write_outputs
from sandstorm_cli._show import explanation
from sandstorm_cli._terminal import Relay, Waiting, emit_json, emit_pairs, waiting

GetResult = Callable[[Relay | None, Waiting], RunResult]


def shown(get: GetResult, directory: Path, *, text: str, quiet: bool, as_json: bool) -> int:
    """The exit status of a run whose result `get` waits for; `text` is what the terminal says until it starts.

    Its output files are written beneath `directory`.
    """
    with waiting(text, shown=not quiet) as line:
        relay = None if as_json else Relay(line)
        try:
            result = get(relay, line)
        except KeyboardInterrupt:
            if relay is None or relay.failed is None:
                raise
    if relay is not None and relay.failed is not None:
        if isinstance(relay.failed, BrokenPipeError):
            return Status.PIPE_CLOSED
        raise relay.failed
    write_outputs(result.outputs, directory)
    if as_json:
        emit_json(encode(result))
    _explain(result, quiet=quiet)
    return clamp(result.exit.status)


def _explain(result: RunResult, *, quiet: bool) -> None:
    task = result.plan.request.task
    wanted = () if task is None else task.outputs
    missing = [("missing", f"the program made no {path}") for path in wanted if path not in result.outputs]
    emit_pairs([*missing, *([] if quiet else explanation(result))], err=True)
