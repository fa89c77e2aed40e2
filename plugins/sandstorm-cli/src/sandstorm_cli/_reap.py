"""`sandstorm reap`: closes what crashes and lost answers left open."""

from __future__ import annotations

import click

from sandstorm import Sandstorm, encode
from sandstorm_cli._exit_codes import Status
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._terminal import emit_json, emit_table, waiting


@click.command()
@settings_option
@json_option
def reap(settings: str | None, as_json: bool) -> int:
    """Destroy what dead routers, lost answers and failed destroys left behind, and settle what it cost.

    Every router does so in the background; this makes one pass now and says what is still open, and why. What a living router
    uses, and what is kept and not yet due, is let be.
    """
    with waiting("looking…"), Sandstorm(settings=settings) as client:
        swept = client.reap()
    if as_json:
        emit_json([encode(reaped) for reaped in swept])
    elif swept:
        emit_table(("ATTEMPT", "PROVIDER", "SANDBOX", "NOW"), [(r.marker, r.provider, r.sandbox or "", r.done) for r in swept])
    else:
        click.echo("nothing was left open", err=True)
    return Status.OK if all(reaped.closed for reaped in swept) else Status.REFUSED
