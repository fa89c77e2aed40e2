"""Joins the streams, the signals and the terminal of this process to a program in a sandbox."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import attrs
import trio

from sandstorm import AsyncSandstorm, CallerError, Exit, InvalidInput, NotSupported, ProviderError
from sandstorm_cli._ids import beginning

if TYPE_CHECKING:
    from sandstorm import AsyncBox, AsyncRunning
    from sandstorm_cli._shell import Call

_CHUNK = 256 * 1024
_OUTPUT = 1024 * 1024 * 1024
"""Bytes of output after which a program is killed: a provider may have to keep them on disk."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)


def join(settings: str | None, sandbox: str, call: Call) -> Exit:
    """How a program ended that had this process's streams.

    Raises `KeyboardInterrupt` where it had to be abandoned, and `OSError` where its output could not be written; it is killed
    then.
    """
    joint = Joint(settings=settings, sandbox=sandbox, call=call)
    trio.run(joint.run)
    if joint.failed is not None:
        raise joint.failed
    if joint.ended is None:
        raise KeyboardInterrupt
    return joint.ended


@attrs.define(kw_only=True)
class Joint:
    """A program in a sandbox and the streams of this process."""

    settings: str | None
    sandbox: str
    call: Call
    ended: Exit | None = None
    failed: Exception | None = None
    _running: AsyncRunning | None = None
    _presses: int = 0

    async def run(self) -> None:
        """Runs it to its end; `ended` or `failed` is set then, or neither where this process was told to stop."""
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._heed, signals, nursery)
                try:
                    async with AsyncSandstorm(settings=self.settings) as client, _opened(client, self.sandbox) as box:
                        await self._follow(box, nursery)
                except Exception as exc:
                    self.failed = exc
                nursery.cancel_scope.cancel()

    async def _follow(self, box: AsyncBox, nursery: trio.Nursery) -> None:
        async with AsyncExitStack() as stack:
            if self.call.terminal:
                stack.enter_context(raw(sys.stdin.fileno()))
            self._running = running = await self._started(box, stack, nursery)
            targets = {"stdout": sys.stdout.fileno(), "stderr": sys.stderr.fileno()}
            async for output in running:
                await trio.to_thread.run_sync(_write, targets[output.stream], output.data, abandon_on_cancel=True)
            self.ended = running.exit

    async def _started(self, box: AsyncBox, stack: AsyncExitStack, nursery: trio.Nursery) -> AsyncRunning:
        call = self.call
        timeout = call.seconds(box)
        if call.terminal:
            started = box.exec(*call.argv, env=call.env, cwd=call.cwd, timeout=timeout, output_limit=_OUTPUT, terminal=_size())
        elif sys.stdin.isatty():
            return await stack.enter_async_context(
                box.exec(*call.argv, env=call.env, cwd=call.cwd, timeout=timeout, output_limit=_OUTPUT)
            )
        else:
            started = box.exec(*call.argv, env=call.env, cwd=call.cwd, timeout=timeout, output_limit=_OUTPUT, interactive=True)
        try:
            running = await stack.enter_async_context(started)
        except NotSupported:
            if call.terminal:
                raise
            given = await trio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
            started = box.exec(*call.argv, env=call.env, cwd=call.cwd, timeout=timeout, output_limit=_OUTPUT, stdin=given)
            return await stack.enter_async_context(started)
        nursery.start_soon(_feed, running)
        return running

    async def _heed(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            running = self._running
            if number == signal.SIGWINCH:
                if running is not None and self.call.terminal:
                    nursery.start_soon(_quietly, running.resize, *_size())
                continue
            self._presses += 1
            if running is None or number != signal.SIGINT or self._presses > 2:
                nursery.cancel_scope.cancel()
            elif self._presses == 1:
                nursery.start_soon(_interrupt, running)
            else:
                nursery.start_soon(_quietly, running.kill)


@asynccontextmanager
async def _opened(client: AsyncSandstorm, name: str) -> AsyncIterator[AsyncBox]:
    async with AsyncExitStack() as stack:
        try:
            box = await stack.enter_async_context(client.open_sandbox(name))
        except InvalidInput as exc:
            if exc.field != "sandbox" or (full := beginning(name, await client.sandboxes())) == name:
                raise
            box = await stack.enter_async_context(client.open_sandbox(full))
        yield box


async def _feed(running: AsyncRunning) -> None:
    """Passes standard input on until it ends, or the program reads no more."""
    descriptor = sys.stdin.fileno()
    with suppress(CallerError, ProviderError, OSError):
        while data := await trio.to_thread.run_sync(os.read, descriptor, _CHUNK, abandon_on_cancel=True):
            await running.write(data)
        await running.close_stdin()


async def _interrupt(running: AsyncRunning) -> None:
    try:
        await _quietly(running.signal, signal.SIGINT)
    except NotSupported:
        await _quietly(running.kill)


async def _quietly(act: Callable[..., Awaitable[None]], *args: int) -> None:
    """Does it if the program is still there to do it to; its end is told by its output."""
    try:
        await act(*args)
    except NotSupported:
        raise
    except (CallerError, ProviderError):
        pass


def _write(descriptor: int, data: bytes) -> None:
    """Writes all of it past the buffers, which a thread that is given up must not hold."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _size() -> tuple[int, int]:
    """Columns and rows of the terminal at standard input; 80 by 24 where it tells none."""
    try:
        columns, rows = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        columns, rows = 0, 0
    return columns or 80, rows or 24


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Hands every key on as it is pressed; the terminal is as it was before when the block ends, however that is."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        with suppress(termios.error):  # it may be gone: the window was closed
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
