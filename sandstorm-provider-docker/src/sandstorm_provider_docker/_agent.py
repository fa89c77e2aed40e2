"""The root process in a container that ends trees, sends signals and says what the kernel killed."""

from __future__ import annotations

import attrs
import trio

from sandstorm.provider import SandboxLost, StreamLost
from sandstorm_provider_docker._stream import Stream

_ANSWER = 20.0
"""Seconds in which the agent answers; it needs milliseconds."""


@attrs.frozen
class Answer:
    """What the agent did: whether it worked, and how many processes the kernel has killed for want of memory, ever."""

    done: bool
    ooms: int


class Agent:
    """The connection to it. What comes back is short lines; nothing in the container but root can write them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._text = ""
        self._asked = 0
        self._lock = trio.Lock()

    async def greeting(self) -> dict[str, str]:
        """What it found of its confinement when it began, by name. Raises `SandboxLost` where it did not begin."""
        with trio.move_on_after(_ANSWER):
            word, _, found = (await self._line()).partition(" ")
            facts, _, kernel = found.partition(" kernel=")
            if word == "ready":
                return {**dict(fact.partition("=")[::2] for fact in facts.split()), "kernel": kernel}
        raise SandboxLost("the container's first process did not begin")

    async def sweep(self, group: int) -> Answer:
        """Kills every process of a group, those that were forked meanwhile included."""
        return await self._ask(f"sweep {group}")

    async def signal(self, group: int, pid: int, number: int) -> Answer:
        """Sends a signal to a process if it is of the group."""
        return await self._ask(f"signal {group} {pid} {number}")

    async def close(self) -> None:
        """Lets it go; a container that is leashed ends with that."""
        await self._stream.close()

    async def _ask(self, request: str) -> Answer:
        async with self._lock:
            # Not to be cancelled: the answer would be taken for that of the next request.
            with trio.CancelScope(shield=True), trio.move_on_after(_ANSWER):
                self._asked += 1
                try:
                    await self._stream.send(f"{self._asked} {request}\n".encode())
                except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                    raise SandboxLost(f"the container's first process is gone: {exc}") from exc
                while True:
                    word, number, result, ooms = (await self._line()).split()
                    if (word, number) == ("done", str(self._asked)):
                        return Answer(result == "0", int(ooms))
        raise SandboxLost("the container's first process does not answer")

    async def _line(self) -> str:
        while "\n" not in self._text:
            try:
                piece = await self._stream.receive()
            except StreamLost as exc:
                raise SandboxLost(str(exc)) from exc
            if piece is None:
                said = self._text.strip()
                raise SandboxLost(f"the container's first process has ended{': ' + said if said else ''}")
            self._text += piece[1].decode(errors="replace")
        line, _, self._text = self._text.partition("\n")
        return line
