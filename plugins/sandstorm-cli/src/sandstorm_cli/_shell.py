"""`sandstorm sandbox exec` and `sandstorm sandbox shell`: one program in a sandbox, joined to this terminal or pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import click

from sandstorm import InvalidInput
from sandstorm_cli._exit_codes import Status, clamp, help_text
from sandstorm_cli._flags import settings_option
from sandstorm_cli._ids import SandboxId
from sandstorm_cli._options import duration, pairs

_SHELL = ("/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh")

_TIMEOUT = 300.0

if TYPE_CHECKING:
    from sandstorm import AsyncBox


@attrs.frozen(kw_only=True)
class Call:
    """A program to run in a sandbox.

    Attributes:
        argv: The program and its arguments.
        env: Variables beside those of the sandbox.
        cwd: Its directory in the work area, or None.
        timeout: Seconds, or None for the default: 300, and with a terminal all that is left of the sandbox's life.
        terminal: Whether it gets a terminal, which this one is joined to.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = attrs.field(factory=dict)
    cwd: str | None = None
    timeout: float | None = None
    terminal: bool = False

    def seconds(self, box: AsyncBox) -> float:
        """The timeout that applies in this sandbox."""
        if self.timeout is not None:
            return self.timeout
        return max(1.0, box.expires_at - time.time()) if self.terminal else _TIMEOUT


@click.command("exec", epilog=help_text())
@click.argument("sandbox", metavar="ID", type=SandboxId())
@click.argument("argv", nargs=-1, required=True, metavar="-- COMMAND [ARGS]")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal, which this one becomes.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="An environment variable; repeatable.")
@click.option("--cwd", metavar="PATH", help="Its directory, relative to the work area.")
@click.option(
    "--timeout", metavar="DURATION", help="Kill it after so long, such as 30s or 2h (300s; with -t the sandbox's life)."
)
@settings_option
def exec_(
    sandbox: str,
    argv: tuple[str, ...],
    tty: bool,
    env: tuple[str, ...],
    cwd: str | None,
    timeout: str | None,
    settings: str | None,
) -> int:
    """Run a command in a sandbox, with this standard input and output.

    What is piped in reaches it as it comes; from a terminal it reads only with -t. Ctrl-C is passed on to it, and kills it the
    second time.
    """
    seconds = None if timeout is None else duration("timeout", timeout)
    call = Call(argv=argv, env=dict(pairs("env", env)), cwd=cwd, timeout=seconds, terminal=tty)
    return _joined(settings, sandbox, call)


@click.command("shell", epilog=help_text())
@click.argument("sandbox", metavar="ID", type=SandboxId())
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="An environment variable; repeatable.")
@click.option("--cwd", metavar="PATH", help="Its directory, relative to the work area.")
@settings_option
def shell(sandbox: str, env: tuple[str, ...], cwd: str | None, settings: str | None) -> int:
    """Open a shell in a sandbox: bash, or sh where there is no bash."""
    return _joined(settings, sandbox, Call(argv=_SHELL, env=dict(pairs("env", env)), cwd=cwd, terminal=True))


def _joined(settings: str | None, sandbox: str, call: Call) -> int:
    if call.terminal and not sys.stdin.isatty():
        raise InvalidInput("tty", "a terminal as standard input", "none")
    if call.terminal and "TERM" not in call.env and (kind := os.environ.get("TERM")):
        call = attrs.evolve(call, env={**call.env, "TERM": kind})
    from sandstorm_cli._join import join

    sys.stdout.flush()
    sys.stderr.flush()
    try:
        ended = join(settings, sandbox, call)
    except BrokenPipeError:
        return Status.PIPE_CLOSED
    if ended.kind not in ("exited", "signal"):
        click.echo(f"sandstorm: the program was ended: {ended.kind.replace('-', ' ')}", err=True)
    return clamp(ended.status)
