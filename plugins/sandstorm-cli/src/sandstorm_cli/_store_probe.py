"""Learns which store the core opens, through the hook that asks plugins for it."""

from __future__ import annotations

import os
from pathlib import Path

from sandstorm.policy import hookimpl

_SQLITE = "sqlite:///"


class StoreProbe:
    """A plugin that serves no store. `url` is the one that the core asked for, or None before it did."""

    name = "doctor-probe"

    def __init__(self) -> None:
        self.url: str | None = None

    @hookimpl
    def sandstorm_store(self, url: str) -> None:
        """Remembers the URL."""
        self.url = url

    @property
    def read_only(self) -> bool:
        """Whether the store is a file that this user may not write."""
        if self.url is None or not self.url.startswith(_SQLITE):
            return False
        path = Path(self.url.removeprefix(_SQLITE))
        return path.exists() and not os.access(path, os.W_OK)
