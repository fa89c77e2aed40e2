"""The daemon's HTTP API over its unix socket: plain calls through httpx, and upgraded connections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import httpx
import trio

from sandstorm_provider_docker._errors import Refusal, map_docker_errors
from sandstorm_provider_docker._stream import Stream, upgrade

_CONNECT = 5.0
_ANSWER = 60.0
"""Seconds without an answer after which a call is given up."""


class Daemon:
    """One API socket. Errors are mapped."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._version = ""
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=path, retries=0),
            base_url="http://daemon",
            timeout=httpx.Timeout(_ANSWER, connect=_CONNECT),
            trust_env=False,
        )

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.aclose()

    async def negotiate(self) -> dict[str, Any]:
        """What the daemon says of itself; its API version is spoken from now on, v1.41 at most."""
        answer: dict[str, Any] = await self.call("GET", "/version")
        theirs = tuple(int(part) for part in str(answer.get("ApiVersion", "1.41")).split(".")[:2])
        major, minor = min(theirs, (1, 41))
        least = tuple(int(part) for part in str(answer.get("MinAPIVersion") or "1.24").split(".")[:2])
        # A newer Docker may refuse to speak what is old to it; what is used here has not changed since v1.41.
        major, minor = max((major, minor), (least[0], least[1]))
        self._version = f"/v{major}.{minor}"
        return answer

    async def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """The decoded answer, or None for an empty one."""
        with map_docker_errors():
            response = await self._client.request(method, self._url(path, query), json=body)
            if response.is_error:
                raise Refusal(response.status_code, _message(response.content))
        return response.json() if response.content.strip() else None

    async def pull(self, image: str, seconds: float) -> str | None:
        """Pulls an image; what the daemon says went wrong, or None."""
        url = self._url("/images/create", {"fromImage": _tagged(image)})
        problem: str | None = None
        with map_docker_errors():
            async with self._client.stream("POST", url, timeout=httpx.Timeout(seconds, connect=_CONNECT)) as response:
                if response.is_error:
                    return _message(await response.aread())
                async for line in response.aiter_lines():
                    if line and (said := json.loads(line)).get("error"):
                        problem = problem or str(said["error"])
        return problem

    async def upgraded(self, path: str, body: Any, *, terminal: bool, **query: Any) -> Stream:
        """A connection that has become the stream of a process."""
        with map_docker_errors():
            with trio.fail_after(_ANSWER):
                connection = await trio.open_unix_socket(self.path)
                try:
                    return await upgrade(connection, self._url(path, query), body, terminal=terminal, refuse=_refuse)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await trio.aclose_forcefully(connection)
                    raise
        raise AssertionError

    def _url(self, path: str, query: Mapping[str, Any]) -> str:
        return f"{self._version}{path}" + (f"?{urlencode(query)}" if query else "")


def _tagged(image: str) -> str:
    """The reference with a tag, since one without means every tag to `images/create`."""
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"


def _refuse(status: int, content: bytes) -> Refusal:
    return Refusal(status, _message(content))


def _message(content: bytes) -> str:
    try:
        said = json.loads(content)
        return str(said.get("message") or said.get("cause") or said)
    except (ValueError, AttributeError):
        return content.decode(errors="replace").strip() or "no reason was given"
