"""A router at the other end of a socket: its requests, and the answers and events that it is sent."""

from __future__ import annotations

from sandstorm_provider_local._inside._wire import close_all, receive, send
from sandstorm_provider_local._supervisor._loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Sequence
    from typing import Any

_MOST_WAITING = 4096
"""Messages for a router that does not read, after which it is given up."""
_TURN = 32


class Refused(Exception):
    """A request that cannot be met: the name of an error of the contract, and what to tell people."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


class Connection:
    """One router. `handle` gets each request with its files, of which it takes out those that it keeps."""

    def __init__(
        self,
        loop: Loop,
        sock: socket,
        handle: Callable[[Connection, dict[str, Any], list[int]], dict[str, Any] | None],
        closed: Callable[[Connection], None],
    ) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._socket = sock
        self._handle = handle
        self._closed = closed
        self._waiting: list[tuple[dict[str, Any], tuple[int, ...]]] = []
        self.open = True
        loop.watch(sock.fileno(), self._ready)

    @property
    def busy(self) -> bool:
        """Whether the router has not taken yet what it was sent."""
        return bool(self._waiting)

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Sends a message, now or as soon as the router reads. The files stay the caller's, and open."""
        if not self.open:
            return
        if not self._waiting:
            try:
                send(self._socket, message, fds)
            except BlockingIOError:
                pass
            except OSError:
                return  # it is gone, which is read next
            else:
                return
        self._waiting.append((message, tuple(fds)))
        if len(self._waiting) > _MOST_WAITING:
            self.close()
        else:
            self._loop.watch(self._socket.fileno(), self._ready, READ | WRITE)

    def answer(self, number: int, answer: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Answers a request."""
        self.tell({"n": number, "ok": True, **answer}, fds)

    def refuse(self, number: int, refused: Refused) -> None:
        """Answers a request with an error."""
        self.tell({"n": number, "error": refused.error, "message": str(refused)})

    def farewell(self, message: dict[str, Any]) -> None:
        """Sends the last message. What the router has sent meanwhile is dropped: unread, it would spoil the last message."""
        try:
            while (received := receive(self._socket)) is not None:
                close_all(received[1])
        except (OSError, ValueError):
            pass
        self.tell(message)

    def close(self) -> None:
        """Ends it."""
        if self.open:
            self.open = False
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._closed(self)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        for _ in range(_TURN):
            if not self.open:
                return
            try:
                received = receive(self._socket)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                received = None
            if received is None:
                self.close()
                return
            self.take(*received)

    def _flush(self) -> None:
        while self._waiting:
            try:
                send(self._socket, *self._waiting[0])
            except BlockingIOError:
                return
            except OSError:
                self._waiting.clear()
                return
            del self._waiting[0]
        self._loop.watch(self._socket.fileno(), self._ready)

    def take(self, message: dict[str, Any], fds: list[int]) -> None:
        """Has a request handled, and answers it."""
        number = message.get("n")
        try:
            if not isinstance(number, int):
                self.close()
                return
            try:
                answer = self._handle(self, message, fds)
            except Refused as refused:
                self.refuse(number, refused)
            except (LookupError, TypeError, ValueError) as error:
                self.refuse(number, Refused("InvalidInput", f"{message.get('op')}: {type(error).__name__} {error}"))
            except OSError as error:
                self.refuse(number, Refused("CapacityError", f"{message.get('op')}: {error}"))
            else:
                if answer is not None:
                    self.answer(number, answer)
        finally:
            close_all(fds)
