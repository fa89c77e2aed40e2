"""Collects what a program writes, within its limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import attrs
import trio

from sandstorm._errors import ProviderDown, StreamLost
from sandstorm._result import Artifact, Exit
from sandstorm.provider import Command, Output, Process

GRACE_SECONDS = 5.0
"""How long after its deadline a program may still be reported by its provider, before the engine kills it itself."""

KILL_SECONDS = 30.0
"""How long a kill may take before the program counts as lost."""


RECONNECTS, FIRST_PAUSE = 5, 0.2
"""How often a stream that was cut is taken up again, and seconds before the first time; the pause doubles."""

Again = Callable[[str, Mapping[str, int]], Awaitable[Process]]
"""Takes up the output of the program with this id at the offset of each stream."""


@attrs.define
class Capture:
    """What a program wrote so far, and how it ended."""

    stdout: bytearray = attrs.field(factory=bytearray)
    stderr: bytearray = attrs.field(factory=bytearray)
    artifacts: list[Artifact] = attrs.field(factory=list)
    exit: Exit | None = None

    @property
    def size(self) -> int:
        """Bytes of both streams."""
        return len(self.stdout) + len(self.stderr)

    def take(self, output: Output, room: int) -> Output:
        """Appends what was not seen yet, up to `room` bytes; what was appended. Raises `StreamLost` at a gap."""
        stream = self.stdout if output.stream == "stdout" else self.stderr
        start = len(stream)
        if output.offset > start:
            raise StreamLost(f"{output.stream} jumped from byte {start} to byte {output.offset}")
        fresh = output.data[start - output.offset :][:room]
        stream += fresh
        return Output(output.stream, fresh, start)


async def capture(
    process: Process,
    command: Command,
    on_output: Callable[[Output], None] | None = None,
    again: Again | None = None,
) -> Capture:
    """What the program writes until it ends, is past its deadline, or over its output limit.

    The provider enforces both; this is the backstop for one that does not. A stream that is cut is taken up again at its
    offsets where `again` can do that. Raises `StreamLost`.
    """
    got = Capture()
    with trio.move_on_after(command.timeout + GRACE_SECONDS) as deadline:
        process, ended = await _followed(got, process, command, on_output, again)
        if ended:
            return got
    got.exit = Exit(kind="deadline" if deadline.cancelled_caught else "output-limit")
    with trio.move_on_after(KILL_SECONDS):
        await process.kill()
        return got
    raise StreamLost(f"it could not be killed within {KILL_SECONDS:g} s")


async def _followed(
    got: Capture,
    process: Process,
    command: Command,
    on_output: Callable[[Output], None] | None,
    again: Again | None,
) -> tuple[Process, bool]:
    """The process, another object where its stream was taken up again, and whether it has ended; else its output is too much."""
    tries = 0
    while True:
        try:
            return process, await _listen(got, process, command, on_output)
        except (StreamLost, ProviderDown):
            tries += 1
            if again is None or tries > RECONNECTS:
                raise
        await trio.sleep(FIRST_PAUSE * 2 ** (tries - 1))
        try:
            process = await again(process.id, {"stdout": len(got.stdout), "stderr": len(got.stderr)})
        except (StreamLost, ProviderDown):
            continue
        got.artifacts.clear()


async def _listen(got: Capture, process: Process, command: Command, on_output: Callable[[Output], None] | None) -> bool:
    """Whether the program has ended; False where its output is over the limit."""
    async with process.events() as events:
        async for event in events:
            if isinstance(event, Output):
                room = command.output_limit - got.size
                fresh = got.take(event, room)
                if fresh.data and on_output is not None:
                    on_output(fresh)
                if len(event.data) > room:
                    return False
            elif isinstance(event, Exit):
                got.exit = event
                return True
            else:
                got.artifacts.append(event)
    raise StreamLost("the output ended without an exit")
