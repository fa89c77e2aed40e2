"""Sandboxes that their router owns: what they share, and the kind whose main process is the program."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import attrs
import trio

from sandstorm.provider import Command, NotSupported
from sandstorm_provider_local._process import LocalProcess

_SNAPSHOT = "a snapshot runs nothing: create a sandbox whose spec names it"
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


class StoredSnapshot:
    """A snapshot as something that was asked for and can be released; it runs nothing."""

    def __init__(self, snapshot: str, remove: Callable[[], None]) -> None:
        self.id = snapshot
        self.native: object = None
        self._remove = remove

    async def start(self, command: Command) -> LocalProcess:
        """Refused."""
        raise NotSupported(_SNAPSHOT)

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Refused."""
        raise NotSupported(_SNAPSHOT)

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Refused."""
        raise NotSupported(_SNAPSHOT)

    async def destroy(self) -> None:
        """Deletes it. Succeeds if it is gone."""
        await trio.to_thread.run_sync(self._remove)
