"""`sandstorm runs`: what was run, where, and what it cost."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import click

from sandstorm import InvalidInput, Plan, Sandstorm, decode, encode
from sandstorm_cli._escape import lines
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._show import plan_pairs, seconds, usd, when
from sandstorm_cli._terminal import emit_json, emit_pairs, emit_table

if TYPE_CHECKING:
    from sandstorm.policy import AttemptRow, LedgerRow, RunRow

_DOCUMENTS = ("request", "plan", "result")


@click.group()
def runs() -> None:
    """List past runs, or show one."""


@runs.command("list")
@click.option("--limit", type=int, default=20, metavar="N", help="How many (20).")
@click.option("--tenant", metavar="NAME", help="Only those of one tenant.")
@settings_option
@json_option
def list_(limit: int, tenant: str | None, settings: str | None, as_json: bool) -> None:
    """The newest runs first."""
    if limit < 1:
        raise InvalidInput("limit", "a whole number, at least 1", limit)
    with Sandstorm(settings=settings) as client:
        rows = client.runs(limit=limit, tenant=tenant)
    if as_json:
        emit_json([_summary(row) for row in rows])
    elif rows:
        header = ("ID", "WHEN", "TENANT", "WHAT", "STATE", "WHERE", "STATUS", "TOOK", "COST")
        emit_table(header, [_row(row) for row in rows])
    else:
        click.echo("no runs yet", err=True)


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option("--why", is_flag=True, help="The decision too: the candidates in order, and what was ruled out, by which rule.")
@settings_option
@json_option
def show(run_id: str, why: bool, settings: str | None, as_json: bool) -> None:
    """One run, by its ID or an unambiguous beginning of it: attempts, money and, where stored, its output."""
    with Sandstorm(settings=settings) as client:
        record = client.show(run_id)
    if as_json:
        emit_json({**encode(record), "run": {**_summary(record.run), **_documents(record.run)}})
        return
    emit_pairs(_run_pairs(record.run))
    documents = _documents(record.run)
    if why:
        emit_pairs(_decision(documents["plan"]))
    for attempt in record.attempts:
        emit_pairs([(f"attempt {attempt.number}", _attempt(attempt))])
    emit_pairs([("ledger", _movement(row)) for row in record.ledger])
    _emit_output(documents["result"])


def _summary(row: RunRow) -> dict[str, Any]:
    return {name: value for name, value in encode(row).items() if name not in _DOCUMENTS}


def _documents(row: RunRow) -> dict[str, Any]:
    """The JSON texts of a run as data; None for what is not stored or is no JSON."""
    return {name: _parsed(getattr(row, name)) for name in _DOCUMENTS}


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def _row(row: RunRow) -> tuple[str, ...]:
    status = "" if row.exit is None else str(row.exit)
    took = "" if row.seconds is None else seconds(row.seconds)
    return (
        row.id,
        when(row.created_at),
        row.tenant,
        row.title,
        row.state,
        row.provider or "",
        status,
        took,
        usd(row.cost) if row.state == "finished" else "",
    )


def _run_pairs(row: RunRow) -> list[tuple[str, str]]:
    return [
        ("run", row.id),
        ("when", when(row.created_at)),
        ("tenant", row.tenant),
        ("what", row.title),
        ("state", row.state),
        ("ran on", row.provider or "nowhere"),
        ("status", "none" if row.exit is None else str(row.exit)),
        ("took", seconds(row.seconds)),
        ("cost", usd(row.cost)),
    ]


def _decision(plan: Any) -> list[tuple[str, str]]:
    """The plan as it was stored, in the words of `sandstorm plan`."""
    return [("plan", "not stored")] if plan is None else list(plan_pairs(decode(Plan, plan)))


def _attempt(row: AttemptRow) -> str:
    error = f"; {row.error_class}: {row.error}" if row.error_class else ""
    return (
        f"{row.provider} ({row.offer}), {row.outcome}, {row.state}; sandbox {row.sandbox or 'none'}; "
        f"program started after {seconds(row.start_seconds)}; at most {usd(row.exposure)}{error}"
    )


def _movement(row: LedgerRow) -> str:
    return f"{row.kind} {usd(row.amount)} ({row.basis}) at {row.provider}"


def _emit_output(result: Any) -> None:
    """Shows stored output with its control characters escaped: it is the program's, and not to be trusted with a terminal."""
    for name in ("stdout", "stderr"):
        text = _text(result.get(name)) if isinstance(result, dict) else ""
        if text:
            click.echo(f"--- {name}")
            click.echo(lines(text), nl=not text.endswith("\n"))


def _text(stored: Any) -> str:
    if isinstance(stored, dict) and isinstance(stored.get("base64"), str):
        return base64.b64decode(stored["base64"]).decode(errors="replace")
    return stored if isinstance(stored, str) else ""
