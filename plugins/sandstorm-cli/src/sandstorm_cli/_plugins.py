"""`sandstorm plugins`: what is loaded, and what was set aside and why."""

from __future__ import annotations

from typing import Any

import click

from sandstorm import Sandstorm, encode
from sandstorm_cli._commands import added_commands
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._terminal import emit_json, emit_table


@click.command()
@settings_option
@json_option
def plugins(settings: str | None, as_json: bool) -> None:
    """The plugins that are loaded, those that were set aside, and commands of other packages."""
    with Sandstorm(settings=settings) as client:
        report = client.plugins()
    commands = added_commands()
    if as_json:
        emit_json({**encode(report), "commands": commands})
        return
    rows = [(each.name, "loaded", _origin(each), ", ".join(each.hooks)) for each in report.loaded]
    rows += [(each.name, "SET ASIDE", _origin(each), each.reason) for each in report.set_aside]
    rows += [
        (each["name"], "SET ASIDE" if each["reason"] else "command", each["distribution"], each["reason"]) for each in commands
    ]
    emit_table(("NAME", "STATE", "FROM", "HOOKS OR REASON"), rows)


def _origin(plugin: Any) -> str:
    distribution = " ".join(part for part in (plugin.distribution, plugin.version) if part)
    return distribution or ("built in" if getattr(plugin, "builtin", False) else "unknown")
