"""`sandstorm attach`: what came of a detached run."""

from __future__ import annotations

import click

from sandstorm import RunResult
from sandstorm_cli._exit_codes import help_text
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._ids import RunId
from sandstorm_cli._outputs import check_directory
from sandstorm_cli._progress import observed
from sandstorm_cli._shown import shown
from sandstorm_cli._terminal import Relay, Waiting


@click.command(epilog=help_text())
@click.argument("run_id", metavar="RUN", type=RunId())
@click.option("--output-dir", default=".", metavar="DIR", help="Where files that are brought back go (.).")
@click.option("-q", "--quiet", is_flag=True, help="No explanation after the run.")
@settings_option
@json_option
def attach(run_id: str, output_dir: str, quiet: bool, settings: str | None, as_json: bool) -> int:
    """Follow a detached RUN from its first byte to its end, by its ID or an unambiguous beginning of it.

    Ctrl-C leaves it running. Its sandbox is released once it has ended.
    """
    directory = check_directory(output_dir)

    def result(on_output: Relay | None, line: Waiting) -> RunResult:
        with observed(settings, line) as client:
            return client.attach(run_id, on_output=on_output)

    try:
        return shown(result, directory, text="attached…", quiet=quiet, as_json=as_json)
    except KeyboardInterrupt:
        click.echo(f"sandstorm: the run goes on; sandstorm attach {run_id} follows it again", err=True)
        raise
