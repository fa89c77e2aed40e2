"""Changes in one directory, through the kernel's inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

from sandstorm.provider import FileChange, ProviderDown, StreamLost

# The kernel's `inotify.h`.
_MODIFY, _CLOSE_WRITE, _ATTRIB = 0x2, 0x8, 0x4
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
_ONLY_DIRECTORY = 0x1000000
_WANTED = _MODIFY | _CLOSE_WRITE | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLY_DIRECTORY
_EVENT = struct.Struct("iIII")
_ROOM = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """What changes in the open directory `directory`. `fd` becomes readable; `path` stands before each name.

    Raises `OSError` where the caller may not read it, and `ProviderDown` where this user has no watch left.
    """

    def __init__(self, directory: int, path: str) -> None:
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise ProviderDown(f"no watch: {os.strerror(ctypes.get_errno())}; raise fs.inotify.max_user_instances")
        self.ended = False
        self._prefix = "".join(f"{part}/" for part in path.split("/") if part not in ("", "."))
        if _libc.inotify_add_watch(self.fd, f"/proc/self/fd/{directory}".encode(), _WANTED) < 0:
            error = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        """Ends it."""
        os.close(self.fd)

    def read(self) -> list[FileChange]:
        """What happened since the last call, each change once. Raises `StreamLost` where some were dropped."""
        try:
            data = os.read(self.fd, _ROOM)
        except BlockingIOError:
            return []
        return list(dict.fromkeys(self._changes(data)))

    def _changes(self, data: bytes) -> Iterator[FileChange]:
        at = 0
        while at < len(data):
            _, mask, _, size = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + size].rstrip(b"\0")
            at += _EVENT.size + size
            if mask & _OVERFLOW:
                raise StreamLost("files changed faster than the changes were read; list the directory, and watch again")
            if mask & (_IGNORED | _UNMOUNT):
                self.ended = True
            elif name:
                kind = "created" if mask & (_CREATE | _MOVED_TO) else "removed" if mask & (_DELETE | _MOVED_FROM) else "changed"
                yield FileChange(self._prefix + os.fsdecode(name), kind)
