"""A program that the launcher started."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from sandstorm._errors import Ambiguous, NotSupported, SandboxLost, StreamLost
from sandstorm._launcher._answer import Answer
from sandstorm._result import Artifact, Exit

if TYPE_CHECKING:
    from sandstorm._launcher._starter import Launcher
    from sandstorm.provider import Output

_SHORTEST, _LONGEST = 0.05, 1.0
"""Seconds between two looks, while there is output and when there has been none for long."""


class LaunchedProcess:
    """A `Process` that takes input while it runs, followed by looking at it again and again."""

    def __init__(self, launcher: Launcher, start_id: str, offsets: Mapping[str, int], *, next_input: int) -> None:
        self._launcher = launcher
        self._id = start_id
        self._offsets = {"stdout": 0, "stderr": 0, **offsets}
        self._next_input = next_input
        self._writing = trio.Lock()

    @property
    def id(self) -> str:
        """The start id."""
        return self._id

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What it writes from the given offsets on, then its `Exit`.

        Raises `StreamLost` where no answer comes any more, `SandboxLost` where its supervisor died without a status.
        """
        return self._events()

    async def kill(self) -> None:
        """Ends the whole tree: descendants, its session, and what carries its mark in the environment. Raises `Ambiguous`."""
        state = (await self._launcher.ask("kill", self._id)).state
        if state.state in {"started", "locked"}:
            raise Ambiguous(f"{self._id} was killed, and its end is not written down yet")

    async def write(self, data: bytes) -> None:
        """Sends bytes to stdin, once, whatever becomes of the answers. Raises `NotSupported` where it takes no input."""
        await self._send(data, last=False)

    async def close_stdin(self) -> None:
        """Ends stdin."""
        await self._send(b"", last=True)

    async def signal(self, number: int) -> None:
        """Sends a signal to the program. It is sent once, so a lost answer raises `Ambiguous`."""
        await self._launcher.ask("signal", self._id, str(number), once=True)

    async def resize(self, columns: int, rows: int) -> None:
        """Refused: there is no terminal."""
        raise NotSupported("the launcher gives no terminal")

    async def _send(self, data: bytes, *, last: bool) -> None:
        if not self._next_input:
            raise NotSupported(f"{self._id} was not started as interactive")
        async with self._writing:
            number = "end" if last else str(self._next_input)
            file = await self._launcher.place(data)
            state = (await self._launcher.ask("input", self._id, number, file, await self._launcher.hashed(data))).state
            if not last and state.next_input <= self._next_input:
                raise Ambiguous(f"input {number} of {self._id} did not arrive whole")
            self._next_input += not last

    @asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[Output | Artifact | Exit]]:
        async with aclosing(self._follow()) as events:
            yield events

    async def _follow(self) -> AsyncGenerator[Output | Artifact | Exit, None]:
        from sandstorm.provider import Output

        offsets = dict(self._offsets)
        blocks = str(await self._launcher.blocks())
        pause = _SHORTEST
        while True:
            answer = await self._poll(offsets, blocks)
            state = answer.state
            quiet = True
            for stream, offset in list(offsets.items()):
                if piece := _within(answer, stream, offsets):
                    quiet = False
                    yield Output(stream, piece, offset)
                    offsets[stream] = offset + len(piece)
            if quiet and state.state == "done":
                yield state.exit()
                return
            if quiet and state.state != "started":
                raise SandboxLost(f"the launcher's supervisor of {self._id} is gone without a status ({state.state})")
            pause = min(pause * 1.5, _LONGEST) if quiet else _SHORTEST
            if quiet:
                await trio.sleep(pause)

    async def _poll(self, offsets: Mapping[str, int], blocks: str) -> Answer:
        try:
            return await self._launcher.ask("poll", self._id, str(offsets["stdout"]), str(offsets["stderr"]), blocks)
        except Ambiguous as lost:
            raise StreamLost(f"the output of {self._id} cannot be had: {lost}") from lost


def _within(answer: Answer, stream: str, offsets: Mapping[str, int]) -> bytes:
    """The piece of a stream, up to the output limit and to what there was when the program ended."""
    state = answer.state
    room = state.output_limit - sum(offsets.values())
    if state.state == "done":
        room = min(room, state.totals[stream] - offsets[stream])
    return answer.pieces.get(stream, b"")[: max(room, 0)]
