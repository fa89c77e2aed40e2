"""The `sandstorm` command.

Other packages add commands through the entry point group `sandstorm.commands`: each entry is a click command.
"""

from __future__ import annotations

from sandstorm_cli._main import main

__all__ = ["main"]
