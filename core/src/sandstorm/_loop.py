"""One trio loop in a background thread, for callers that have none: blocking code and asyncio."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

import trio

from sandstorm._collapse import collapsed

Value = TypeVar("Value")


class Job(Generic[Value]):
    """A call under way in the loop."""

    def __init__(self, loop: Loop) -> None:
        self.future: Future[Value] = Future()
        self._loop = loop
        self._scope = trio.CancelScope()

    def cancel(self) -> None:
        """Cancels the call; its future ends once everything that it held was let go."""
        self._loop.post(self._scope.cancel)

    async def run(self, function: Callable[..., Awaitable[Value]], *args: Any) -> None:
        """Runs the call and hands its result to the future."""
        try:
            with self._scope:
                result = await function(*args)
        except Exception as exc:
            self.future.set_exception(exc)
        except BaseException:
            self.future.set_exception(CancelledError())
            raise
        else:
            if self._scope.cancelled_caught:
                self.future.set_exception(CancelledError())
            else:
                self.future.set_result(result)


class Loop:
    """A trio loop in a thread of its own, with one engine open in it."""

    def __init__(self, open_engine: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._open_engine = open_engine
        self._ready: Future[Any] = Future()
        self._thread = threading.Thread(target=self._main, name="sandstorm", daemon=True)

    def start(self) -> Any:
        """Starts the thread; the engine, once it is open. Raises what opening raised."""
        self._thread.start()
        return self._ready.result()

    def submit(self, function: Callable[..., Awaitable[Value]], *args: Any) -> Job[Value]:
        """Starts a call in the loop."""
        job: Job[Value] = Job(self)
        self.post(lambda: self._nursery.start_soon(job.run, function, *args))
        return job

    def call(self, function: Callable[..., Awaitable[Value]], *args: Any) -> Value:
        """The result of a call, waited for by blocking. Ctrl-C cancels the call and waits until it has let go."""
        job = self.submit(function, *args)
        try:
            return job.future.result()
        except KeyboardInterrupt:
            job.cancel()
            job.future.exception()
            raise

    def post(self, function: Callable[[], object]) -> None:
        """Runs a function in the loop soon."""
        self._token.run_sync_soon(function)

    def close(self) -> None:
        """Cancels what is under way, closes the engine and ends the thread."""
        if self._thread.is_alive():
            self.post(self._stop.set)
            self._thread.join()

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as exc:
            if not self._ready.done():
                self._ready.set_exception(exc)

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        with collapsed():
            async with self._open_engine() as engine, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._ready.set_result(engine)
                await self._stop.wait()
                nursery.cancel_scope.cancel()


class Held(Generic[Value]):
    """An async context manager that is entered and left in one task of the loop."""

    def __init__(self, loop: Loop, context: Callable[[], AbstractAsyncContextManager[Value]]) -> None:
        self.entered: Future[Value] = Future()
        self._leave = trio.Event()
        self._loop = loop
        self.job = loop.submit(self._hold, context)
        self.job.future.add_done_callback(self._ended)

    def leave(self) -> None:
        """Lets the context end; `job.future` tells when it has."""
        self._loop.post(self._leave.set)

    async def _hold(self, context: Callable[[], AbstractAsyncContextManager[Value]]) -> None:
        with collapsed():
            async with context() as value:
                self.entered.set_result(value)
                await self._leave.wait()

    def _ended(self, future: Future[None]) -> None:
        if not self.entered.done():
            self.entered.set_exception(future.exception() or CancelledError())
