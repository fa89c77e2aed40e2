"""Files of a box, reached from outside without leaving its work area.

The program may have planted symbolic links, pipes or anything else, and may change them at any moment: so every step
opens one component relative to the directory before it, and never follows a link. All of it is done as the box's own
user, so that nothing passes that the program could not do itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sandstorm.provider import CapacityError, FileInfo, InvalidInput, InvalidSpec, ProviderDown, SandboxGone, refuse_escape

T = TypeVar("T")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe that was planted would block without O_NONBLOCK.
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_DEEPEST = 128
"""Levels below the work area that are walked; each holds a descriptor of the router's."""
_NOT_PLAIN = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EEXIST)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def _acting_as(user: int | None) -> Iterator[None]:
    """Makes the calling thread touch files as `user` alone, or as itself where that is None."""
    if user is None:
        yield
        return
    own_user, own_group = os.geteuid(), os.getegid()
    try:
        _libc.setfsgid(user)
        _libc.setfsuid(user)
        if _libc.setfsuid(-1) != user or _libc.setfsgid(-1) != user:
            raise ProviderDown(f"files cannot be touched as user {user}: the router needs CAP_SETUID and CAP_SETGID")
        yield
    finally:
        _libc.setfsuid(own_user)
        _libc.setfsgid(own_group)


