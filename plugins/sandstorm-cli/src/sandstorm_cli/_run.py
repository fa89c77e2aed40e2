"""`sandstorm run` and `sandstorm plan`."""

from __future__ import annotations

from typing import Any

import click

from sandstorm import RunResult, Sandstorm, encode
from sandstorm_cli._exit_codes import Status, clamp, help_text
from sandstorm_cli._options import Asked, asked, request_options
from sandstorm_cli._outputs import check_directory, write_outputs
from sandstorm_cli._progress import Progress
from sandstorm_cli._show import explanation, plan_pairs
from sandstorm_cli._terminal import Relay, Waiting, emit_json, emit_pairs, waiting


@click.command(epilog=help_text())
@request_options
@click.option("--output-dir", default=".", metavar="DIR", help="Where files that are brought back go (.).")
@click.option("-q", "--quiet", is_flag=True, help="No explanation after the run.")
def run(output_dir: str, quiet: bool, as_json: bool, settings: str | None, **given: Any) -> int:
    """Run FILE, CODE or standard input where it may run, costs least or starts soonest.

    Standard output is the program's alone. Where it ran and why goes to standard error.
    """
    request = asked(given)
    directory = check_directory(output_dir)
    with waiting("routing…", shown=not quiet) as line:
        relay = None if as_json else Relay(line)
        try:
            result = _result(settings, request, relay, line)
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
    _explain(request, result, quiet=quiet)
    return clamp(result.exit.status)


def _result(settings: str | None, request: Asked, relay: Relay | None, line: Waiting) -> RunResult:
    progress = [Progress(line)] if line.shown else []
    client = Sandstorm(settings=settings, plugins=[(plugin.name, plugin) for plugin in progress])
    arguments = _arguments(client, request)
    with client:
        return client.run(**arguments, on_output=relay)


def _explain(request: Asked, result: RunResult, *, quiet: bool) -> None:
    missing = [("missing", f"the program made no {path}") for path in request.task.outputs if path not in result.outputs]
    emit_pairs([*missing, *([] if quiet else explanation(result))], err=True)


@click.command(epilog=help_text())
@request_options
def plan(as_json: bool, settings: str | None, **given: Any) -> int:
    """Decide where a program would run, and run nothing."""
    request = asked(given)
    client = Sandstorm(settings=settings)
    arguments = _arguments(client, request)
    with waiting("routing…"), client:
        decision = client.plan(**arguments)
    if as_json:
        emit_json(encode(decision))
    else:
        emit_pairs(list(plan_pairs(decision)))
    return Status.OK if decision.candidates else Status.REFUSED


def _arguments(client: Sandstorm, request: Asked) -> dict[str, Any]:
    """What the client is called with, checked before it opens: bad input leaves not even an empty journal."""
    task = request.in_language(client.language_of(request.guess) if request.guess else None)
    client.check(task, request.strategy)
    return {
        "task": task,
        "spec": request.spec,
        "constraints": request.constraints,
        "strategy": request.strategy,
        "tenant": request.tenant,
    }
