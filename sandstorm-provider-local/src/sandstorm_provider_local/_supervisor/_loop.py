"""One thread that waits for open files and for moments."""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

READ, WRITE, HANGUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR


class Loop:
    """Calls whoever watches an open file when it is ready, and whoever waits for a moment when it comes."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._moments: dict[int, tuple[float, Callable[[], object]]] = {}
        self._made = 0

    def watch(self, fd: int, handler: Callable[[int], None], events: int = READ) -> None:
        """Calls `handler` with the events whenever `fd` is ready; a second call changes both."""
        if fd in self._handlers:
            self._poll.modify(fd, events)
        else:
            self._poll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watches `fd` no longer. Call it before the file is closed; harmless where it was not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def at(self, moment: float, call: Callable[[], object]) -> int:
        """Calls `call` once at a moment of the monotonic clock. The number is for `cancel`."""
        self._made += 1
        self._moments[self._made] = (moment, call)
        return self._made

    def after(self, seconds: float, call: Callable[[], object]) -> int:
        """Calls `call` once, so many seconds from now."""
        return self.at(time.monotonic() + seconds, call)

    def cancel(self, number: int | None) -> None:
        """Takes a moment back; harmless where it has come."""
        if number is not None:
            self._moments.pop(number, None)

    def run(self, after_each: Callable[[], None]) -> NoReturn:
        """Serves for ever; calls `after_each` when a round of ready files is done."""
        while True:
            for fd, events in self._poll.poll(self._pause()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(events)
            now = time.monotonic()
            for number, (moment, call) in list(self._moments.items()):
                if moment <= now and self._moments.pop(number, None) is not None:
                    call()
            after_each()

    def _pause(self) -> float:
        if not self._moments:
            return -1.0
        return max(0.0, min(moment for moment, _ in self._moments.values()) - time.monotonic())
