"""Who uses an entry of a directory: a lock file beside each, which the kernel lets go of when its last holder is gone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lease:
    """An environment in use: it is not removed while this is open.

    Its `fd` may be inherited by another process, which then uses the environment as long as it keeps it open.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Ends the use of this process."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def lock_path(directory: Path, key: str) -> Path:
    """The lock file of a key."""
    return directory / f"{key}.lock"


def locked(directory: Path, key: str, kind: int) -> Lease | None:
    """The lock of a key, or None where others hold it in another way, or for sharing where there is none."""
    path = lock_path(directory, key)
    create = os.O_CREAT if kind == fcntl.LOCK_EX else 0
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | create, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return Lease(fd)
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass  # it was removed together with its environment in between: another one counts now
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
