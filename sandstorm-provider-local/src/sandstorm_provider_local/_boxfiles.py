"""The files of a box as the contract asks for them: every step in a worker thread, few steps for many bytes."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping, MutableSequence, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from itertools import islice
from typing import TypeVar

import trio

from sandstorm.provider import FileChange, FileInfo
from sandstorm_provider_local._inotify import DirectoryWatch
from sandstorm_provider_local._workarea import WorkArea, explained, write_all

T = TypeVar("T")

_READ = 1024 * 1024
_WRITE = 1024 * 1024
"""Bytes for one visit to a worker thread: a visit costs about as much as copying 256 KiB."""
_ENTRIES = 256


class BoxFiles:
    """The files of one box, in its work area. Raises `SandboxGone` once that is closed."""

    def __init__(self, area: WorkArea) -> None:
        self._area = area

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file, parents included. Raises `CapacityError` where the disk is full."""
        fd = await self._act(lambda: self._area.open_for_writing(path))
        failed: list[Exception] = []
        try:
            async with trio.open_nursery() as nursery:
                send, receive = trio.open_memory_channel[Sequence[bytes]](0)
                nursery.start_soon(self._write_all, fd, path, receive, failed)
                await _gather(chunks, send, failed)
        finally:
            os.close(fd)
        if failed:
            raise failed[0]

    async def put(self, files: Mapping[str, bytes]) -> None:
        """Writes several files, parents included."""

        def work() -> None:
            for path, data in files.items():
                self._area.write(path, data)

        await self._act(work)

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Reads a file. Raises `FileNotFoundError`, and `InvalidSpec` where it is not a plain file."""
        return self._download(path)

    def list(self, path: str, *, recursive: bool = False) -> AbstractAsyncContextManager[AsyncIterator[FileInfo]]:
        """What is in a directory, itself excluded; links are not followed."""
        return self._list(path, recursive)

    async def stat(self, path: str) -> FileInfo:
        """One entry; a link is not followed."""
        return await self._act(lambda: self._area.stat(path))

    async def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        await self._act(lambda: self._area.make_directory(path))

    async def remove(self, path: str) -> None:
        """Removes a file, a link, or a directory with all that is in it."""
        await self._act(lambda: self._area.remove(path))

    def watch(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[FileChange]]:
        """The changes in a directory from now on; they end with it. Raises `StreamLost` where they come too fast."""
        return self._watch(path)

    async def _act(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(self._area.act, work)

    async def _write_all(
        self, fd: int, path: str, receive: trio.MemoryReceiveChannel[Sequence[bytes]], failed: MutableSequence[Exception]
    ) -> None:
        """Writes while the next pieces are gathered. What goes wrong is left in `failed`, and ends the gathering."""

        def work(pieces: Sequence[bytes]) -> None:
            with explained(path):
                write_all(fd, pieces)

        async with receive:
            async for pieces in receive:
                try:
                    await self._act(partial(work, pieces))
                except Exception as exc:
                    failed.append(exc)
                    return

    @asynccontextmanager
    async def _download(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        fd = await self._act(lambda: self._area.open_for_reading(path))

        async def chunks() -> AsyncGenerator[bytes]:
            while data := await trio.to_thread.run_sync(os.read, fd, _READ):
                yield data

        try:
            async with aclosing(chunks()) as data:
                yield data
        finally:
            os.close(fd)

    @asynccontextmanager
    async def _list(self, path: str, recursive: bool) -> AsyncIterator[AsyncIterator[FileInfo]]:
        found = self._area.list(path, recursive=recursive)

        def some() -> list[FileInfo]:
            with explained(path):
                return list(islice(found, _ENTRIES))

        first = await self._act(some)

        async def entries() -> AsyncGenerator[FileInfo]:
            batch = first
            while batch:
                for entry in batch:
                    yield entry
                batch = await self._act(some)

        try:
            async with aclosing(entries()) as listed:
                yield listed
        finally:
            found.close()

    @asynccontextmanager
    async def _watch(self, path: str) -> AsyncIterator[AsyncIterator[FileChange]]:
        def begin() -> DirectoryWatch:
            fd = self._area.open_directory(path)
            try:
                with explained(path):
                    return DirectoryWatch(fd, path)
            finally:
                os.close(fd)

        watch = await self._act(begin)

        async def changes() -> AsyncGenerator[FileChange]:
            while not watch.ended:
                await trio.lowlevel.wait_readable(watch.fd)
                for change in watch.read():
                    yield change

        try:
            async with aclosing(changes()) as changed:
                yield changed
        finally:
            trio.lowlevel.notify_closing(watch.fd)
            watch.close()


async def _gather(
    chunks: AsyncIterable[bytes], send: trio.MemorySendChannel[Sequence[bytes]], failed: MutableSequence[Exception]
) -> None:
    """Sends the pieces on, several at once. What goes wrong is left in `failed`."""
    async with send:
        try:
            held: list[bytes] = []
            size = 0
            async for chunk in chunks:
                held.append(chunk)
                size += len(chunk)
                if size >= _WRITE:
                    await send.send(held)
                    held, size = [], 0
            if held:
                await send.send(held)
        except trio.BrokenResourceError:
            pass  # the writing has failed, and says why
        except Exception as exc:
            failed.append(exc)
