"""A program in a box: its supervisor spools what it writes, and any router reads that from any offset."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from sandstorm.provider import Artifact, Exit, Output, SandboxGone, SandboxLost, StreamLost
from sandstorm_provider_local._inside._wire import in_memory
from sandstorm_provider_local._link import Event, Link

_STREAMS = ("stdout", "stderr")
_READ = 256 * 1024
_INPUT = 1024 * 1024
"""Bytes of input for one request; the next waits until the program has taken them."""
_KILL = 30.0
_FAREWELL = 2.0
"""Seconds between the files of a box and its last word; they are milliseconds."""


class BoxProcess:
    """A started program or cell. `id` means the same to every router here; `spool` is the directory of its output."""

    def __init__(self, link: Link, process_id: str, spool: Path, offsets: Mapping[str, int]) -> None:
        self.id = process_id
        self._link = link
        self._spool = spool
        self._offsets = {stream: offsets.get(stream, 0) for stream in _STREAMS}
        self._totals = dict(self._offsets)
        self._ended: Event | None = None
        self._cut = False
        self._news = trio.Event()

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What the program writes from where the last reading ended, its artifacts, and its `Exit` last.

        Raises `SandboxLost` where the sandbox ends first, and `StreamLost` where what it wrote is not kept any more.
        """
        return self._events()

    @asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[Output | Artifact | Exit]]:
        self._link.listen(self.id, self._take)
        try:
            try:
                await self._link.ask("follow", process=self.id)
            except FileNotFoundError as exc:
                raise StreamLost(f"there is no program {self.id}, or newer output took the place of its own") from exc
            async with aclosing(self._pump()) as events:
                yield events
        finally:
            unheard = self._link.forget(self.id, self._take)
            if unheard and self._ended is None and not self._link.ended.is_set():
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _KILL), suppress(SandboxLost, SandboxGone):
                    await self._link.ask("unfollow", process=self.id)

    async def kill(self) -> None:
        """Ends the whole process tree, daemons included. Succeeds if it, or the sandbox, has ended."""
        with suppress(SandboxGone, SandboxLost, FileNotFoundError):
            await self._link.ask("kill", process=self.id, patience=_KILL)

    # --- Interactive --------------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Sends bytes to the program's stdin; returns once its pipe has taken them. Raises `Conflict` where that is closed."""
        for start in range(0, len(data), _INPUT):
            fd = in_memory(data[start : start + _INPUT])
            try:
                # How long a program takes to read its input is its own affair.
                await self._link.ask("write", (fd,), process=self.id, patience=float("inf"))
            finally:
                os.close(fd)

    async def close_stdin(self) -> None:
        """Ends the program's stdin. Raises `Conflict` where that is closed."""
        await self._link.ask("close_stdin", process=self.id)

    async def signal(self, number: int) -> None:
        """Sends a signal to the program itself. Succeeds if it has ended."""
        with suppress(FileNotFoundError):
            await self._link.ask("signal", process=self.id, number=number)

    async def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal. Raises `Conflict` where it has none."""
        await self._link.ask("resize", process=self.id, columns=columns, rows=rows)

    # --- what the supervisor tells ------------------------------------------------------------------------

    def _take(self, event: Event | None) -> None:
        if event is None:
            self._cut = True
        else:
            for stream in _STREAMS:
                self._totals[stream] = max(self._totals[stream], _size(event.get(stream)))
            if event.get("event") == "exit":
                self._ended = event
        self._news.set()

    async def _pump(self) -> AsyncGenerator[Output | Artifact | Exit]:
        with ExitStack() as stack:
            files: dict[str, int] = {}
            while True:
                self._news = trio.Event()
                ended, cut = self._ended, self._cut
                for stream in _STREAMS:
                    if stream not in files and self._totals[stream] > self._offsets[stream]:
                        try:
                            files[stream] = os.open(self._spool / stream, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                        except FileNotFoundError as exc:
                            raise await self._missing() from exc
                        stack.callback(os.close, files[stream])
                    while data := self._more(stream, files.get(stream)):
                        offset = self._offsets[stream]
                        self._offsets[stream] += len(data)
                        yield Output(stream, data, offset)
                if ended is not None:
                    break
                if cut:
                    raise SandboxLost(f"the sandbox ended while program {self.id} ran")
                await self._news.wait()
        if ended.get("artifacts"):
            try:
                artifacts = await trio.to_thread.run_sync(self._artifacts, ended)
            except FileNotFoundError as exc:
                raise await self._missing() from exc
            for artifact in artifacts:
                yield artifact
        yield _exit(ended.get("exit"))

    async def _missing(self) -> SandboxLost | StreamLost:
        """Why what it wrote is not there: a box that ends removes its files before it says so."""
        with trio.move_on_after(_FAREWELL):
            await self._link.ended.wait()
            return SandboxLost(f"the sandbox ended before the output of program {self.id} was read")
        return StreamLost(f"newer output took the place of that of program {self.id}")

    def _more(self, stream: str, fd: int | None) -> bytes:
        # What the supervisor has not counted may be over the limit of output, and not meant to be seen.
        left = self._totals[stream] - self._offsets[stream]
        return os.pread(fd, min(left, _READ), self._offsets[stream]) if fd is not None and left > 0 else b""

    def _artifacts(self, ended: Event) -> list[Artifact]:
        place = self._spool / "artifacts"
        return [
            Artifact(mime=str(entry["mime"]), name=str(entry["name"]), data=(place / str(number)).read_bytes())
            for number, entry in enumerate(ended["artifacts"])
        ]


def _size(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _exit(told: Any) -> Exit:
    if not isinstance(told, dict):
        raise StreamLost("the supervisor named no exit")
    return Exit(kind=told.get("kind", "exited"), code=told.get("code"), signal=told.get("signal"))
