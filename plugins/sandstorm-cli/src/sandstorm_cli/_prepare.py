"""`sandstorm prepare`: an environment ahead of the runs that need it."""

from __future__ import annotations

from typing import Any

import click

from sandstorm import InvalidInput, encode
from sandstorm_cli._options import environment, environment_options, where
from sandstorm_cli._progress import observed
from sandstorm_cli._show import seconds
from sandstorm_cli._terminal import emit_json, emit_pairs, waiting


@click.command()
@environment_options
def prepare(as_json: bool, settings: str | None, **given: Any) -> None:
    """Build the environment of a run where that run would go, so that it need not wait."""
    wanted = environment(given)
    if wanted.image is None and not wanted.requirements:
        raise InvalidInput("requirement", "at least one --requirement, or an --image", None)
    with waiting("routing…") as line, observed(settings, line) as client:
        prepared = client.prepare(wanted, **where(given))
    if as_json:
        emit_json(encode(prepared))
    else:
        emit_pairs([("provider", prepared.provider), ("name", prepared.name), ("took", seconds(prepared.seconds))])
