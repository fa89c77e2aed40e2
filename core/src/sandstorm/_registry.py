"""Which routers over one journal live: each holds the lock of a file that is named by its epoch.

The kernel lets go of a lock when its process ends, however that ends. So a router is dead exactly when its lock can be had.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a system on which several routers can share a file
    fcntl = None  # type: ignore[assignment]


class Registry:
    """The living routers of one journal. `directory` is None for one in memory, whose routers live in this process."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._own: set[int] = set()

    def enter(self, epoch: int) -> int:
        """Takes the lock of an epoch; the open file that holds it, or -1."""
        lock = -1
        if self._directory is not None and fcntl is not None:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self._directory / str(epoch), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._own.add(epoch)
        return lock

    def leave(self, epoch: int, lock: int) -> None:
        """Lets go of it."""
        self._own.discard(epoch)
        if lock >= 0:
            self._remove(epoch)
            os.close(lock)

    def is_living(self, epoch: int) -> bool:
        """Whether the router with this epoch lives. What a dead one left here is removed."""
        if epoch in self._own:
            return True
        if self._directory is None:
            return False
        if fcntl is None:  # it cannot be known, so that nothing is taken from anybody
            return True
        try:
            lock = os.open(self._directory / str(epoch), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove(epoch)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def _remove(self, epoch: int) -> None:
        assert self._directory is not None
        with suppress(FileNotFoundError):
            (self._directory / str(epoch)).unlink()
