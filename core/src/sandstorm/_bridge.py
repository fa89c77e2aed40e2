"""How the async client reaches the engine: directly under trio, through a background loop under asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import sniffio

from sandstorm._collapse import collapsed, same_error
from sandstorm._loop import Held, Job, Loop

if TYPE_CHECKING:
    from sandstorm._engine import Engine

Value = TypeVar("Value")
OpenEngine = Callable[[], AbstractAsyncContextManager["Engine"]]


class Bridge(Protocol):
    """Reaches the engine from the caller's loop."""

    async def open(self) -> Engine:
        """The engine, opened."""
        ...

    async def close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Closes it."""
        ...

    async def call(self, function: Callable[..., Awaitable[Value]], *args: Any) -> Value:
        """The result of an async function of the engine."""
        ...

    def enter(self, context: Callable[[], AbstractAsyncContextManager[Value]]) -> AbstractAsyncContextManager[Value]:
        """A context of the engine, as one of the caller's loop."""
        ...


def bridge_here(open_engine: OpenEngine) -> Bridge:
    """The bridge for the async library that is running."""
    return Direct(open_engine) if sniffio.current_async_library() == "trio" else Threaded(open_engine)


class Direct:
    """Under trio: the engine lives in the caller's loop, so that a virtual clock drives it."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._context = open_engine()

    async def open(self) -> Engine:
        """The engine, opened."""
        with collapsed():
            return await self._context.__aenter__()

    async def close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Closes it."""
        try:
            with collapsed():
                return await self._context.__aexit__(kind, error, trace)
        except BaseException as exc:
            if error is not None and same_error(exc, error):
                return False
            raise

    async def call(self, function: Callable[..., Awaitable[Value]], *args: Any) -> Value:
        """The result of an async function of the engine."""
        return await function(*args)

    @asynccontextmanager
    async def enter(self, context: Callable[[], AbstractAsyncContextManager[Value]]) -> AsyncIterator[Value]:
        """A context of the engine. What its block raises comes out as the same object."""
        error: BaseException | None = None
        try:
            async with context() as value:
                try:
                    yield value
                except BaseException as exc:
                    error = exc
                    raise
        except BaseException as exc:
            if error is None or not same_error(exc, error):
                raise
        if error is not None:
            raise error


class Threaded:
    """Under asyncio: the engine lives in a trio loop in a background thread."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._loop = Loop(open_engine)

    async def open(self) -> Engine:
        """The engine, opened."""
        import asyncio

        engine: Engine = await asyncio.to_thread(self._loop.start)
        return engine

    async def close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Closes it."""
        import asyncio

        await asyncio.shield(asyncio.to_thread(self._loop.close))
        return None

    async def call(self, function: Callable[..., Awaitable[Value]], *args: Any) -> Value:
        """The result of an async function of the engine. Cancelling waits until the call has let go."""
        return await _awaited(self._loop.submit(function, *args))

    @asynccontextmanager
    async def enter(self, context: Callable[[], AbstractAsyncContextManager[Value]]) -> AsyncIterator[Value]:
        """A context of the engine, held by a task of the loop."""
        import asyncio

        held = Held(self._loop, context)
        try:
            # Shielded: cancelling the wait would else mark the context as entered, and its making would go on.
            yield await asyncio.shield(asyncio.wrap_future(held.entered))
        finally:
            held.leave() if held.entered.done() else held.job.cancel()
            await _ended(held.job)
        held.job.future.result()


async def _awaited(job: Job[Value]) -> Value:
    import asyncio

    try:
        return await asyncio.shield(asyncio.wrap_future(job.future))
    except asyncio.CancelledError:
        job.cancel()
        await _ended(job)
        raise


async def _ended(job: Job[Any]) -> None:
    """Waits until a job has let go of everything, whatever its result."""
    import asyncio

    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    await done.wait()
