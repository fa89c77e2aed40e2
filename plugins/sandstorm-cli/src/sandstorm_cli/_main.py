"""The entry point: finds the command, runs it, and turns whatever happens into one exit status."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from sandstorm_cli._commands import LazyGroup
from sandstorm_cli._exit_codes import Status
from sandstorm_cli._failure import report

_ENV_COMPLETE = "_SANDSTORM_COMPLETE"


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"sandstorm {version('sandstorm-core')} (cli {version('sandstorm-cli')})")
    ctx.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version.")
def cli() -> None:
    """Routes code to the right sandbox."""
    from sandstorm_cli._log import show_warnings

    show_warnings()


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs `sandstorm` with these arguments, or those of this process, and exits with a status of the table or the program's."""
    given = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in itertools.takewhile(lambda word: word != "--", given)
    _prepare()
    try:
        status = cli.main(given, prog_name="sandstorm", complete_var=_ENV_COMPLETE, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.ctx.get_help())
        status = Status.OK
    except (Exception, KeyboardInterrupt) as exc:
        status = report(exc, as_json=as_json)
        _let_go_of_output()
    sys.exit(status if isinstance(status, int) else Status.OK)


def _prepare() -> None:
    """Lets every text be written, and every way of being stopped clean up as Ctrl-C does."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, pathlib.Path(os.devnull).open("r+"))  # noqa: SIM115  stays open as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _let_go_of_output() -> None:
    """Drops what standard output does not take, which the interpreter would complain about when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
