"""A sandbox and its programs, for async code under trio and asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from sandstorm._box import SNAPSHOT_RETENTION, Box, Watching
from sandstorm._bridge import Bridge
from sandstorm._call import ExecOptions, OnOutput, TaskOptions, known, task_of
from sandstorm._files import FileChange, FileInfo
from sandstorm._result import Exit, RunResult
from sandstorm._running import Running
from sandstorm._transfer import OnBytes

if TYPE_CHECKING:
    from sandstorm._plan import Plan
    from sandstorm.provider import Output


class AsyncBox:
    """A sandbox, for async code. Made by `AsyncSandstorm.sandbox` and `AsyncSandstorm.open_sandbox`."""

    def __init__(self, bridge: Bridge, box: Box) -> None:
        self._bridge = bridge
        self._box = box

    @property
    def id(self) -> str:
        """The vendor's id of the sandbox."""
        return self._box.id

    @property
    def provider(self) -> str:
        """The account that runs it."""
        return self._box.provider

    @property
    def isolation(self) -> str:
        """The level that was verified there."""
        return self._box.isolation

    @property
    def plan(self) -> Plan:
        """The decision that led to it."""
        return self._box.plan

    @property
    def expires_at(self) -> float:
        """Wall-clock seconds since 1970 at which it ends at the latest."""
        return self._box.expires_at

    @property
    def native(self) -> object:
        """The vendor's own handle."""
        return self._box.native

    async def run(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        keep_state: bool = False,
        on_output: OnOutput | None = None,
        **options: Unpack[TaskOptions],
    ) -> RunResult:
        """What came of a program that runs to its end here; see `BlockingBox.run`."""
        task = task_of(code, language, options, TaskOptions)
        return await self._bridge.call(lambda: self._box.run(task, on_output, keep_state=keep_state))

    @asynccontextmanager
    async def exec(self, *argv: str, **options: Unpack[ExecOptions]) -> AsyncIterator[AsyncRunning]:
        """A program whose output is handed out as it comes; it is killed where the context ends first."""
        known(options, ExecOptions)
        async with self._bridge.enter(lambda: self._box.exec(argv, **options)) as running:
            yield AsyncRunning(self._bridge, running)

    async def upload(self, path: str, source: bytes | Path, on_bytes: OnBytes | None = None) -> None:
        """Writes a file in the work area from bytes or from a local file; parents are made."""
        await self._bridge.call(self._box.upload, path, source, on_bytes)

    async def download(self, path: str) -> bytes:
        """The contents of a file in the work area. Raises `FileNotFoundError`."""
        return await self._bridge.call(self._box.download, path)

    async def download_to(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a file of the work area to a local file; its size in bytes."""
        return await self._bridge.call(self._box.download_to, path, target, on_bytes)

    async def upload_directory(self, path: str, source: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a local directory into one of the work area; how many files that were."""
        return await self._bridge.call(self._box.upload_directory, path, source, on_bytes)

    async def download_directory(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> list[FileInfo]:
        """Writes a directory of the work area to a local one; the entries that were left out: links, pipes and the like."""
        return await self._bridge.call(self._box.download_directory, path, target, on_bytes)

    async def list(self, path: str = ".", *, recursive: bool = False) -> list[FileInfo]:
        """What is in a directory of the work area. Raises `FileNotFoundError`."""
        return await self._bridge.call(lambda: self._box.list(path, recursive=recursive))

    async def stat(self, path: str) -> FileInfo:
        """One entry of the work area. Raises `FileNotFoundError`."""
        return await self._bridge.call(self._box.stat, path)

    async def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        await self._bridge.call(self._box.make_directory, path)

    async def remove(self, path: str) -> None:
        """Removes a file, or a directory with all that is in it. Raises `FileNotFoundError`."""
        await self._bridge.call(self._box.remove, path)

    @asynccontextmanager
    async def watch(self, path: str = ".") -> AsyncIterator[AsyncWatching]:
        """The changes in a directory from now on, as they come."""
        async with self._bridge.enter(lambda: self._box.watch(path)) as watching:
            yield AsyncWatching(self._bridge, watching)

    async def url(self, port: int) -> str:
        """The address at which a port of the sandbox can be reached, such as `http://127.0.0.1:41234`."""
        return await self._bridge.call(self._box.url, port)

    async def pause(self) -> None:
        """Stops everything in it; `resume` goes on from there. Its lifetime goes on."""
        await self._bridge.call(self._box.pause)

    async def resume(self) -> None:
        """Goes on after `pause`."""
        await self._bridge.call(self._box.resume)

    async def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now."""
        await self._bridge.call(self._box.extend, lifetime)

    async def snapshot(self, retention: float = SNAPSHOT_RETENTION) -> str:
        """The name of a copy of its files, for `SandboxSpec.snapshot`; it is kept for `retention` seconds."""
        return await self._bridge.call(self._box.snapshot, retention)

    @asynccontextmanager
    async def fork(self, *, keep: bool = False) -> AsyncIterator[AsyncBox]:
        """Another sandbox with the same files, destroyed at the end unless it is to be kept."""
        async with self._bridge.enter(lambda: self._box.fork(keep=keep)) as box:
            yield AsyncBox(self._bridge, box)

    async def destroy(self) -> None:
        """Ends it now, whether it was to be kept or not. Succeeds if it has ended."""
        await self._bridge.call(self._box.destroy)


class AsyncRunning:
    """A program under way: iterate for its output; `exit` is set once that has ended."""

    def __init__(self, bridge: Bridge, running: Running) -> None:
        self._bridge = bridge
        self._running = running

    @property
    def exit(self) -> Exit | None:
        """How the program ended, or None while it runs."""
        return self._running.exit

    def __aiter__(self) -> AsyncRunning:
        return self

    async def __anext__(self) -> Output:
        output = await self._bridge.call(self._running.next)
        if output is None:
            raise StopAsyncIteration
        return output

    async def write(self, data: bytes) -> None:
        """Sends bytes to its stdin. Raises `NotSupported` where it was not started as interactive."""
        await self._bridge.call(self._running.write, data)

    async def close_stdin(self) -> None:
        """Ends its stdin."""
        await self._bridge.call(self._running.close_stdin)

    async def signal(self, number: int) -> None:
        """Sends it a signal."""
        await self._bridge.call(self._running.signal, number)

    async def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal."""
        await self._bridge.call(self._running.resize, columns, rows)

    async def kill(self) -> None:
        """Ends the program and everything that it started."""
        await self._bridge.call(self._running.kill)


class AsyncWatching:
    """The changes in a directory, one after the other."""

    def __init__(self, bridge: Bridge, watching: Watching) -> None:
        self._bridge = bridge
        self._watching = watching

    def __aiter__(self) -> AsyncWatching:
        return self

    async def __anext__(self) -> FileChange:
        change = await self._bridge.call(self._watching.next)
        if change is None:
            raise StopAsyncIteration
        return change
