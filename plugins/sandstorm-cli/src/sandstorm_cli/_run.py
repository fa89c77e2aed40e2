"""`sandstorm run`, attached or detached, and `sandstorm plan`."""

from __future__ import annotations

from typing import Any

import click

from sandstorm import RunResult, Sandstorm, encode
from sandstorm_cli._exit_codes import Status, help_text
from sandstorm_cli._options import Asked, asked, request_options
from sandstorm_cli._outputs import check_directory
from sandstorm_cli._progress import observed
from sandstorm_cli._show import plan_pairs, when
from sandstorm_cli._shown import shown
from sandstorm_cli._terminal import Relay, Waiting, emit_json, emit_pairs, waiting


@click.command(epilog=help_text())
@request_options
@click.option("--output-dir", default=".", metavar="DIR", help="Where files that are brought back go (.).")
@click.option("-q", "--quiet", is_flag=True, help="No explanation after the run.")
@click.option("--detach", is_flag=True, help="Print the run's id once it has started; `attach` collects it.")
def run(output_dir: str, quiet: bool, detach: bool, as_json: bool, settings: str | None, **given: Any) -> int:
    """Run FILE, CODE or standard input where it may run, costs least or starts soonest.

    Standard output is the program's alone. Where it ran and why goes to standard error. With --detach it is the run's id.
    """
    request = asked(given)
    if detach:
        return _detached(settings, request, quiet=quiet, as_json=as_json)
    directory = check_directory(output_dir)

    def result(on_output: Relay | None, line: Waiting) -> RunResult:
        client = observed(settings, line)
        arguments = _arguments(client, request)
        with client:
            return client.run(**arguments, on_output=on_output)

    return shown(result, directory, text="routing…", quiet=quiet, as_json=as_json)


def _detached(settings: str | None, request: Asked, *, quiet: bool, as_json: bool) -> int:
    with waiting("routing…", shown=not quiet) as line:
        client = observed(settings, line)
        arguments = _arguments(client, request)
        with client:
            run_id = client.detach(**arguments)
            attempt = client.show(run_id).attempts[-1]
    if as_json:
        emit_json({"run": run_id, "provider": attempt.provider, "sandbox": attempt.sandbox, "expires_at": attempt.expires_at})
        return Status.OK
    click.echo(run_id)
    if not quiet:
        collect = f"sandstorm attach {run_id}, until {when(attempt.expires_at)} at the latest"
        emit_pairs([("runs on", attempt.provider), ("collect", collect)], err=True)
    return Status.OK


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
        "key": request.key,
    }
