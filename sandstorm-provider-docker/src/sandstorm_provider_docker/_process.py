"""A program in a container, as events.

The daemon reports a program that a signal ended as exit code 128 + n, and so does a shell: the two cannot be told apart
from outside. A code from 129 to 159 is therefore named a signal; `Exit.status` is the same number either way.
"""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any

import attrs
import trio

from sandstorm.provider import Artifact, Command, Exit, NotSupported, Output, ProviderError, SandboxGone, SandboxLost, StreamLost
from sandstorm_provider_docker._agent import Answer
from sandstorm_provider_docker._errors import map_docker_errors
from sandstorm_provider_docker._stream import Reader

_LOOK = 0.5
"""Seconds between two looks at whether a program has ended; the end of its output is looked after at once."""
_CLEANUP = 30.0
_LAST_SIGNAL = 31


@attrs.frozen(kw_only=True)
class Controls:
    """What a program's sandbox does for it.

    Attributes:
        sweep: Kills a group.
        signal: Sends a signal to a process of a group.
        inspect: What the daemon says of an exec.
        resize: Sets the size of an exec's terminal, columns and rows.
        count_ooms: Takes the agent's count of kills; whether it has grown.
    """

    sweep: Callable[[int], Awaitable[Answer]]
    signal: Callable[[int, int, int], Awaitable[Answer]]
    inspect: Callable[[str], Awaitable[dict[str, Any]]]
    resize: Callable[[str, int, int], Awaitable[None]]
    count_ooms: Callable[[int], bool]


class DockerProcess:
    """A started program. Its id is the daemon's id of its exec."""

    def __init__(self, exec_id: str, reader: Reader, command: Command, group: int, pid: int, controls: Controls) -> None:
        self.id = exec_id
        self._reader = reader
        self._command = command
        self._group = group
        self._pid = pid
        self._controls = controls
        self._deadline = trio.current_time() + command.timeout
        self._reason: str | None = None
        self._swept = False
        self._look_now = trio.Event()
        self._ended = trio.Event()
        self._fed = trio.Event()
        self._exit: Exit | None = None
        self._lost: Exception | None = None
        self._closed = False

    # --- what the contract asks for -----------------------------------------------------------------------

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What the program writes, exactly, and its `Exit` last. To be entered once.

        Raises `StreamLost` where the connection was cut, and `SandboxLost` where the container has ended.
        """
        return self._events()

    @asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[Output | Artifact | Exit]]:
        async with aclosing(self._pump()) as events:
            yield events

    async def kill(self) -> None:
        """Ends the whole process tree, daemons included. Succeeds if it has ended."""
        if not self._ended.is_set():
            await self._end("killed")
            with trio.move_on_after(_CLEANUP):
                await self._ended.wait()

    async def write(self, data: bytes) -> None:
        """Sends bytes to the program's stdin. Raises `StreamLost` once it has ended."""
        self._refuse_unless(self._command.interactive or self._command.terminal is not None, "its stdin was not kept open")
        await self._fed.wait()
        with map_docker_errors():
            await self._reader.stream.send(data)

    async def close_stdin(self) -> None:
        """Ends the program's stdin."""
        self._refuse_unless(self._command.interactive or self._command.terminal is not None, "its stdin was not kept open")
        await self._fed.wait()
        with map_docker_errors():
            await self._reader.stream.send_end()

    async def signal(self, number: int) -> None:
        """Sends a signal to the program itself. Succeeds if it has ended."""
        await self._controls.signal(self._group, self._pid, number)

    async def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal."""
        self._refuse_unless(self._command.terminal is not None, "it has no terminal")
        await self._controls.resize(self.id, columns, rows)

    @property
    def closed(self) -> bool:
        """Whether nothing more can come of it."""
        return self._closed

    # --- how it ends --------------------------------------------------------------------------------------

    async def feed(self) -> None:
        """Sends what the command has for stdin, and ends it unless it is interactive."""
        try:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if self._command.stdin:
                    await self._reader.stream.send(self._command.stdin)
                if not self._command.interactive and self._command.terminal is None:
                    await self._reader.stream.send_end()
        finally:
            self._fed.set()

    async def watch(self) -> None:
        """Returns when the program has ended and its tree is gone; ends it at its deadline."""
        try:
            self._exit = await self._outcome()
        except Exception as exc:
            self._lost = exc
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Closes its connection."""
        self._closed = True
        await self._reader.stream.close()

    async def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._look_now.set()
        try:
            await self._sweep()
        except ProviderError as exc:
            # The one who watches says what became of it.
            self._lost = self._lost or exc

    async def _outcome(self) -> Exit:
        while True:
            found = await self._controls.inspect(self.id)
            if not found.get("Running"):
                return await self._told(found.get("ExitCode"))
            with trio.move_on_after(_LOOK):
                with trio.move_on_at(self._deadline) as late:
                    await self._look_now.wait()
                if late.cancelled_caught:
                    self._deadline = math.inf
                    await self._end("deadline")
            if self._look_now.is_set():
                self._look_now = trio.Event()
                await trio.sleep(0.005)

    async def _sweep(self) -> Answer:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP):
            answer = await self._controls.sweep(self._group)
            if not answer.done:
                raise SandboxLost("its processes could not be killed")
            return answer
        raise SandboxLost("its processes were not killed in time")

    async def _told(self, code: int | None) -> Exit:
        answer = await self._sweep()
        starved = self._controls.count_ooms(answer.ooms)
        if self._reason in ("deadline", "output-limit"):
            return Exit(kind=self._reason, signal=signal.SIGKILL)
        if code == 128 + signal.SIGKILL and starved and self._reason is None:
            return Exit(kind="out-of-memory", signal=signal.SIGKILL)
        if self._reason == "killed":
            return Exit(kind="signal", signal=signal.SIGKILL)
        if code is None or code < 0:
            raise SandboxLost("the daemon does not know how the program ended")
        if 128 < code <= 128 + _LAST_SIGNAL:
            return Exit(kind="signal", signal=code - 128)
        return Exit(code=code)

    # --- its output ---------------------------------------------------------------------------------------

    async def _pump(self) -> AsyncGenerator[Output | Artifact | Exit]:
        offsets = {"stdout": 0, "stderr": 0}
        left = self._command.output_limit
        try:
            while (piece := await self._reader.receive()) is not None:
                stream, data = piece
                kept = data[:left]
                if kept:
                    yield Output(stream, kept, offsets[stream])
                offsets[stream] += len(kept)
                left -= len(kept)
                if len(kept) < len(data):
                    await self._end("output-limit")
        except StreamLost:
            await self._say_lost()
            raise
        self._look_now.set()
        await self._ended.wait()
        await self.close()
        if self._exit is None:
            assert self._lost is not None
            raise _lost(self._lost)
        yield self._exit

    async def _say_lost(self) -> None:
        """Raises `SandboxLost` where the stream was cut because the container has ended."""
        self._look_now.set()
        with trio.move_on_after(_LOOK):
            await self._ended.wait()
        if isinstance(self._lost, (SandboxLost, SandboxGone)):
            raise _lost(self._lost)

    def _refuse_unless(self, condition: bool, reason: str) -> None:
        if not condition:
            raise NotSupported(f"{reason}: ask for it when the program is started")


def _lost(cause: Exception) -> Exception:
    """What the follower of a program is told: it had started, so that a gone container is a lost one."""
    if isinstance(cause, SandboxGone):
        return SandboxLost(f"the container ended: {cause}")
    return cause if isinstance(cause, SandboxLost) else StreamLost(f"the program's end could not be learned: {cause}")
