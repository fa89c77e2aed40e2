"""The options that every command takes."""

from __future__ import annotations

import click

settings_option = click.option("--settings", metavar="FILE", help="A settings file instead of the one that is found.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, and nothing else.")
