"""The entry point: finds the command, runs it, and turns whatever happens into one exit status."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sandstorm_cli._commands import LazyGroup
from sandstorm_cli._exit_codes import Status
from sandstorm_cli._failure import report

_ENV_COMPLETE = "_SANDSTORM_COMPLETE"


class SandstormCommand(LazyGroup):
    """The `sandstorm` command: every way out of it ends in a status of the table."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> NoReturn:
        """Runs the command line and exits."""
        given = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in itertools.takewhile(lambda word: word != "--", given)
        extra |= {"standalone_mode": False, "prog_name": "sandstorm", "complete_var": _ENV_COMPLETE}
        try:
            status = super().main(given, **extra)
        except click.exceptions.NoArgsIsHelpError as exc:
            click.echo(exc.ctx.get_help() if exc.ctx else "")
            status = Status.OK
        except (Exception, KeyboardInterrupt) as exc:
            status = report(exc, as_json=as_json)
        sys.exit(status if isinstance(status, int) else Status.OK)


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"sandstorm {version('sandstorm-core')} (cli {version('sandstorm-cli')})")
    ctx.exit()


@click.command(cls=SandstormCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version.")
def cli() -> None:
    """Routes code to the right sandbox."""


def main() -> NoReturn:
    """Runs `sandstorm` with the arguments of this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):
                stream.reconfigure(errors="backslashreplace")
    cli.main()
