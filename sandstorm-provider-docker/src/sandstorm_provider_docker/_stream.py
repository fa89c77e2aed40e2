"""The raw stream of a process: HTTP/1.1 upgraded, then frames.

Source: Docker Engine API v1.41, "Attach to a container": status 101 (or 200 without an upgrade), then for each frame a
byte for the stream (1 is stdout, 2 is stderr), three zero bytes, the length in four bytes, big-endian, and the payload.
With a terminal there are no frames. Stdin goes the other way as it is, and ends with half a close.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import trio

from sandstorm.provider import StreamLost

_CHUNK = 64 * 1024
_HEAD_LIMIT = 64 * 1024
_NAMES = {0: "stdout", 1: "stdout", 2: "stderr"}


async def upgrade(
    connection: trio.SocketStream, url: str, body: Any, *, terminal: bool, refuse: Callable[[int, bytes], Exception]
) -> Stream:
    """The connection as a stream, or what `refuse` makes of another status."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = (
        f"POST {url} HTTP/1.1\r\nHost: daemon\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    await connection.send_all(head.encode() + payload)
    got = b""
    while b"\r\n\r\n" not in got:
        data = await connection.receive_some(_CHUNK)
        if not data or len(got) > _HEAD_LIMIT:
            raise trio.BrokenResourceError("the daemon closed the connection instead of answering")
        got += data
    answer, _, rest = got.partition(b"\r\n\r\n")
    first, *lines = answer.decode("latin-1").split("\r\n")
    status = int(first.split()[1])
    if status in (101, 200):
        return Stream(connection, rest, terminal=terminal)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = min(int(headers.get("content-length") or 0), _HEAD_LIMIT)
    while len(rest) < length and (data := await connection.receive_some(_CHUNK)):
        rest += data
    raise refuse(status, rest)


class Stream:
    """Both ways of a process: its output in pieces, and its input."""

    def __init__(self, connection: trio.SocketStream, rest: bytes, *, terminal: bool) -> None:
        self._connection = connection
        self._buffer = bytearray(rest)
        self._terminal = terminal
        self._name = "stdout"
        self._left = 0
        self._sending = trio.Lock()

    async def receive(self) -> tuple[str, bytes] | None:
        """The next piece and the stream that it belongs to, or None at the end. Raises `StreamLost` where it was cut."""
        if self._terminal:
            return await self._piece("stdout", _CHUNK)
        while self._left == 0:
            while len(self._buffer) < 8:
                if not await self._fill():
                    if self._buffer:
                        raise StreamLost("the stream was cut within the head of a frame")
                    return None
            self._name = _NAMES.get(self._buffer[0], "stderr")
            self._left = int.from_bytes(self._buffer[4:8], "big")
            del self._buffer[:8]
        piece = await self._piece(self._name, self._left)
        if piece is None:
            raise StreamLost("the stream was cut within a frame")
        self._left -= len(piece[1])
        return piece

    async def _piece(self, name: str, most: int) -> tuple[str, bytes] | None:
        if not self._buffer and not await self._fill():
            return None
        data = bytes(self._buffer[:most])
        del self._buffer[:most]
        return name, data

    async def _fill(self) -> bool:
        try:
            data = await self._connection.receive_some(_CHUNK)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise StreamLost(f"the stream was cut: {exc}") from exc
        self._buffer += data
        return bool(data)

    async def send(self, data: bytes) -> None:
        """Sends bytes to stdin. Raises `trio.BrokenResourceError` where the process does not listen any more."""
        async with self._sending:
            await self._connection.send_all(data)

    async def send_end(self) -> None:
        """Ends stdin; with a terminal by the character that means it."""
        async with self._sending:
            if self._terminal:
                await self._connection.send_all(b"\x04")
            else:
                await self._connection.send_eof()

    async def close(self) -> None:
        """Closes the connection at once."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._connection)


class Reader:
    """A stream with a first line on stderr (with a terminal: on stdout) that is read apart."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._held: list[tuple[str, bytes]] = []

    async def first_line(self, name: str) -> str | None:
        """The first line of a stream, or None where the stream ended without it."""
        line = bytearray()
        while (piece := await self.stream.receive()) is not None:
            if piece[0] != name:
                self._held.append(piece)
                continue
            line += piece[1]
            if b"\n" in line:
                first, _, rest = bytes(line).partition(b"\n")
                if rest:
                    self._held.append((name, rest))
                return first.decode(errors="replace").rstrip("\r")
            if len(line) > _HEAD_LIMIT:
                break
        self._held.append((name, bytes(line)))
        return None

    async def receive(self) -> tuple[str, bytes] | None:
        """The next piece after that line, or None at the end."""
        return self._held.pop(0) if self._held else await self.stream.receive()
