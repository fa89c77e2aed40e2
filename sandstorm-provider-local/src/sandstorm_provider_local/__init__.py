"""The local provider: runs code on this machine, in a sandbox that was verified first."""

from __future__ import annotations

from sandstorm_provider_local._plugin import LocalPlugin, Settings
from sandstorm_provider_local._provider import LocalProvider

__all__ = ["LocalPlugin", "LocalProvider", "Settings"]
