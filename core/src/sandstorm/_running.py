"""A program under way in a sandbox that stays: its output as it comes, and what is said to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sandstorm._capture import KILL_SECONDS
from sandstorm._collapse import collapsed
from sandstorm._errors import NotSupported, StreamLost
from sandstorm._result import Artifact, Exit
from sandstorm.provider import Interactive, Output, Process

Event = Output | Artifact | Exit | Exception


class Running:
    """A program under way: iterate for its output; `exit` is set once that has ended."""

    def __init__(self, process: Process, received: trio.MemoryReceiveChannel[Event]) -> None:
        self._process = process
        self._received = received
        self.exit: Exit | None = None

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> Output:
        """The next bytes. Raises `StreamLost` where the stream was cut."""
        while self.exit is None:
            event = await self._received.receive()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Output):
                return event
            if isinstance(event, Exit):
                self.exit = event
        raise StopAsyncIteration

    async def next(self) -> Output | None:
        """The next bytes, or None at the end."""
        return await anext(self, None)

    async def write(self, data: bytes) -> None:
        """Sends bytes to its stdin. Raises `NotSupported` where it was not started as interactive."""
        await self._interactive().write(data)

    async def close_stdin(self) -> None:
        """Ends its stdin."""
        await self._interactive().close_stdin()

    async def signal(self, number: int) -> None:
        """Sends it a signal."""
        await self._interactive().signal(number)

    async def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal."""
        await self._interactive().resize(columns, rows)

    async def kill(self) -> None:
        """Ends the program and everything that it started."""
        await self._process.kill()

    def _interactive(self) -> Interactive:
        if not isinstance(self._process, Interactive):
            raise NotSupported("programs take no input there while they run")
        return self._process


@asynccontextmanager
async def followed(process: Process) -> AsyncIterator[Running]:
    """The program's output as it comes. It is killed where the context ends first."""
    send, receive = trio.open_memory_channel[Event](0)
    running = Running(process, receive)
    with collapsed():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump, process, send)
            try:
                yield running
            finally:
                nursery.cancel_scope.cancel()
                if running.exit is None:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + KILL_SECONDS):
                        await process.kill()


async def _pump(process: Process, send: trio.MemorySendChannel[Event]) -> None:
    async with send:
        try:
            async with process.events() as events:
                async for event in events:
                    await send.send(event)
                    if isinstance(event, Exit):
                        return
            await send.send(StreamLost("the output ended without an exit"))
        except Exception as exc:
            await send.send(exc)
