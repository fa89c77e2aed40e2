"""What the daemon and its socket raise, as provider errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import trio

from sandstorm.provider import (
    Ambiguous,
    AuthError,
    CapacityError,
    Conflict,
    InvalidSpec,
    ProviderDown,
    SandboxGone,
    StreamLost,
)

REMEDY = "start `podman system service --time=0` (or Docker), or set socket in [plugins.docker]"

_FULL = ("no space left", "disk quota", "cannot allocate memory", "not enough memory", "resource temporarily unavailable")


class Refusal(Exception):
    """An answer of the daemon other than success: its status and its words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} ({status})")
        self.status = status
        self.message = message


@contextmanager
def map_docker_errors() -> Iterator[None]:
    """Raises what the daemon, httpx or the socket raise as the provider error that it means."""
    try:
        yield
    except Refusal as exc:
        raise _meaning(exc) from exc
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise ProviderDown(f"the daemon does not take the connection ({exc}): {REMEDY}") from exc
    except PermissionError as exc:
        raise AuthError(f"the socket may not be used: {exc}") from exc
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise ProviderDown(f"nobody listens at the socket ({exc}): {REMEDY}") from exc
    except httpx.TransportError as exc:
        raise Ambiguous(f"the daemon was asked and did not answer ({type(exc).__name__}): {exc}") from exc
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise StreamLost(f"the connection to the container was cut: {exc}") from exc


def _meaning(refusal: Refusal) -> Exception:
    """The statuses are those of the Docker Engine API v1.41; podman 4.3 uses the same."""
    said = str(refusal)
    lower = said.lower()
    if any(words in lower for words in _FULL):
        return CapacityError(said)
    if "no such container" in lower or "no such exec" in lower:
        return SandboxGone(said)  # podman says some of these with 500
    if "name" in lower and "already in use" in lower:
        return Conflict(said)  # podman with 500, Docker with 409
    if refusal.status == 404:
        return InvalidSpec(said) if "image" in lower or "network" in lower else SandboxGone(said)
    if refusal.status == 409:
        # The same status says that a container is stopped, is being removed or is paused.
        gone = "not running" in lower or "is not in" in lower or "stopped" in lower or "improper" in lower
        return SandboxGone(said) if gone else Conflict(said)
    if refusal.status == 400:
        return InvalidSpec(said)
    if refusal.status in (401, 403):
        return AuthError(said)
    if refusal.status == 503:
        return ProviderDown(said)
    return Ambiguous(said)
