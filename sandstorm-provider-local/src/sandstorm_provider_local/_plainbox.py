"""A box without a supervisor: a host directory, and a sandbox of its own for each program, which ends with its router."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from sandstorm.provider import Command, FileChange, FileInfo, SandboxGone
from sandstorm_provider_local._boxfiles import BoxFiles
from sandstorm_provider_local._confinement import MIB
from sandstorm_provider_local._process import LocalProcess
from sandstorm_provider_local._sandbox import LocalSandbox
from sandstorm_provider_local._workarea import WorkArea


class PlainBox(LocalSandbox):
    """A box of a level that has no supervisor. It has `Files` and `Watch`, and no other ability."""

    def __init__(
        self,
        marker: str,
        work: Path,
        area: WorkArea,
        disk: int,
        release: Callable[[], None],
        begin: Callable[[PlainBox, Command], LocalProcess],
    ) -> None:
        super().__init__(marker, str(work), release)
        self._work = work
        self._area = area
        self._files = BoxFiles(area)
        self._disk = disk
        self._begin = begin

    def is_full(self) -> bool:
        """Whether its files take more than its disk."""
        return self._area.used() > self._disk * MIB

    async def start(self, command: Command) -> LocalProcess:
        """Starts a program. Raises `SandboxGone`."""
        await trio.lowlevel.checkpoint()
        self._refuse_gone()
        return self._begin(self, command)

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file, parents included; exact bytes."""
        self._refuse_gone()
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
        self._refuse_gone()
        await self._files.make_directory(path)

    async def remove(self, path: str) -> None:
        """Removes a file, a link, or a directory with all that is in it."""
        await self._files.remove(path)

    def watch(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[FileChange]]:
        """The changes in a directory from now on."""
        return self._files.watch(path)

    async def _delete(self) -> None:
        self._area.close()
        await trio.to_thread.run_sync(self._release)

    def _refuse_gone(self) -> None:
        if self.gone or not self._work.is_dir():
            raise SandboxGone(f"the sandbox {self.id} is gone")
