"""The boxes of one session: made here or attached, each with a connection to its supervisor."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import attrs
import trio

from sandstorm.provider import (
    CapacityError,
    InvalidInput,
    NotSupported,
    Order,
    ProviderDown,
    ProviderError,
    SandboxGone,
    SandboxLost,
)
from sandstorm_provider_local._birth import Birth, Scene
from sandstorm_provider_local._box import Box, BoxHandle
from sandstorm_provider_local._cgroup import Hierarchy, sweep
from sandstorm_provider_local._link import Link
from sandstorm_provider_local._owner import own_token
from sandstorm_provider_local._snapshots import Snapshots
from sandstorm_provider_local._state import Record, Records, UidLease, new_record
from sandstorm_provider_local._survey import Ground
from sandstorm_provider_local._workarea import WorkArea

_ENDING = 10.0
"""Seconds that a supervisor gets to end its box; it takes milliseconds."""
_let_go: set[int] = set()
"""Supervisors that this process started and does not look after any more: it still has to take note of their end."""


class Boxes:
    """Those of one session. `copy` makes the fork of a box."""

    def __init__(
        self,
        state: Path,
        records: Records,
        snapshots: Snapshots,
        nursery: trio.Nursery,
        copy: Callable[[Box, Order], Awaitable[Box]],
    ) -> None:
        self._state = state
        self._records = records
        self._snapshots = snapshots
        self._nursery = nursery
        self._copy = copy
        self.live: dict[str, Box] = {}

    async def create(self, ground: Ground, scene: Scene, order: Order, archive: IO[bytes] | None) -> Box:
        """A new box, with the files of an archive and those of the spec. Its failure, or cancellation, leaves nothing."""
        lease = UidLease(self._state)
        try:
            groups = ground.pool.hierarchy.to_json() if ground.pool else None
            record = attrs.evolve(new_record(order, lease.uid, keeps_files=True, supervised=True), groups=groups)
            directory = self._records.add(record)
            try:
                birth = Birth(order=order, record=record, directory=directory, ground=ground, scene=scene, lease=lease)
                pid, connection = birth.start()
            except OSError as exc:
                self._records.remove(record.marker)
                raise CapacityError(f"the sandbox could not be started: {exc}") from exc
            except BaseException:
                self._records.remove(record.marker)
                raise
        finally:
            # The supervisor holds it on.
            lease.close()
        link = self._join(connection, record.marker, pid, child=True, leash=not order.keep)
        try:
            box = await self._greet(record, link)
            if archive is not None:
                await box.restore(archive.fileno())
            if order.spec.files:
                await box.put(order.spec.files)
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(_ENDING), suppress(SandboxGone, SandboxLost, ProviderError):
                    await link.ask("destroy")
                link.close()
            if isinstance(exc, (SandboxLost, SandboxGone)):
                raise ProviderDown(f"the sandbox could not be set up: {link.failure or exc}") from exc
            raise
        return box

    async def attach(self, record: Record) -> Box:
        """A box that runs. Raises `SandboxGone`."""
        try:
            connection = connect(self._records.directory(record.marker))
        except OSError:
            if record.is_stale(time.time()):
                await trio.to_thread.run_sync(self.remove, record)
            raise SandboxGone(f"the sandbox {record.marker} is gone") from None
        link = self._join(connection, record.marker, int(record.owner.split("-")[1]), child=False, leash=False)
        try:
            return await self._greet(record, link)
        except SandboxLost as exc:
            raise SandboxGone(f"the sandbox {record.marker} is gone") from exc

    def known(self, marker: str) -> Box | None:
        """A box to which there is a connection."""
        box = self.live.get(marker)
        return None if box is None or box.link.ended.is_set() else box

    async def look(self, record: Record) -> tuple[str, float | None]:
        """`running` or `paused` with the seconds that it is idle, or `orphaned` where nobody looks after it. Is no activity."""
        if record.is_orphaned:
            return "orphaned", None
        try:
            link = Link(connect(self._records.directory(record.marker)), record.marker)
        except OSError:
            return "orphaned", None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            found = await _look(link)
            link.close()
        return found

    async def close(self) -> None:
        """Lets go of all of them; those that are not kept end."""
        for box in list(self.live.values()):
            box.link.let_go()
        with trio.move_on_after(_ENDING):
            for box in list(self.live.values()):
                await box.link.finished.wait()

    def remove(self, record: Record) -> None:
        """Removes what a supervisor that was killed has left."""
        if record.groups is not None:
            sweep(Hierarchy(**record.groups))
        self._records.remove(record.marker)

    def _join(self, connection: socket.socket, marker: str, pid: int, *, child: bool, leash: bool) -> Link:
        link = Link(connection, marker, leash=leash)
        self._nursery.start_soon(self._attend, link, marker, pid, child)
        return link

    async def _attend(self, link: Link, marker: str, pid: int, child: bool) -> None:
        """Serves a connection to its end, and takes note of the end of the supervisor."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            pidfd = -1
        try:
            await link.run()
            self._forget(marker, link)
            if pidfd >= 0 and (link.leash or link.condemned or not link.left):
                await self._outlive(pidfd, link)
        finally:
            if pidfd >= 0:
                os.close(pidfd)
            if child:
                _let_go.add(pid)
            reap()
            with trio.CancelScope(shield=True):
                await self._clear(marker)
            link.finished.set()

    async def _outlive(self, pidfd: int, link: Link) -> None:
        """Waits for the end of a supervisor; one that was to end its box and hangs is killed, and its box with it."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_ENDING):
                await trio.lowlevel.wait_readable(pidfd)
                return
            if link.condemned:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await trio.lowlevel.wait_readable(pidfd)

    def _forget(self, marker: str, link: Link) -> None:
        box = self.live.get(marker)
        if box is not None and box.link is link:
            del self.live[marker]
            box.lost()

    async def _clear(self, marker: str) -> None:
        with suppress(SandboxGone):
            record = self._records.get(marker)
            # A supervisor that was killed at once has not taken the record over from this process.
            if record.is_stale(time.time()) or record.owner == own_token():
                await trio.to_thread.run_sync(self.remove, record)

    async def _greet(self, record: Record, link: Link) -> Box:
        answer, fds = await link.ask_for_fds("hello")
        root = _only_directory(fds)
        handle = BoxHandle(directory=str(self._records.directory(record.marker)), agent_pid=int(answer["agent_pid"]))
        box = Box(record, handle, link, WorkArea(root, record.uid), self._snapshots, self._copy)
        self.live[record.marker] = box
        if link.ended.is_set():
            self._forget(record.marker, link)
        return box


def connect(directory: Path) -> socket.socket:
    """A connection to the supervisor of the box in this directory. Raises `OSError` where there is none.

    The path of a socket is at most 107 bytes long, and a state directory may have more: so it goes through a descriptor.
    """
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"/proc/self/fd/{place}/sock")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(place)
    return connection


async def _look(link: Link) -> tuple[str, float | None]:
    try:
        seen = await link.ask("look")
    except (ProviderError, SandboxGone):
        return "orphaned", None
    except (NotSupported, InvalidInput):
        # A supervisor of another version: nothing more is known than that it lives.
        return "running", None
    return ("paused" if seen["paused"] else "running"), float(seen["idle"])


def reap() -> None:
    """Takes note of the end of supervisors that this process started and let go."""
    for pid in list(_let_go):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _let_go.discard(pid)


def _only_directory(fds: tuple[int, ...]) -> int:
    """The work area that the supervisor hands over."""
    if len(fds) == 1 and stat.S_ISDIR(os.fstat(fds[0]).st_mode):
        return fds[0]
    for fd in fds:
        os.close(fd)
    raise SandboxLost("its supervisor handed over no work area")
