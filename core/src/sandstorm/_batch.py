"""Many tasks at once, each result as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from sandstorm._collapse import collapsed
from sandstorm._errors import InvalidInput
from sandstorm._plan import Request
from sandstorm._result import RunResult
from sandstorm._task import Task

if TYPE_CHECKING:
    from sandstorm._engine import Engine

Finished = tuple[Task, RunResult | Exception]


class Results:
    """What has finished and was not handed out yet."""

    def __init__(self, received: trio.MemoryReceiveChannel[Finished]) -> None:
        self._received = received

    async def next(self) -> Finished | None:
        """The next task that finished, with its result or error; None after the last."""
        try:
            return await self._received.receive()
        except trio.EndOfChannel:
            return None


@asynccontextmanager
async def batch(
    engine: Engine, tasks: Iterable[Task], request_of: Callable[[Task], Request], concurrency: int
) -> AsyncIterator[Results]:
    """Runs the tasks, at most `concurrency` at once; those under way are cancelled where the context ends first."""
    if concurrency < 1:
        raise InvalidInput("concurrency", "a whole number of tasks at once, at least 1", concurrency)
    send, receive = trio.open_memory_channel[Finished](concurrency)
    pending = iter(tasks)

    async def work(send: trio.MemorySendChannel[Finished]) -> None:
        async with send:
            for task in pending:
                try:
                    result: RunResult | Exception = await engine.run(request_of(task))
                except Exception as exc:
                    result = exc
                await send.send((task, result))

    with collapsed():
        async with trio.open_nursery() as nursery, receive:
            async with send:
                for _ in range(concurrency):
                    nursery.start_soon(work, send.clone())
            yield Results(receive)
            nursery.cancel_scope.cancel()
