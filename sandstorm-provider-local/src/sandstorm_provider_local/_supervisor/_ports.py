"""Ports of a box on the host's loopback: whoever connects there is joined to the port inside."""
# ruff: noqa: SIM105 - contextlib takes longer to import than this may take to start

from __future__ import annotations

import errno
import os
import time
from _socket import (
    AF_INET,
    SHUT_WR,
    SO_ERROR,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)

from sandstorm_provider_local._supervisor._agent import Agent
from sandstorm_provider_local._supervisor._loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOOPBACK = "127.0.0.1"
_PATIENCE = 5.0
"""Seconds in which a server that is just starting may begin to listen."""
_AGAIN = 0.05
_CHUNK = 1 << 16
_MOST_CONNECTIONS = 256


class Ports:
    """Listens for the ports that were asked for; `used` is called when a connection begins, and when one ends."""

    def __init__(self, loop: Loop, agent: Agent, used: Callable[[], None]) -> None:
        self._loop = loop
        self._agent = agent
        self._used = used
        self._listeners: dict[int, socket] = {}
        self.connections: set[_Joined] = set()

    def open(self, port: int) -> int:
        """The port on the host's loopback that leads to `port` inside; the same for the same."""
        if not 0 < port < 1 << 16:
            raise ValueError(f"{port} is no port")
        if port not in self._listeners:
            listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
            listener.bind((LOOPBACK, 0))
            listener.listen(128)
            self._listeners[port] = listener
            self._loop.watch(listener.fileno(), lambda _: self._accept(listener, port))
        number: int = self._listeners[port].getsockname()[1]
        return number

    def _accept(self, listener: socket, port: int) -> None:
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - the accept of a bare socket
        except OSError:
            return
        outside = socket(fileno=fd)
        if len(self.connections) >= _MOST_CONNECTIONS:
            outside.close()
            return
        self._used()
        joined = _Joined(self._loop, outside, port, self._closed)
        self.connections.add(joined)
        try:
            self._agent.new_socket(joined.connect)
        except OSError:
            joined.close()

    def _closed(self, joined: _Joined) -> None:
        self._used()
        self.connections.discard(joined)


class _Joined:
    """A connection from outside and the one that it leads to."""

    def __init__(self, loop: Loop, outside: socket, port: int, closed: Callable[[_Joined], None]) -> None:
        self._loop = loop
        self._port = port
        self._closed = closed
        self._outside = outside
        self._inside: socket | None = None
        self._until = time.monotonic() + _PATIENCE
        self._ways: list[_Way] = []
        outside.setblocking(False)

    def connect(self, fd: int) -> None:
        """Takes over a socket of the sandbox, and connects it as soon as something listens."""
        try:
            self._inside = socket(fileno=fd)
        except OSError:
            os.close(fd)
            self.close()
            return
        self._inside.setblocking(False)
        self._try()

    def _try(self) -> None:
        assert self._inside is not None
        error = self._inside.connect_ex((LOOPBACK, self._port))
        if error == errno.EINPROGRESS:
            self._loop.watch(self._inside.fileno(), lambda _: self._connected(), WRITE)
        else:
            self._judge(error)

    def _connected(self) -> None:
        assert self._inside is not None
        self._loop.forget(self._inside.fileno())
        self._judge(self._inside.getsockopt(SOL_SOCKET, SO_ERROR))

    def _judge(self, error: int) -> None:
        assert self._inside is not None
        if error == 0:
            self._ways = [_Way(self._outside, self._inside), _Way(self._inside, self._outside)]
            self._pump()
        elif error in (errno.ECONNREFUSED, errno.ECONNABORTED) and time.monotonic() < self._until:
            self._loop.after(_AGAIN, self._try)
        else:
            self.close()

    def _pump(self) -> None:
        try:
            for way in self._ways:
                way.move()
        except OSError:
            self.close()
            return
        if all(way.ended for way in self._ways):
            self.close()
            return
        there, back = self._ways
        for sock, reading, writing in ((self._outside, there, back), (self._inside, back, there)):
            assert sock is not None
            events = (READ if reading.wants_to_read else 0) | (WRITE if writing.wants_to_write else 0)
            if events:
                self._loop.watch(sock.fileno(), lambda _: self._pump(), events)
            else:
                self._loop.forget(sock.fileno())

    def close(self) -> None:
        """Ends both connections."""
        for sock in (self._outside, self._inside):
            if sock is not None and sock.fileno() >= 0:
                self._loop.forget(sock.fileno())
                sock.close()
        self._closed(self)


class _Way:
    """Bytes in one direction, of which no more are read than are written."""

    def __init__(self, source: socket, target: socket) -> None:
        self._source = source
        self._target = target
        self._rest = memoryview(b"")
        self._at_end = False
        self.ended = False

    @property
    def wants_to_read(self) -> bool:
        """Whether it waits for bytes."""
        return not self._rest and not self._at_end

    @property
    def wants_to_write(self) -> bool:
        """Whether it waits for room."""
        return bool(self._rest)

    def move(self) -> None:
        """Moves what can be moved, and hands the end on. Raises `OSError` where a side is gone."""
        if self.wants_to_read:
            try:
                self._rest = memoryview(self._source.recv(_CHUNK))
            except BlockingIOError:
                return
            self._at_end = not self._rest
        try:
            while self._rest:
                self._rest = self._rest[self._target.send(self._rest) :]
        except BlockingIOError:
            return
        if self._at_end and not self.ended:
            self.ended = True
            try:
                self._target.shutdown(SHUT_WR)
            except OSError:
                pass
