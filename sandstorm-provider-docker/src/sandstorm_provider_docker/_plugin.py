"""What the entry point names."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from sandstorm.provider import Provider, hookimpl
from sandstorm_provider_docker._provider import IMAGES, DockerProvider
from sandstorm_provider_docker._socket import is_configured


@attrs.frozen(kw_only=True)
class Settings:
    """The table `[plugins.docker]`.

    Attributes:
        socket: The API socket, as a path or `unix://` address; None for the first of `DOCKER_HOST`, podman's and Docker's own.
        accounts: Further sockets by account name: `team = "/run/team.sock"` becomes the account `docker:team`.
        images: Images by language, in place of or beside the packaged ones.
        runtime: The daemon's runtime for the containers, such as `runsc`; None for the daemon's own choice.
    """

    socket: str | None = None
    accounts: dict[str, str] = attrs.field(factory=dict)
    images: dict[str, str] = attrs.field(factory=dict)
    runtime: str | None = None


_Settings = Settings


class DockerPlugin:
    """The account `docker`, and `docker:<name>` for each further socket."""

    SANDSTORM_API = 1
    Settings = Settings

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings

    @hookimpl
    def sandstorm_providers(self) -> Sequence[Provider]:
        """One provider for each socket; none where nothing is configured and no daemon has its socket in the usual places."""
        own = {"docker": self._settings.socket} if is_configured(self._settings.socket) else {}
        sockets = {**own, **{f"docker:{name}": socket for name, socket in self._settings.accounts.items()}}
        images = {**IMAGES, **self._settings.images}
        return [
            DockerProvider(name=name, socket=socket, images=images, runtime=self._settings.runtime)
            for name, socket in sockets.items()
        ]
