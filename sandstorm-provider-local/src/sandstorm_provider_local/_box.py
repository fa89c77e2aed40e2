"""A box: a sandbox that a supervisor of its own owns, so that it outlives its programs and, if it is to, its router."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from sandstorm.provider import (
    Command,
    FileChange,
    FileInfo,
    InvalidInput,
    Marker,
    NotSupported,
    Order,
    SandboxGone,
    SandboxLost,
)
from sandstorm_provider_local._boxfiles import BoxFiles
from sandstorm_provider_local._boxprocess import BoxProcess
from sandstorm_provider_local._inside._wire import in_memory
from sandstorm_provider_local._limits import LONGEST_LIFE
from sandstorm_provider_local._link import Link
from sandstorm_provider_local._snapshots import Snapshots
from sandstorm_provider_local._state import Record
from sandstorm_provider_local._workarea import WorkArea

_DESTROY = 10.0
_ARCHIVE = 600.0
_GIB = 1024.0
_PROCESS = re.compile(r"[A-Za-z0-9_-]{1,64}")


@attrs.frozen
class BoxHandle:
    """What `Sandbox.native` is here.

    Attributes:
        directory: The directory of its record and of what its programs wrote.
        agent_pid: The process id, outside, of the first process inside.
    """

    directory: str
    agent_pid: int


class Box:
    """A box, as one router sees it. Raises `SandboxGone` once it is gone, and `SandboxLost` for what that interrupts."""

    def __init__(
        self,
        record: Record,
        handle: BoxHandle,
        link: Link,
        area: WorkArea,
        snapshots: Snapshots,
        copy: Callable[[Box, Order], Awaitable[Box]],
    ) -> None:
        self.id = record.marker
        self.native: object = handle
        self.link = link
        self._record = record
        self._spools = Path(handle.directory) / "out"
        self._area = area
        self._files = BoxFiles(area)
        self._snapshots = snapshots
        self._copy = copy

    # --- programs -----------------------------------------------------------------------------------------

    async def start(self, command: Command) -> BoxProcess:
        """Starts a program; the same start id again gives the same program and starts nothing."""
        fields = {
            "argv": list(command.argv),
            "env": dict(command.env),
            "cwd": command.cwd,
            "interactive": command.interactive,
            "terminal": list(command.terminal) if command.terminal else None,
            "detached": command.detached,
        }
        return await self._begin("start", command, command.stdin, fields)

    async def run_cell(self, code: str, language: str, command: Command) -> BoxProcess:
        """Runs one cell in the warm interpreter of `language`, which is Python."""
        if language != "python":
            raise NotSupported(f"only python is interpreted in cells here, not {language}; run it as a program")
        return await self._begin("cell", command, code.encode(), {"language": language})

    async def process(self, process_id: str, offsets: Mapping[str, int]) -> BoxProcess:
        """A program by its id, whoever started it; its events begin at the offset of each stream."""
        await trio.lowlevel.checkpoint()
        if _PROCESS.fullmatch(process_id) is None:
            raise InvalidInput("process", "the id of a program of this sandbox", process_id)
        return BoxProcess(self.link, process_id, self._spools / process_id, offsets)

    async def _begin(self, op: str, command: Command, data: bytes, fields: dict[str, Any]) -> BoxProcess:
        fds = (in_memory(data),) if data or op == "cell" else ()
        limits: dict[str, Any] = {"start_id": command.start_id, "timeout": command.timeout, "output_limit": command.output_limit}
        try:
            # Not to be cancelled half-way: nobody would know of the program.
            with trio.CancelScope(shield=True):
                answer = await self.link.ask(op, fds, **limits, **fields)
        finally:
            for fd in fds:
                os.close(fd)
        process_id = str(answer["process"])
        process = BoxProcess(self.link, process_id, self._spools / process_id, {})
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await process.kill()
            raise
        return process

    # --- files --------------------------------------------------------------------------------------------

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file, parents included; any size, exact bytes."""
        await self._touch()
        await self._files.upload(path, chunks)

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Reads a file."""
        return self._files.download(path)

    def list(self, path: str, *, recursive: bool = False) -> AbstractAsyncContextManager[AsyncIterator[FileInfo]]:
        """What is in a directory, itself excluded; links are not followed."""
        return self._files.list(path, recursive=recursive)

    async def stat(self, path: str) -> FileInfo:
        """One entry; a link is not followed."""
        return await self._files.stat(path)

    async def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        await self._touch()
        await self._files.make_directory(path)

    async def remove(self, path: str) -> None:
        """Removes a file, a link, or a directory with all that is in it."""
        await self._touch()
        await self._files.remove(path)

    def watch(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[FileChange]]:
        """The changes in a directory from now on."""
        return self._files.watch(path)

    async def put(self, files: Mapping[str, bytes]) -> None:
        """Writes several files."""
        await self._files.put(files)

    async def _touch(self) -> None:
        """Counts as activity. Raises `SandboxGone`."""
        await self.link.ask("touch")

    # --- what else it can do ------------------------------------------------------------------------------

    async def url(self, port: int) -> str:
        """The address on this machine's loopback at which a port can be reached."""
        answer = await self.link.ask("url", port=port)
        return f"http://{answer['address']}:{answer['port']}"

    async def pause(self) -> None:
        """Freezes every process in it. Its lifetime goes on, the deadlines of its programs do not."""
        await self.link.ask("pause")

    async def resume(self) -> None:
        """Continues it."""
        await self.link.ask("resume")

    async def snapshot(self, marker: Marker, retention: float) -> str:
        """The id of a snapshot of the files; programs are stopped while it is taken."""
        return await self._snapshots.capture(marker, retention, self.archive)

    async def archive(self, fd: int) -> int:
        """Writes the files as a tar archive to an open file; its size in bytes."""
        return int((await self.link.ask("archive", (fd,), patience=_ARCHIVE))["size"])

    async def restore(self, fd: int) -> None:
        """Puts the files of an archive into the work area."""
        await self.link.ask("restore", (fd,), patience=_ARCHIVE)

    async def fork(self, order: Order) -> Box:
        """A new box with the same files; programs are not copied."""
        return await self._copy(self, order)

    async def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now, at most seven days."""
        if not 0 < lifetime <= LONGEST_LIFE:
            raise InvalidInput("lifetime", f"more than 0 and at most {LONGEST_LIFE:.0f} seconds", lifetime)
        await self.link.ask("extend", lifetime=lifetime)

    async def usage(self) -> Mapping[str, float]:
        """Its use until now: vCPU-seconds that were used, GiB-seconds that were set aside, and seconds of its life."""
        answer = await self.link.ask("usage")
        age = time.time() - self._record.created_at
        return {
            "cpu": float(answer["cpu_seconds"]),
            "memory": self._record.memory / _GIB * age,
            "disk": self._record.disk / _GIB * age,
            "sandbox": age,
        }

    # --- its end ------------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """Ends it, whoever made it; returns when nothing is left. Bounded, and not to be cancelled."""
        with trio.CancelScope(shield=True):
            self.link.condemned = True
            with suppress(SandboxGone, SandboxLost):
                await self.link.ask("destroy", patience=_DESTROY)
            self.link.close()

    def lost(self) -> None:
        """Gives back what this router holds of it."""
        self._area.close()
