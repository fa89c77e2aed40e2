"""The two kinds of sandbox: one whose main process is the program, and one that outlives its programs as files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import attrs
import trio

from sandstorm.provider import Command, NotSupported, SandboxGone
from sandstorm_provider_local._confinement import MIB
from sandstorm_provider_local._process import LocalProcess
from sandstorm_provider_local._workarea import CHUNK, WorkArea, write_all

_CLEANUP = 10.0
"""Seconds after which cleaning up is given up; what is left then is swept later."""


@attrs.frozen
class LocalHandle:
    """What `Sandbox.native` is here.

    Attributes:
        work_area: The host directory of the files, or None where they live in memory.
        process_ids: Process ids of the bubblewraps that were started.
    """

    work_area: str | None
    process_ids: list[int] = attrs.field(factory=list)


class LocalSandbox:
    """What both kinds share: their programs, and how they end."""

    def __init__(self, marker: str, work_area: str | None, release: Callable[[], None]) -> None:
        self.id = marker
        self._handle = LocalHandle(work_area)
        self.native: object = self._handle
        self.gone = False
        self._release = release
        self._processes: list[LocalProcess] = []
        self._ending = trio.Lock()

    def adopt(self, process: LocalProcess) -> None:
        """Takes charge of a program."""
        self._processes.append(process)
        self._handle.process_ids.append(int(process.id))

    def end(self) -> None:
        """Kills all that runs in it, at once."""
        for process in self._processes:
            process.end("killed")

    async def leave(self) -> None:
        """Kills what runs in it and lets it be, files included."""
        for process in self._processes:
            await process.kill()
            process.close()

    async def destroy(self) -> None:
        """Kills what runs, removes files and gives everything back; bounded, and not to be cancelled."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP):
            async with self._ending:
                if self.gone:
                    return
                self.gone = True
                await self.leave()
                try:
                    await self._delete()
                except BaseException:
                    self.gone = False
                    raise

    async def _delete(self) -> None:
        self._release()


class OneShotSandbox(LocalSandbox):
    """A sandbox whose files live in memory and go with its one program."""

    async def start(self, command: Command) -> LocalProcess:
        """Refused: its program was started by `launch`."""
        raise NotSupported("this sandbox has one program, which was started with it")

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Refused: its files are those of the spec."""
        raise NotSupported("the files of this sandbox go with its program: name them in the spec, or create a sandbox")

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Refused: its files are gone with its program."""
        raise NotSupported("the files of this sandbox go with its program: create a sandbox to bring some back")


class Box(LocalSandbox):
    """A sandbox with a work area on disk; each of its programs runs in a bubblewrap of its own."""

    def __init__(
        self,
        marker: str,
        area: WorkArea,
        disk: int,
        release: Callable[[], None],
        begin: Callable[[Box, Command], LocalProcess],
    ) -> None:
        super().__init__(marker, area.path, release)
        self._area = area
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
        with self._area.writing(path) as fd:
            async for chunk in chunks:
                write_all(fd, chunk)
        await trio.lowlevel.checkpoint()

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Reads a file. Raises `FileNotFoundError`, `SandboxGone`, and `InvalidSpec` where it is not a plain file."""
        return self._download(path)

    @asynccontextmanager
    async def _download(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        self._refuse_gone()
        await trio.lowlevel.checkpoint()
        with self._area.reading(path) as fd:

            async def chunks() -> AsyncIterator[bytes]:
                while data := os.read(fd, CHUNK):
                    yield data
                    await trio.lowlevel.checkpoint()

            yield chunks()

    async def _delete(self) -> None:
        await trio.to_thread.run_sync(self._release)

    def _refuse_gone(self) -> None:
        if self.gone or not pathlib.Path(self._area.path).is_dir():
            raise SandboxGone(f"the sandbox {self.id} is gone")
