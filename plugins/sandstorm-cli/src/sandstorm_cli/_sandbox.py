"""`sandstorm sandbox`: sandboxes that stay, from their making to their end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sandstorm import InvalidInput, SandboxGone, Sandstorm, SandstormError, encode
from sandstorm_cli._copy import cp
from sandstorm_cli._escape import one_line
from sandstorm_cli._exit_codes import Status, status_of
from sandstorm_cli._failure import message
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._ids import SandboxId, opened
from sandstorm_cli._listing import ls
from sandstorm_cli._options import duration, machine, machine_options, where
from sandstorm_cli._progress import observed
from sandstorm_cli._shell import exec_, shell
from sandstorm_cli._show import isolation, span, usd, when
from sandstorm_cli._terminal import emit_json, emit_pairs, emit_table, waiting

_id_argument = click.argument("sandbox", metavar="ID", type=SandboxId())

if TYPE_CHECKING:
    from sandstorm import BlockingBox, KeptSandbox


@click.group()
def sandbox() -> None:
    """Make sandboxes that stay, and work in them.

    An ID may be shortened to an unambiguous beginning, and may be that of its run.
    """


@sandbox.command()
@machine_options
@click.option("--lifetime", default="1h", metavar="DURATION", help="After so long it ends, such as 30s, 10m, 2h or 1d (1h).")
@click.option("-q", "--quiet", is_flag=True, help="No explanation on standard error.")
def create(lifetime: str, quiet: bool, as_json: bool, settings: str | None, **given: Any) -> None:
    """Make a sandbox, and print its id alone on standard output."""
    seconds = duration("lifetime", lifetime)
    spec = machine(given)
    with waiting("routing…", shown=not quiet) as line, observed(settings, line) as client:
        with client.sandbox(spec, keep=True, lifetime=seconds, **where(given)) as box:
            line.stop()
            try:
                _introduce(client, box, quiet=quiet, as_json=as_json)
            except BaseException:
                box.destroy()  # whoever asked for it was not told its id
                raise


def _introduce(client: Sandstorm, box: BlockingBox, *, quiet: bool, as_json: bool) -> None:
    run = box.plan.request.id
    attempt = next(each for each in client.show(run).attempts if each.sandbox == box.id)
    if as_json:
        facts = {"id": box.id, "run": run, "provider": box.provider, "isolation": box.isolation, "expires_at": box.expires_at}
        emit_json({**facts, "most": encode(attempt.exposure)})
        return
    click.echo(box.id)
    if not quiet:
        pairs = [
            ("runs on", box.provider),
            ("until", f"{when(box.expires_at)} at the latest"),
            ("cost", f"at most {usd(attempt.exposure)}"),
            ("isolation", isolation(box.isolation)),
        ]
        emit_pairs(pairs, err=True)


@sandbox.command("list")
@click.option("--cost", is_flag=True, help="What each has cost so far, and can cost in all.")
@click.option("--idle", is_flag=True, help="How long nothing has happened in each.")
@settings_option
@json_option
def list_(cost: bool, idle: bool, settings: str | None, as_json: bool) -> None:
    """The sandboxes that are there now, the oldest first."""
    with waiting("asking…"), Sandstorm(settings=settings) as client:
        kept = sorted(client.sandboxes(), key=lambda each: each.created_at)
    if as_json:
        emit_json([encode(each) for each in kept])
    elif kept:
        header = ["ID", "WHAT", "PROVIDER", "STATE", "AGE", "ENDS IN", *(["COST", "AT MOST"] if cost else [])]
        now = time.time()
        emit_table([*header, *(["IDLE"] if idle else [])], [list(_row(each, now, cost=cost, idle=idle)) for each in kept])
    else:
        click.echo("no sandboxes; `sandstorm sandbox create` makes one", err=True)


def _row(kept: KeptSandbox, now: float, *, cost: bool, idle: bool) -> Iterator[str]:
    yield from (kept.id, kept.title, kept.provider, kept.state, span(now - kept.created_at), span(kept.expires_at - now))
    if cost:
        yield from (usd(kept.cost), usd(kept.most))
    if idle:
        yield "unknown" if kept.idle is None else span(kept.idle)


@sandbox.command()
@_id_argument
@click.argument("port", type=int)
@settings_option
@json_option
def url(sandbox: str, port: int, settings: str | None, as_json: bool) -> None:
    """Print the address at which a port of the sandbox can be reached."""
    with Sandstorm(settings=settings) as client, opened(client, sandbox) as box:
        address = box.url(port)
        _answer("url", address, box, as_json=as_json)


@sandbox.command()
@_id_argument
@settings_option
@json_option
def pause(sandbox: str, settings: str | None, as_json: bool) -> None:
    """Stop everything in it, until `resume`. Its lifetime goes on."""
    with Sandstorm(settings=settings) as client, opened(client, sandbox) as box:
        box.pause()
        _answer("state", "paused", box, as_json=as_json)


@sandbox.command()
@_id_argument
@settings_option
@json_option
def resume(sandbox: str, settings: str | None, as_json: bool) -> None:
    """Go on after `pause`."""
    with Sandstorm(settings=settings) as client, opened(client, sandbox) as box:
        box.resume()
        _answer("state", "running", box, as_json=as_json)


@sandbox.command()
@_id_argument
@click.argument("lifetime", metavar="DURATION")
@settings_option
@json_option
def extend(sandbox: str, lifetime: str, settings: str | None, as_json: bool) -> None:
    """Let it live for DURATION from now, such as 30m or 2h, and print until when that is."""
    seconds = duration("lifetime", lifetime)
    with Sandstorm(settings=settings) as client, opened(client, sandbox) as box:
        box.extend(seconds)
        _answer("expires_at", box.expires_at if as_json else when(box.expires_at), box, as_json=as_json)


@sandbox.command()
@_id_argument
@click.option("--retention", default="7d", metavar="DURATION", help="The copy is kept for so long (7d).")
@settings_option
@json_option
def snapshot(sandbox: str, retention: str, settings: str | None, as_json: bool) -> None:
    """Copy its files, and print the name of the copy, for `--snapshot`."""
    seconds = duration("retention", retention)
    with waiting("copying…") as line, Sandstorm(settings=settings) as client, opened(client, sandbox) as box:
        name = box.snapshot(seconds)
        line.stop()
        _answer("snapshot", name, box, as_json=as_json)


def _answer(field: str, value: Any, box: BlockingBox, *, as_json: bool) -> None:
    if as_json:
        emit_json({"id": box.id, field: value})
    else:
        click.echo(one_line(str(value)))


@sandbox.command()
@click.argument("sandboxes", nargs=-1, metavar="ID...", type=SandboxId())
@click.option("--all", "everything", is_flag=True, help="All that are there, the sandboxes of detached runs included.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before all are ended.")
@settings_option
@json_option
def rm(sandboxes: tuple[str, ...], everything: bool, yes: bool, settings: str | None, as_json: bool) -> int:
    """End sandboxes now, with all that is in them. The exit status is that of the first one that failed."""
    if everything == bool(sandboxes):
        raise InvalidInput("ID", "either ids, or --all", " ".join(sandboxes) or None)
    with Sandstorm(settings=settings) as client:
        names = _all(client, sure=yes) if everything else sandboxes
        ended = [_end(client, name) for name in names]
    if as_json:
        emit_json([{"sandbox": name, "ended": error is None, "error": error and message(error)} for name, error in ended])
    for name, error in ended:
        click.echo(f"{one_line(name)}: {'ended' if error is None else message(error)}", err=True)
    return next((status_of(error) for _, error in ended if error is not None), Status.OK)


def _all(client: Sandstorm, *, sure: bool) -> list[str]:
    kept = client.sandboxes()
    if kept and not sure:
        if not sys.stdin.isatty():
            raise InvalidInput("all", "--yes beside it, since there is nobody to ask", "--all")
        of_runs = sum(each.title != "sandbox" for each in kept)
        click.confirm(f"End {len(kept)} sandboxes, {of_runs} of them of detached runs?", abort=True, err=True)
    return [each.id for each in kept]


def _end(client: Sandstorm, name: str) -> tuple[str, SandstormError | None]:
    try:
        with opened(client, name) as box:
            box.destroy()
            return box.id, None
    except SandboxGone:
        return name, None
    except SandstormError as exc:
        return name, exc


for command in (exec_, shell, cp, ls):
    sandbox.add_command(command)
