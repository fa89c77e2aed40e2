"""Where the daemon listens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sandstorm.provider import InvalidInput


def socket_path(setting: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The socket of the settings, else of `DOCKER_HOST`, else the first of podman's and Docker's own that exists."""
    named = setting or environ.get("DOCKER_HOST")
    if named:
        if "://" in named and not named.startswith("unix://"):
            raise InvalidInput("socket", "a path or a unix:// address, since other transports are not spoken", named)
        return named.removeprefix("unix://")
    known = list(_known(environ))
    return next((path for path in known if Path(path).exists()), known[-1])


def is_configured(setting: str | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a socket to speak to: one that is named, or one of podman's and Docker's own."""
    return bool(setting or environ.get("DOCKER_HOST")) or any(Path(path).exists() for path in _known(environ))


def _known(environ: Mapping[str, str]) -> Iterator[str]:
    if "XDG_RUNTIME_DIR" in environ:
        yield f"{environ['XDG_RUNTIME_DIR']}/podman/podman.sock"
        yield f"{environ['XDG_RUNTIME_DIR']}/docker.sock"
    yield "/run/podman/podman.sock"
    yield "/var/run/docker.sock"
