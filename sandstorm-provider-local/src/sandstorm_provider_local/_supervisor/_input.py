"""What a program is given to read while it runs."""
# ruff: noqa: SIM105 - contextlib takes longer to import than this may take to start

from __future__ import annotations

import os

from sandstorm_provider_local._supervisor._loop import WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_END_OF_TRANSMISSION = b"\x04"
_CHUNK = 1 << 16


class Input:
    """Writes files into `fd`, one after the other and as fast as the program reads; without it, into a terminal yet to come."""

    def __init__(self, loop: Loop, fd: int | None = None) -> None:
        self._loop = loop
        self._fd = -1 if fd is None else fd
        self._terminal = self._awaited = fd is None
        self._waiting: list[tuple[int, Callable[[bool], None]]] = []
        self._rest = memoryview(b"")
        self._ending = False
        if fd is not None:
            os.set_blocking(fd, False)

    def connect(self, fd: int) -> None:
        """The terminal has come."""
        os.set_blocking(fd, False)
        self._fd, self._awaited = fd, False
        self._advance()

    @property
    def open(self) -> bool:
        """Whether more can be written."""
        return (self._fd >= 0 or self._awaited) and not self._ending

    def write(self, file: int, done: Callable[[bool], None]) -> None:
        """Takes over `file` and calls `done` when all of it is written, or with False once that cannot be any more."""
        self._waiting.append((file, done))
        self._advance()

    def end(self) -> None:
        """Lets the program see the end, after what was written before."""
        self._ending = True
        self._advance()

    def close(self) -> None:
        """Gives up what is not written yet."""
        self._awaited = False
        if self._fd >= 0 and not self._terminal:  # of a terminal, the other direction has the same file, and closes it
            self._loop.forget(self._fd)
            os.close(self._fd)
        self._fd = -1
        self._rest = memoryview(b"")
        waiting, self._waiting = self._waiting, []
        for file, done in waiting:
            os.close(file)
            done(False)

    def _advance(self) -> None:
        if self._awaited:
            return
        try:
            while self._waiting or self._rest:
                if self._fd < 0:
                    raise BrokenPipeError
                if not self._rest:
                    file, done = self._waiting[0]
                    self._rest = memoryview(os.read(file, _CHUNK))
                    if not self._rest:
                        del self._waiting[0]
                        os.close(file)
                        done(True)
                        continue
                self._rest = self._rest[os.write(self._fd, self._rest) :]
        except BlockingIOError:
            self._wait()
            return
        except OSError:
            self.close()
            return
        self._rested()

    def _rested(self) -> None:
        if not self._terminal:
            self._loop.forget(self._fd)
        if self._ending and self._fd >= 0:
            if self._terminal:
                self._ending = False
                try:
                    os.write(self._fd, _END_OF_TRANSMISSION)
                except OSError:
                    pass  # whoever has left so much unread does not wait for the end
            else:
                self.close()

    def _wait(self) -> None:
        if self._terminal:
            self._loop.after(0.005, self._advance)
        else:
            self._loop.watch(self._fd, lambda _: self._advance(), WRITE)
