"""The local provider: runs code on this machine, in a sandbox that was verified first."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandstorm_provider_local._plugin import LocalPlugin, Settings
    from sandstorm_provider_local._provider import LocalProvider

__all__ = ["LocalPlugin", "LocalProvider", "Settings"]


def __getattr__(name: str) -> object:
    # The supervisors of boxes are modules of this package, and must not pay for the rest of it.
    if name in ("LocalPlugin", "Settings"):
        from sandstorm_provider_local import _plugin

        return getattr(_plugin, name)
    if name == "LocalProvider":
        from sandstorm_provider_local._provider import LocalProvider

        return LocalProvider
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
