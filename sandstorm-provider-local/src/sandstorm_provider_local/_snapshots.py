"""Snapshots: the files of a box as an archive, kept for as long as was asked and for this user alone."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import attrs
import trio

from sandstorm.provider import CapacityError, Conflict, InvalidSpec, Marker, SandboxGone, SandboxLost
from sandstorm_provider_local._owner import is_dead, own_token
from sandstorm_provider_local._state import is_name

Archive = Callable[[int], Awaitable[int]]
"""Writes an archive to an open file and returns how many bytes that were."""
_END = bytes(1024)
"""What every tar archive ends with."""


@attrs.frozen(kw_only=True)
class SnapshotRecord:
    """What is written down of a snapshot.

    Attributes:
        id: Its name.
        created_at: Wall-clock seconds since 1970.
        expires_at: Likewise; past this it is removed by the next session of any router.
        size: Bytes of the archive.
        sha256: Of the archive, as it was read back after the capture.
    """

    id: str
    created_at: float
    expires_at: float
    size: int
    sha256: str


class Snapshots:
    """The snapshots of this user on this machine."""

    def __init__(self, state: Path) -> None:
        self._directory = state / "snapshots"

    async def capture(self, marker: Marker, retention: float, archive: Archive) -> str:
        """The id of a snapshot that was verified. Raises `Conflict` where the marker is taken."""
        await trio.to_thread.run_sync(self.sweep)
        place = self._place(marker)
        part = self._directory / f"{own_token()}-{marker}.part"
        try:
            file = os.fdopen(_new_file(part), "rb+")
        except OSError as exc:
            raise CapacityError(f"no snapshot can be stored: {exc}") from exc
        try:
            with file:
                size = await archive(file.fileno())
                sha256 = await trio.to_thread.run_sync(_verified, file.fileno(), size)
            now = time.time()
            self._claim(SnapshotRecord(id=marker, created_at=now, expires_at=now + retention, size=size, sha256=sha256))
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
        return marker

    async def fork(self, archive: Archive) -> IO[bytes]:
        """An archive that is nowhere to be found, and gone once it is closed."""
        file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - the caller closes it
        try:
            await archive(file.fileno())
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    async def open(self, snapshot: str) -> IO[bytes]:
        """The archive, once it was verified again. Raises `InvalidSpec` where there is none, `SandboxLost` if it is damaged."""
        record = self.get(snapshot)
        if record is None or record.expires_at <= time.time():
            raise InvalidSpec(f"there is no snapshot {snapshot!r} on this machine; it may be past its retention")
        try:
            file = self._place(snapshot).open("rb")
            if await trio.to_thread.run_sync(_verified, file.fileno(), record.size) != record.sha256:
                file.close()
                raise SandboxLost(f"the snapshot {snapshot} is not what was captured; remove it")
        except FileNotFoundError:
            raise InvalidSpec(f"there is no snapshot {snapshot!r} on this machine") from None
        return file

    def get(self, snapshot: str) -> SnapshotRecord | None:
        """What is known of one snapshot."""
        if not is_name(snapshot):
            return None
        with suppress(OSError, ValueError, TypeError):
            return SnapshotRecord(**json.loads(self._place(snapshot, ".json").read_text()))
        return None

    def all(self) -> Iterator[SnapshotRecord]:
        """Every snapshot that was captured whole."""
        for place in sorted(self._directory.glob("*.json")):
            if (record := self.get(place.stem)) is not None:
                yield record

    def remove(self, snapshot: str) -> None:
        """Deletes a snapshot. Succeeds if there is none."""
        if is_name(snapshot):
            # The record last: without it nobody would know of the rest.
            self._place(snapshot).unlink(missing_ok=True)
            self._place(snapshot, ".json").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what is past its retention, and what dead routers did not capture whole."""
        now = time.time()
        for part in self._directory.glob("*.part"):
            if is_dead("-".join(part.name.split("-")[:3])):
                part.unlink(missing_ok=True)
        for record in list(self.all()):
            if record.expires_at <= now:
                self.remove(record.id)

    def _place(self, snapshot: str, suffix: str = ".tar") -> Path:
        if not is_name(snapshot):
            raise SandboxGone(f"{snapshot!r} is no name of a snapshot")
        return self._directory / (snapshot + suffix)

    def _claim(self, record: SnapshotRecord) -> None:
        part = self._directory / f"{own_token()}-{record.id}.json.part"
        try:
            with os.fdopen(_new_file(part), "w") as file:
                json.dump(attrs.asdict(record), file)
            # Whole or not at all, whenever this process is killed.
            os.link(part, self._place(record.id, ".json"))
        except FileExistsError:
            raise Conflict(f"the marker {record.id} is taken") from None
        finally:
            part.unlink(missing_ok=True)


def _new_file(path: Path) -> int:
    """A new file that is nobody else's business."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _verified(fd: int, size: int) -> str:
    """The digest of an archive that is whole. Raises `SandboxLost` where it is not."""
    digest, left = hashlib.sha256(), size
    offset, end = 0, b""
    while data := os.pread(fd, 1 << 20, offset):
        digest.update(data)
        offset += len(data)
        left -= len(data)
        end = (end + data)[-len(_END) :]
    if left or end != _END:
        raise SandboxLost(f"the archive is not whole: {size - left} of {size} bytes")
    return digest.hexdigest()
