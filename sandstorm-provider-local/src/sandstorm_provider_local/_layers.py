"""Unpacks the layers of an image into a directory, as data.

Whoever made the image may have written anything into its archives: so every name is resolved inside the directory, as if it were
the root of a file system, and nothing that was unpacked is ever followed by the host. Device nodes and pipes are left out, owners
and set-user-id bits dropped. Whiteouts are those of the OCI image specification, `layer.md`.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import attrs

from sandstorm.provider import InvalidSpec, PreparationFailed

_CHUNK = 1024 * 1024
_LONGEST_READ = 8 * _CHUNK
"""Bytes that the archive module may ask for at once: a header that says it is larger would fill the memory."""
_LINKS = 40
_OPAQUE = ".wh..wh..opq"
_WHITEOUT = ".wh."
_AUFS = ".wh..wh."
_BITS = 0o777
_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@attrs.define(kw_only=True)
class Allowance:
    """What may still be unpacked: bytes of archives and of files, and entries."""

    size: int
    entries: int = 1_000_000
    checkpoint: Callable[[], None] = lambda: None
    """Called for every entry; raises where nobody waits for the result any more."""

    def take(self, size: int) -> None:
        """Raises `InvalidSpec` once more than was allowed is asked for."""
        self.size -= size
        if self.size < 0:
            raise InvalidSpec("the image is larger than an image may be here; see image_disk in the settings")

    def take_entry(self) -> None:
        """Likewise, for one entry."""
        self.checkpoint()
        self.entries -= 1
        if self.entries < 0:
            raise InvalidSpec("the image has more files than an image may have here")


class Bounded(io.RawIOBase):
    """A file that is not read far, nor much at once: what the headers of an archive say may be absurd."""

    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source = source
        self._size = size

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes. Raises `InvalidSpec` for more at once than a sound archive needs."""
        _refuse_absurd(size)
        return self._source.read(size)

    def tell(self) -> int:
        """The position."""
        return self._source.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Goes to a position. Raises `InvalidSpec` where an image may not be as large."""
        if whence != os.SEEK_SET or not 0 <= offset <= self._size:
            raise InvalidSpec("the image is damaged, or larger than an image may be here; see image_disk in the settings")
        return self._source.seek(offset)


class Reader(io.RawIOBase):
    """A stream that is read forwards only, hashed and measured on the way."""

    def __init__(self, source: BinaryIO, allowance: Allowance | None = None) -> None:
        self._source = source
        self._allowance = allowance
        self._hash = hashlib.sha256()
        self._at = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes; fewer only at the end. Raises `InvalidSpec` for more at once than a sound archive needs."""
        _refuse_absurd(size)
        parts = []
        while size:
            data = self._source.read(size)
            if not data:
                break
            parts.append(data)
            size -= len(data)
        data = b"".join(parts)
        if self._allowance is not None:
            self._allowance.take(len(data))
        self._hash.update(data)
        self._at += len(data)
        return data

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fills a buffer."""
        data = self.read(min(len(buffer), _CHUNK))
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Skips forwards. Raises `InvalidSpec` for a step back, which no archive needs that is read in order."""
        if whence != os.SEEK_SET or offset < self._at:
            raise InvalidSpec("the archive points backwards")
        while self._at < offset and self.read(min(_CHUNK, offset - self._at)):
            pass
        return self._at

    def digest(self) -> str:
        """The digest of the whole stream, the part that nobody has read included."""
        while self.read(_CHUNK):
            pass
        return f"sha256:{self._hash.hexdigest()}"


def _refuse_absurd(size: int) -> None:
    if not 0 <= size <= _LONGEST_READ:
        raise InvalidSpec("the archive has a header of an absurd size")


def decompressed(source: BinaryIO) -> BinaryIO:
    """The contents of a file that is a plain or gzip-compressed archive. Raises `InvalidSpec` for another compression."""
    buffered = source if isinstance(source, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, source))
    magic = buffered.peek(6)[:6]
    kind = next((name for prefix, name in _MAGIC.items() if magic.startswith(prefix)), None)
    if kind is None:
        return buffered
    if kind != "gzip":
        remedy = "unpack it, or copy the image with `skopeo copy --dest-compress-format gzip`"
        raise InvalidSpec(f"archives that are compressed with {kind} are not read here; {remedy}")
    return cast(BinaryIO, gzip.GzipFile(fileobj=buffered))


def unpack(archive: BinaryIO, root: Path, allowance: Allowance, diff_id: str | None = None) -> None:
    """Applies one layer to `root`. Raises `InvalidSpec` where it is damaged, tries to get out, or is not what `diff_id` says."""
    reader = Reader(decompressed(archive), allowance)
    layer = _Layer(root, allowance)
    try:
        with tarfile.open(fileobj=reader, mode="r:", errorlevel=2) as members:
            for member in members:
                layer.apply(members, member)
                members.members = []  # type: ignore[attr-defined]  # or it keeps every header
        digest = reader.digest()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno in _OF_THIS_MACHINE:
            raise PreparationFailed(f"the image cannot be unpacked: {exc}") from exc
        raise InvalidSpec(f"the image's archive cannot be unpacked: {exc}") from exc
    if diff_id is not None and digest != diff_id:
        raise InvalidSpec(f"a layer of the image is damaged: {digest} where {diff_id} was expected")


