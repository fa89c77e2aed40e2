"""Programs that are talked to while they run: input, signals and terminals, in real boxes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from sandstorm.provider import Command, Conflict, Exit, Interactive, InvalidInput, Output
from sandstorm_provider_local._supervisor._tree import tree


def sleeping(box: Any) -> list[bytes]:
    """The command lines of `sleep` in a box."""
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in tree(box.native.agent_pid)]
    return [command for command in commands if command.startswith(b"sleep")]


SIZES = """
import os, signal, time
def show(*_):
    os.write(1, b"%d %d\\n" % (os.get_terminal_size().lines, os.get_terminal_size().columns))
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGWINCH, show)
show()
os.write(1, b"tty\\n" if os.isatty(0) and os.isatty(2) else b"none\\n")
while True:
    time.sleep(0.05)
"""
"""Tells the size of its terminal at its start and whenever that changes."""


async def until(events: AsyncIterator[Any], wanted: bytes) -> bytes:
    """What a program writes up to these bytes, both streams together."""
    seen = b""
    with trio.fail_after(10):
        while wanted not in seen:
            event = await anext(events)
            assert isinstance(event, Output), (event, seen)
            seen += event.data
    return seen


async def test_input_is_written_while_the_program_runs(machine: Any) -> None:
    """What is written arrives after what was given at the start, the answers come at once, and the end is the end."""
    box = await machine.box()
    process = await box.start(Command(argv=("cat", "-u"), stdin=b"first ", timeout=20, interactive=True))
    assert isinstance(process, Interactive)
    async with process.events() as events:
        await until(events, b"first ")
        await process.write(b"second")
        await until(events, b"second")
        await process.close_stdin()
        with trio.fail_after(5):
            assert [event async for event in events] == [Exit(code=0)]
    await box.destroy()


async def test_much_input_waits_for_its_reader(machine: Any) -> None:
    """Input that is larger than any pipe arrives whole; a writer that is cancelled leaves the program usable."""
    box = await machine.box()
    process = await box.start(Command(argv=("bash", "-c", "sleep 0.3; wc -c"), timeout=20, interactive=True))
    await process.write(b"x" * 3_000_000)
    await process.close_stdin()
    assert (await machine.collect(process)).stdout.strip() == b"3000000"
    deaf = await box.start(Command(argv=("sleep", "60"), timeout=60, interactive=True))
    with trio.move_on_after(0.3) as scope:
        await deaf.write(b"x" * 1_000_000)
    assert scope.cancelled_caught
    await deaf.kill()
    assert (await machine.collect(deaf)).exit.signal == 9
    await box.destroy()


async def test_input_that_was_given_whole_takes_no_more(machine: Any) -> None:
    """A program that was not started for it is not written to."""
    box = await machine.box()
    process = await box.start(Command(argv=("cat",), stdin=b"all", timeout=20))
    with pytest.raises(Conflict):
        await process.write(b"more")
    with pytest.raises(Conflict):
        await process.resize(80, 25)
    assert (await machine.collect(process)).stdout == b"all"
    await box.destroy()


async def test_signals_reach_the_program_itself(machine: Any) -> None:
    """A handler runs, an unhandled signal is told exactly, and one to a program that has ended does nothing."""
    box = await machine.box()
    script = "trap 'echo got; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    process = await box.start(Command(argv=("bash", "-c", script), timeout=20))
    async with process.events() as events:
        await until(events, b"ready\n")
        await process.signal(signal.SIGTERM)
        assert await until(events, b"got\n")
        assert await anext(events) == Exit(code=7)
    await process.signal(signal.SIGTERM)
    process = await box.start(Command(argv=("bash", "-c", "echo up; exec sleep 5"), timeout=20))
    async with process.events() as events:
        await until(events, b"up\n")
        await process.signal(signal.SIGUSR1)
        assert [event async for event in events] == [Exit(kind="signal", signal=signal.SIGUSR1)]
    await box.destroy()


async def test_a_signal_reaches_a_program_that_is_still_starting(machine: Any) -> None:
    """A signal that comes before the program is executed waits for it, and does not get lost."""
    box = await machine.box()
    agent = box.native.agent_pid
    os.kill(agent, signal.SIGSTOP)  # so that nothing is executed before the signal is sent
    try:
        process = await box.start(Command(argv=("sleep", "60"), timeout=60))
        await process.signal(signal.SIGUSR1)
    finally:
        os.kill(agent, signal.SIGCONT)
    with trio.fail_after(10):
        assert (await machine.collect(process)).exit == Exit(kind="signal", signal=signal.SIGUSR1)
    await box.destroy()


async def test_a_terminal_that_is_still_to_come_is_resized(machine: Any) -> None:
    """A size that is set before the program is executed is the one that it finds; one that is none is refused."""
    box = await machine.box()
    agent = box.native.agent_pid
    os.kill(agent, signal.SIGSTOP)  # so that the terminal is not made before
    try:
        process = await box.start(Command(argv=("bash", "-c", "read; stty size"), timeout=20, terminal=(80, 24)))
        await process.resize(90, 20)
        for wrong in ((-1, 20), (90, 1 << 16)):
            with pytest.raises(InvalidInput):
                await process.resize(*wrong)
    finally:
        os.kill(agent, signal.SIGCONT)
    await process.write(b"\n")
    assert (await machine.collect(process)).stdout.splitlines()[-1] == b"20 90"
    with pytest.raises(Conflict):
        await process.resize(90, 20)
    await box.destroy()


async def test_input_is_typed_into_a_terminal_first(machine: Any) -> None:
    """What a program with a terminal is given at its start comes before what is written later."""
    box = await machine.box()
    command = Command(argv=("bash", "-c", "read a; read b; echo $b $a"), stdin=b"given\n", timeout=20, terminal=(80, 24))
    process = await box.start(command)
    await process.write(b"later\n")
    ran = await machine.collect(process)
    assert (ran.stdout.splitlines()[-1], ran.exit) == (b"later given", Exit(code=0)), ran
    await box.destroy()


async def test_a_terminal_is_one(machine: Any) -> None:
    """A program gets a terminal of the size asked for, hears of a new size, and takes Ctrl-C from it."""
    box = await machine.box()
    # No shell: one that waits for a program ignores an interrupt by which that program did not end.
    process = await box.start(Command(argv=("python3", "-c", SIZES), timeout=20, terminal=(100, 30)))
    async with process.events() as events:
        await until(events, b"30 100\r\ntty\r\n")
        await process.resize(90, 20)
        await until(events, b"20 90\r\n")
        await process.write(b"\x03")
        rest = [event async for event in events]
    assert rest[-1] == Exit(kind="signal", signal=signal.SIGINT), rest
    await box.destroy()


async def test_kill_ends_the_whole_tree(machine: Any) -> None:
    """A kill ends sessions of their own too, and nothing else in the box."""
    box = await machine.box()
    other = await box.start(Command(argv=("sleep", "60"), timeout=60))
    script = "setsid sleep 77 & (setsid bash -c 'sleep 77' &); echo up; sleep 77"
    process = await box.start(Command(argv=("bash", "-c", script), timeout=60))
    async with process.events() as events:
        await until(events, b"up\n")
        await process.kill()
        assert [event async for event in events] == [Exit(kind="signal", signal=9)]
    # Seen from outside, since there may be no /proc inside.
    assert sleeping(box) == [b"sleep\x0060\0"]
    await process.kill()
    await other.kill()
    await box.destroy()
