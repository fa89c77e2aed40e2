"""Files of a box, reached from outside without leaving its work area.

The program may have planted symbolic links, pipes or anything else, and may change them at any moment: so every step
opens one component relative to the directory before it, and never follows a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs

from sandstorm.provider import InvalidSpec, refuse_escape

CHUNK = 256 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe that was planted would block without O_NONBLOCK.
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@attrs.frozen(kw_only=True)
class WorkArea:
    """The files of one box. `path` is its directory on the host, `owner` the user id that its programs run as."""

    path: str
    owner: int | None

    @contextmanager
    def writing(self, path: str) -> Iterator[int]:
        """An open, empty file. Raises `InvalidSpec` where something other than a file or directory is in the way."""
        with self._parent(path, make=True) as (directory, name), _explained(path):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | _FILE, 0o644, dir_fd=directory)
            try:
                _refuse_special(fd, path)
                os.ftruncate(fd, 0)
                self._give(fd)
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def reading(self, path: str) -> Iterator[int]:
        """An open file. Raises `FileNotFoundError`, or `InvalidSpec` where it is not a file in the work area."""
        with self._parent(path, make=False) as (directory, name), _explained(path):
            fd = os.open(name, os.O_RDONLY | _FILE, dir_fd=directory)
            try:
                _refuse_special(fd, path)
                yield fd
            finally:
                os.close(fd)

    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file, parents included."""
        with self.writing(path) as fd:
            write_all(fd, data)

    def used(self) -> int:
        """Bytes that its files take."""
        total = 0
        for _, directories, files, fd in os.fwalk(self.path, follow_symlinks=False):
            for name in (*directories, *files):
                with suppress(OSError):
                    total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
        return total

    @contextmanager
    def _parent(self, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
        refuse_escape("path", path)
        *parents, name = [part for part in path.split("/") if part not in ("", ".")]
        current = os.open(self.path, _DIRECTORY)
        try:
            for part in parents:
                with _explained(path):
                    if make:
                        self._make(part, current)
                    below = os.open(part, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = below
            yield current, name
        finally:
            os.close(current)

    def _make(self, name: str, parent: int) -> None:
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            return
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            self._give(fd)
        finally:
            os.close(fd)

    def _give(self, fd: int) -> None:
        if self.owner is not None:
            os.fchown(fd, self.owner, self.owner)


def write_all(fd: int, data: bytes) -> None:
    """Writes every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _refuse_special(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise InvalidSpec(f"{path} is not a file")


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
            raise InvalidSpec(f"{path}: not a plain path to a file in the work area ({os.strerror(exc.errno)})") from exc
        raise