class WorkArea:
    """The files of one box. Its methods block: call them through `act`, in a worker thread.

    `root` is an open directory, which it takes over, and `user` the user id whose files they are; None for the caller's own.
    """

    def __init__(self, root: int, user: int | None) -> None:
        self._root = root
        self._user = user
        self._lock = threading.Lock()

    def close(self) -> None:
        """Lets go of it. Where it is in memory and its box is gone, that memory is free from then on."""
        with self._lock:
            root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    def act(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by this thread as the box's user."""
        with _acting_as(self._user):
            return work()

    def open_for_writing(self, path: str) -> int:
        """An empty file. Raises `InvalidSpec` where something other than a file or a directory is in the way."""
        *parents, name = parts_of(path)
        with explained(path), self._directory(parents, make=True) as directory:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | _FILE, 0o644, dir_fd=directory)
            try:
                _refuse_special(fd, path)
                os.ftruncate(fd, 0)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def open_for_reading(self, path: str) -> int:
        """A file. Raises `FileNotFoundError`, or `InvalidSpec` where it is not a file in the work area."""
        *parents, name = parts_of(path)
        with explained(path), self._directory(parents) as directory:
            fd = os.open(name, os.O_RDONLY | _FILE, dir_fd=directory)
            try:
                _refuse_special(fd, path)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def open_directory(self, path: str) -> int:
        """A directory, the work area itself included."""
        with explained(path), self._directory(parts_of(path, area=True)) as directory:
            # Not a copy of the descriptor: copies share one place in the listing.
            return os.open(".", _DIRECTORY, dir_fd=directory)

    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file, parents included."""
        fd = self.open_for_writing(path)
        try:
            with explained(path):
                write_all(fd, (data,))
        finally:
            os.close(fd)

    def stat(self, path: str) -> FileInfo:
        """One entry; a link is not followed."""
        parts = parts_of(path, area=True)
        with explained(path), self._directory(parts[:-1]) as directory:
            if not parts:
                return _info(".", os.fstat(directory))
            return _info("/".join(parts), os.stat(parts[-1], dir_fd=directory, follow_symlinks=False))

    def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        with explained(path), self._directory(parts_of(path, area=True), make=True):
            pass

    def list(self, path: str, *, recursive: bool) -> Generator[FileInfo]:
        """What is below a directory; each directory comes before what is in it. What vanishes meanwhile is left out."""
        parts = parts_of(path, area=True)
        fd = self.open_directory(path)
        try:
            yield from _entries(fd, "".join(f"{part}/" for part in parts), _DEEPEST if recursive else 0)
        finally:
            os.close(fd)

    def remove(self, path: str) -> None:
        """Removes a file, a link, or a directory with all that is in it."""
        *parents, name = parts_of(path)
        with explained(path), self._directory(parents) as directory:
            _remove(name, directory, path, _DEEPEST)

    def used(self) -> int:
        """Bytes that its files take."""
        total = 0
        for _, directories, files, fd in os.fwalk(".", dir_fd=self._root, follow_symlinks=False):
            for name in (*directories, *files):
                with suppress(OSError):
                    total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
        return total

    @contextmanager
    def _directory(self, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
        with self._lock:
            if self._root < 0:
                raise SandboxGone("the sandbox is gone, and its files with it")
            # A copy, so that the number cannot come to mean another file while this thread uses it.
            current = os.dup(self._root)
        try:
            for part in parts:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=current)
                below = os.open(part, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)


def parts_of(path: str, *, area: bool = False) -> list[str]:
    """The components of a path. Raises `InvalidInput` where it may leave the work area; `area` allows the area itself."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if parts or not area or path.startswith("/") or not path:
        refuse_escape("path", path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidInput("path", "a name that can be encoded", path) from None
    return parts


def write_all(fd: int, data: Sequence[bytes]) -> None:
    """Writes every byte of every piece."""
    views = [memoryview(piece) for piece in data if piece]
    while views:
        done = os.writev(fd, views[:1024])
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Raises what the system says about a path as an error of the contract. `FileNotFoundError` stays what it is."""
    try:
        yield
    except OSError as exc:
        said = os.strerror(exc.errno or 0)
        if exc.errno in _NOT_PLAIN:
            raise InvalidSpec(f"{path}: not a plain path in the work area ({said})") from exc
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise InvalidSpec(f"{path}: {said}; a program of the sandbox can change the mode back with chmod") from exc
        if exc.errno in _FULL:
            raise CapacityError(f"{path}: the disk of the sandbox is full; remove files, or ask for a larger disk") from exc
        if exc.errno == errno.ENAMETOOLONG:
            raise InvalidInput("path", "names of at most 255 bytes", path) from exc
        raise


def _refuse_special(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise InvalidSpec(f"{path} is not a file")


def _info(path: str, found: os.stat_result) -> FileInfo:
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "other")
    size = found.st_size if kind == "file" else 0
    return FileInfo(path=path, kind=kind, size=size, mode=stat.S_IMODE(found.st_mode), modified=found.st_mtime)


def _entries(fd: int, prefix: str, depth: int) -> Iterator[FileInfo]:
    with os.scandir(fd) as entries:
        for entry in entries:
            try:
                info = _info(prefix + entry.name, entry.stat(follow_symlinks=False))
            except FileNotFoundError:
                continue
            yield info
            if depth and info.kind == "directory":
                yield from _below(fd, entry.name, info.path, depth)


def _below(parent: int, name: str, path: str, depth: int) -> Iterator[FileInfo]:
    if depth == 1:
        raise InvalidSpec(f"{path[:80]}…: nested deeper than {_DEEPEST} directories; list a directory further down")
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError:  # it has been removed or replaced, or may not be read
        return
    try:
        yield from _entries(fd, f"{path}/", depth - 1)
    finally:
        os.close(fd)


def _remove(name: str, parent: int, path: str, depth: int) -> None:
    try:
        os.unlink(name, dir_fd=parent)
        return
    except OSError as exc:
        if exc.errno not in (errno.EISDIR, errno.EPERM):
            raise
    if depth == 0:
        raise InvalidSpec(f"{path}: nested deeper than {_DEEPEST} directories; remove it with a program of the sandbox")
    fd = _open_despite_mode(name, parent)
    try:
        for below in os.listdir(fd):  # noqa: PTH208 - pathlib knows no descriptors
            with suppress(FileNotFoundError):
                _remove(below, fd, path, depth - 1)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _open_despite_mode(name: str, parent: int) -> int:
    """A directory of which the program may have taken its own permissions away."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        found = f"/proc/self/fd/{handle}"
        if os.fstat(handle).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            Path(found).chmod(stat.S_IRWXU)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
