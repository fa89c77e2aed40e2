"""What a program writes, on its way from a pipe into a file."""
# ruff: noqa: PTH103, PTH120 - pathlib takes longer to import than this may take to start

from __future__ import annotations

import os

from sandstorm_provider_local._supervisor._loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 16
"""Bytes that a pipe holds, and so the most that is in it when its program ends."""


class Allowance:
    """How much a program may still write, stdout and stderr together; `exceeded` is called once it has written more."""

    def __init__(self, left: int, exceeded: Callable[[], None]) -> None:
        self.left = left
        self._exceeded = exceeded
        self._told = False

    def exceed(self) -> None:
        """Says that there was more."""
        if not self._told:
            self._told = True
            self._exceeded()


class Spool:
    """One stream of one program: `fd` is read until it ends, and `total` bytes of it are in the file at `path`.

    The file and its directory are made for the first byte: on a busy disk that takes longer than a small program runs.
    """

    def __init__(self, loop: Loop, fd: int, path: str, allowance: Allowance, grown: Callable[[], None]) -> None:
        self.total = 0
        self._loop = loop
        self._fd = fd
        self._allowance = allowance
        self._grown = grown
        self._path = path
        self._file = -1
        os.set_blocking(fd, False)
        loop.watch(fd, self._ready)

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self._fd >= 0

    def drain(self) -> None:
        """Takes what is in the pipe now, and no more: a daemon that holds it may go on writing for ever."""
        taken = 0
        while self._fd >= 0 and taken < _CHUNK:
            moved = self._move()
            if moved <= 0:
                break
            taken += moved
        self.close()

    def close(self) -> None:
        """Gives back what it holds."""
        if self._fd >= 0:
            self._loop.forget(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _ready(self, _: int) -> None:
        if self._move() == 0:
            self.close()

    def _move(self) -> int:
        """Moves what is there into the file: how many bytes came, 0 at the end and -1 where there is nothing yet."""
        try:
            if self._allowance.left <= 0:
                dropped = len(os.read(self._fd, _CHUNK))
                if dropped:
                    self._allowance.exceed()
                return dropped
            moved = self._transfer(min(_CHUNK, self._allowance.left))
        except BlockingIOError:
            return -1
        except OSError:
            return self._broken()
        if moved:
            self.total += moved
            self._allowance.left -= moved
            self._grown()
        return moved

    def _transfer(self, most: int) -> int:
        if self._file < 0:
            return self._copy(most)
        return os.splice(self._fd, self._file, most, flags=os.SPLICE_F_NONBLOCK)

    def _copy(self, most: int) -> int:
        data = os.read(self._fd, most)
        if data and self._file < 0:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        return len(data)

    def _broken(self) -> int:
        """The host's disk is full, or so: the rest is dropped, and the program ended."""
        self._allowance.left = 0
        self._allowance.exceed()
        return -1


class TerminalSpool(Spool):
    """The output of a terminal, which ends with an error."""

    def _transfer(self, most: int) -> int:
        return self._copy(most)

    def _broken(self) -> int:
        return 0