class _Layer:
    """One layer on its way into the root; knows what it has put there, which its own whiteouts leave alone."""

    def __init__(self, root: Path, allowance: Allowance) -> None:
        self._root = root
        self._allowance = allowance
        self._placed: set[Path] = set()

    def apply(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Puts one entry in place."""
        self._allowance.take_entry()
        parts = _parts(member.name)
        if not parts:
            return
        *above, name = parts
        if name.startswith(_WHITEOUT):
            self._remove(above, name)
            return
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            return
        place = self._inside(above, make=True) / name
        self._note(place)
        if member.isdir():
            self._directory(place, member)
            return
        source = self._linked(member) if member.islnk() else None
        if source == place:
            return
        _discard(place)
        if source is not None:
            os.link(source, place, follow_symlinks=False)
        elif member.issym():
            place.symlink_to(member.linkname)
        else:
            self._file(archive, member, place)

    def _directory(self, place: Path, member: tarfile.TarInfo) -> None:
        if place.is_symlink() or not place.is_dir():
            _discard(place)
            place.mkdir()
        place.chmod((member.mode & _BITS) | stat.S_IRWXU)

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
        source = archive.extractfile(member)
        if source is None or member.size < 0:
            raise InvalidSpec(f"the image's {member.name!r} is no file")
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with source, os.fdopen(fd, "wb") as target:
            left = member.size
            while left and (data := source.read(min(_CHUNK, left))):
                if member.issparse():
                    # What a sparse file leaves out is not in the archive, where the rest is counted.
                    self._allowance.take(len(data))
                target.write(data)
                left -= len(data)
            if left:
                raise InvalidSpec(f"the image's {member.name!r} is cut off")
            target.flush()
            os.fchmod(fd, (member.mode & _BITS) | stat.S_IRUSR)
            # Python takes compiled files by the time of their source.
            moment = max(0, int(member.mtime)) % 2**40
            os.utime(fd, (moment, moment))

    def _linked(self, member: tarfile.TarInfo) -> Path:
        """The file to which a hard link leads, which must be one that the image itself has put there."""
        parts = _parts(member.linkname)
        source = self._inside(parts[:-1], make=False) / parts[-1] if parts else self._root
        if not os.path.lexists(source) or stat.S_ISDIR(source.lstat().st_mode):
            raise InvalidSpec(f"the image's link {member.name!r} leads to {member.linkname!r}, which is no file in it")
        return source

    def _remove(self, above: list[str], name: str) -> None:
        try:
            directory = self._inside(above, make=False)
        except InvalidSpec:
            return  # nothing is there to be removed
        if name == _OPAQUE:
            for place in _listed(directory):
                self._remove_lower(place)
        elif not name.startswith(_AUFS):
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in ("", ".", ".."):
                raise InvalidSpec(f"the image removes {name!r}, which is no name")
            self._remove_lower(directory / hidden)

    def _remove_lower(self, place: Path) -> None:
        """Removes what lower layers have put there, and keeps what this one has."""
        if place not in self._placed:
            _discard(place)
        elif not place.is_symlink() and place.is_dir():
            for below in _listed(place):
                self._remove_lower(below)

    def _note(self, place: Path) -> None:
        while place != self._root and place not in self._placed:
            self._placed.add(place)
            place = place.parent

    def _inside(self, parts: list[str], *, make: bool) -> Path:
        """The real directory that these components lead to, with every link resolved as if `root` were `/`."""
        waiting, place, links = list(reversed(parts)), self._root, 0
        while waiting:
            part = waiting.pop()
            if part == "..":
                place = place if place == self._root else place.parent
                continue
            below = place / part
            try:
                mode = below.lstat().st_mode
            except FileNotFoundError:
                if not make:
                    raise InvalidSpec(f"the image has no {'/'.join(parts)!r}") from None
                below.mkdir()
                below.chmod(0o755)
                mode = stat.S_IFDIR
            if stat.S_ISLNK(mode):
                links += 1
                if links > _LINKS:
                    raise InvalidSpec(f"too many links in the image's {'/'.join(parts)!r}")
                target = str(below.readlink())
                place = self._root if target.startswith("/") else place
                waiting += [step for step in reversed(target.split("/")) if step not in ("", ".")]
            elif stat.S_ISDIR(mode):
                place = below
            else:
                raise InvalidSpec(f"the image's {'/'.join(parts)!r} leads through a file")
        return place


def _parts(name: str) -> list[str]:
    """The components of an entry's name. Raises `InvalidSpec` where it climbs."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "//")]
    if ".." in parts or "\0" in name:
        raise InvalidSpec(f"the image has an entry {name!r}, which leads out of it")
    return parts


def _listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def _discard(place: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
    else:
        shutil.rmtree(place)
