"""The directory in which sandboxes are recorded: one entry each, named by its marker."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from sandstorm.provider import CapacityError, Conflict, Order, ProviderDown, SandboxGone
from sandstorm_provider_local._owner import is_dead, own_token
from sandstorm_provider_local._removal import remove_tree

_FIRST_UID, _UIDS = 64000, 1000
"""The user ids that sandboxes of root run as: one each, since the kernel counts processes by user id."""
_RECORD = "record.json"


@attrs.frozen(kw_only=True)
class Record:
    """What is written down of a sandbox.

    Attributes:
        marker: Its name.
        owner: The process that looks after it: the router that made it, or its supervisor once that runs.
        created_at: Wall-clock seconds since 1970.
        expires_at: Likewise; past this it is removed by the next session of any router.
        keeps_files: Whether it is a box; a one-shot sandbox is not.
        memory: MiB.
        cpu: vCPU.
        disk: MiB.
        uid: The user id that its programs run as, or None for the caller's own.
        supervised: Whether a supervisor owns it, and not the router that made it.
        offer: The id of the offer that it was made from: another router must not run its programs with less isolation.
        groups: Where the control group of a box is, as `Hierarchy.to_json` has it: another router may have its own elsewhere.
    """

    marker: str
    owner: str
    created_at: float
    expires_at: float
    keeps_files: bool
    memory: int
    cpu: float
    disk: int
    uid: int | None
    supervised: bool = False
    offer: str = "default"
    groups: Mapping[str, Any] | None = None

    @property
    def is_orphaned(self) -> bool:
        """Whether nobody looks after it any more."""
        return is_dead(self.owner)

    def is_stale(self, now: float) -> bool:
        """Whether nobody looks after it and nothing of it is to be kept."""
        return self.is_orphaned and (not self.keeps_files or self.supervised or now >= self.expires_at)


def new_record(order: Order, uid: int | None, *, keeps_files: bool, supervised: bool = False) -> Record:
    """The record of what an order asks for, made by this process."""
    now = time.time()
    return Record(
        marker=order.marker,
        owner=own_token(),
        created_at=now,
        expires_at=now + order.lifetime,
        keeps_files=keeps_files,
        memory=order.offer.memory,
        cpu=order.offer.cpu,
        disk=order.offer.disk,
        uid=uid,
        supervised=supervised,
        offer=order.offer.id,
    )


_FIELDS = frozenset(field.name for field in attrs.fields(Record))
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def is_name(marker: str) -> bool:
    """Whether it can be a marker, and so the name of a file."""
    return _NAME.fullmatch(marker) is not None


def state_directory(setting: str | None) -> Path:
    """The directory, made if it is missing, and refused with `ProviderDown` where it belongs to somebody else."""
    root = os.geteuid() == 0
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if setting:
        path = Path(setting).absolute()
    elif runtime and not root and os.access(runtime, os.W_OK | os.X_OK):
        path = Path(runtime) / "sandstorm"
    else:
        path = Path("/tmp") / f"sandstorm-{os.geteuid()}"  # noqa: S108 - its owner and mode are checked
    # Root's sandboxes run as other users, who must get through to their own work area and see nothing on the way.
    mode = 0o711 if root else 0o700
    try:
        path.mkdir(mode=mode, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ProviderDown(f"{path} is not a directory that only this user can write; remove it or set state_dir")
        path.chmod(mode)
        for name in ("boxes", "sessions", "uids"):
            (path / name).mkdir(mode=mode, exist_ok=True)
        (path / "snapshots").mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ProviderDown(f"no state directory: {exc}") from exc
    return path


class UidLease:
    """A user id that no other living sandbox uses; None for the caller's own where the caller is not root."""

    def __init__(self, state: Path) -> None:
        self.uid: int | None = None
        self._fd = -1
        if os.geteuid() == 0:
            self._fd, self.uid = _lock_uid(state / "uids")

    @property
    def fd(self) -> int | None:
        """The open file that holds it, for another process to hold it on; None where there is no lease."""
        return self._fd if self._fd >= 0 else None

    def close(self) -> None:
        """Lets others have it, unless another process holds it on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock_uid(directory: Path) -> tuple[int, int]:
    start = random.randrange(_UIDS)  # noqa: S311 - spreads, protects nothing
    for step in range(_UIDS):
        uid = _FIRST_UID + (start + step) % _UIDS
        fd = os.open(directory / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
        else:
            return fd, uid
    raise CapacityError(f"all {_UIDS} user ids for sandboxes are in use")


class Records:
    """The sandboxes of this user on this machine. What is added is written in `staging` first, which goes with its router."""

    def __init__(self, state: Path, staging: Path | None = None) -> None:
        self._boxes = state / "boxes"
        self._staging = staging or state

    def directory(self, marker: str) -> Path:
        """The directory of one sandbox, whether it exists or not."""
        return self._boxes / marker

    def add(self, record: Record) -> Path:
        """Records a sandbox and gives its place. Raises `Conflict` if the marker is taken.

        Its place is a directory with the record and the files, or the record itself where there are no files to keep:
        one file is made in a tenth of the time. It appears whole or not at all, whenever this process is killed.
        """
        place, part = self.directory(record.marker), self._staging / f"new-{record.marker}"
        text = json.dumps(attrs.asdict(record))
        try:
            if not record.keeps_files:
                _write_new(part, text)
                os.link(part, place)
                part.unlink()
                return place
            part.mkdir(mode=0o700)
            _write_new(part / _RECORD, text)
            if record.uid is not None and not record.supervised:
                os.chown(part, record.uid, -1)
            os.rename(part, place)  # noqa: PTH104 - Path.rename would say no more
        except BaseException as exc:
            self._drop(part)
            if isinstance(exc, OSError) and exc.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise Conflict(f"the marker {record.marker} is taken") from None
            raise
        return place

    def get(self, marker: str) -> Record:
        """The record of one sandbox. Raises `SandboxGone`."""
        if not is_name(marker):
            raise SandboxGone(f"there is no sandbox {marker!r}")
        try:
            return self._read(self.directory(marker))
        except (OSError, ValueError, TypeError):
            raise SandboxGone(f"there is no sandbox {marker}") from None

    def _read(self, place: Path) -> Record:
        """A record; one that is being written is no JSON yet, and raises as one that is gone."""
        try:
            text = (place / _RECORD).read_text()
        except NotADirectoryError:
            text = place.read_text()
        data: dict[str, Any] = json.loads(text)
        return Record(**{name: value for name, value in data.items() if name in _FIELDS})

    def all(self) -> Iterator[Record]:
        """Every sandbox that is recorded."""
        for directory in sorted(self._boxes.iterdir()):
            with suppress(OSError, ValueError, TypeError):
                yield self._read(directory)

    def remove(self, marker: str) -> None:
        """Forgets a sandbox and deletes its files. Succeeds if there is none."""
        self._drop(self.directory(marker))

    def _drop(self, place: Path) -> None:
        while place.exists():
            # Another process may be removing it too: what has vanished meanwhile makes the rest no less to be removed.
            with suppress(FileNotFoundError):
                try:
                    place.unlink()
                except IsADirectoryError:
                    remove_tree(place)

    def stale(self, now: float) -> list[Record]:
        """Sandboxes that nobody looks after and of which nothing is to be kept."""
        return [record for record in self.all() if record.is_stale(now)]

    def remove_broken(self) -> None:
        """Deletes what has no record: a process was killed while it removed a sandbox, and the rest goes as well."""
        for place in self._boxes.iterdir():
            if place.is_dir() and not (place / _RECORD).exists():
                self._drop(place)


def _write_new(path: Path, text: str) -> None:
    """Writes a file that must not exist yet."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def new_session_directory(state: Path) -> Path:
    """A directory for what one session needs, of which that of dead routers is removed."""
    sessions = state / "sessions"
    for old in sessions.iterdir():
        if is_dead(old.name.rpartition("-")[0]):
            shutil.rmtree(old, ignore_errors=True)
    directory = sessions / f"{own_token()}-{time.monotonic_ns():x}"
    directory.mkdir(mode=0o711)
    return directory
