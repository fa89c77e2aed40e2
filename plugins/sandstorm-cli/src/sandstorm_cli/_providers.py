"""`sandstorm providers`: which accounts there are, and whether they work."""

from __future__ import annotations

from typing import Any

import click

from sandstorm import Sandstorm, encode
from sandstorm.provider import Offer
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._show import isolation, machine, seconds
from sandstorm_cli._terminal import emit_json, emit_pairs, waiting


@click.command()
@settings_option
@json_option
def providers(settings: str | None, as_json: bool) -> None:
    """The accounts: whether each works, what it would give, and what it charges."""
    with waiting("asking the providers…"), Sandstorm(settings=settings) as client:
        found = client.providers()
    if as_json:
        emit_json(encode(found))
        return
    if not found:
        click.echo("no provider is installed", err=True)
    for status in found:
        emit_pairs(_pairs(status))


def _pairs(status: Any) -> list[tuple[str, str]]:
    rates = status.rates
    charged = (
        "unknown" if rates is None else "nothing" if not rates.rates else f"by the rates of {rates.checked_at}, {rates.source}"
    )
    invited = "; takes part unasked only where no other account is configured" if status.traits.by_invitation else ""
    pairs = [
        (status.name, ("ok" if status.ok else "FAILS") + (f": {status.detail}" if status.detail else "") + invited),
        ("  isolation", isolation(status.isolation) if status.isolation else "unknown"),
        ("  charges", charged),
    ]
    for offer in status.offers:
        if isinstance(offer, Offer):
            text = f"{offer.id}: {machine(offer)}, network {' or '.join(offer.network)}, up to {seconds(offer.lifetime)}"
            pairs.append(("  offers", text))
        else:
            pairs.append(("  declines", f"{offer.id}: {offer.reason} ({offer.rule})"))
    return pairs
