"""Boxes and their routers: what outlives one, what ends with it, and what another finds of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from sandstorm.provider import Exit, InvalidInput, Output, SandboxGone
from sandstorm_provider_local import LocalProvider

ROUTER = """
import json, os, sys, trio
from sandstorm.provider import Command, Order, Output, SandboxSpec
from sandstorm_provider_local import LocalProvider

async def main(state, marker, keep):
    provider = LocalProvider(state_dir=state)
    async with provider.connect() as session:
        facts = await session.refresh()
        spec = SandboxSpec(memory=128, disk=32)
        order = Order(spec=spec, offer=provider.offers(spec, facts)[0], marker=marker,
                      dispatch_by=trio.current_time() + 60, lifetime=120.0, keep=keep == "keep")
        box = await session.create(order)
        script = "for i in $(seq 10); do echo line $i; sleep 0.1; done; sleep $0"
        detached = await box.start(Command(argv=("bash", "-c", script, "0"), timeout=60, detached=True))
        attached = await box.start(Command(argv=("bash", "-c", "sleep 3600"), timeout=3600))
        async with detached.events() as events:
            first = await anext(events)
        print(json.dumps([detached.id, attached.id, first.data.decode()]), flush=True)
        if sys.stdin.readline() == "leave\\n":
            return
        await trio.sleep_forever()

trio.run(main, *sys.argv[1:])
"""


class Router:
    """Another process that makes a box and starts two programs in it."""

    def __init__(self, machine: Any, marker: str, keep: bool) -> None:
        command = [sys.executable, "-c", ROUTER, str(machine.state), marker, "keep" if keep else "drop"]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        self.detached, self.attached, self.first = json.loads(self.popen.stdout.readline())

    def end(self, how: str) -> None:
        """Kills it with SIGKILL, or lets it leave as a router does."""
        assert self.popen.stdin is not None
        if how == "killed":
            self.popen.send_signal(signal.SIGKILL)
        else:
            self.popen.stdin.write(b"leave\n")
            self.popen.stdin.flush()
        self.popen.wait(20)
        self.popen.stdin.close()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


@pytest.mark.parametrize("how", ["killed", "left"])
async def test_what_is_kept_outlives_its_router(machine: Any, how: str) -> None:
    """A detached program goes on without its router, is followed from its offset by another process, and the rest is ended."""
    router = await trio.to_thread.run_sync(Router, machine, "kept-1", True)
    await trio.to_thread.run_sync(router.end, how)
    box = await machine.session.attach("kept-1")
    async with machine.session.find("kept-1") as found:
        assert [info.state async for info in found] == ["running"]
    process = await box.process(router.detached, {"stdout": len(router.first), "stderr": 0})
    said = router.first.encode()
    async with process.events() as events:
        async for event in events:
            if isinstance(event, Output):
                assert event.offset == len(said)
                said += event.data
            else:
                assert event == Exit(code=0)
    assert said == b"".join(b"line %d\n" % number for number in range(1, 11))
    ended = await box.process(router.attached, {})
    with trio.fail_after(5):
        assert (await machine.collect(ended)).exit.signal == 9
    await box.destroy()
    with pytest.raises(SandboxGone):
        await machine.session.attach("kept-1")


async def test_what_is_not_kept_ends_with_its_router(machine: Any) -> None:
    """A router that is killed takes its boxes with it, their detached programs included."""
    router = await trio.to_thread.run_sync(Router, machine, "dropped-1", False)
    await trio.to_thread.run_sync(router.end, "killed")
    await machine.wait_empty()
    with pytest.raises(SandboxGone):
        await machine.session.attach("dropped-1")


async def test_long_state_directories_are_reached(machine: Any) -> None:
    """A box below a path that is longer than a socket's may be is attached all the same."""
    state = machine.state / ("x" * 100)
    async with LocalProvider(state_dir=str(state)).connect() as session:
        await session.refresh()
        box = await session.create(machine.order(keep=True))
    async with LocalProvider(state_dir=str(state)).connect() as session:
        again = await session.attach(box.id)
        assert (await machine.bash(again, "echo on")).stdout == b"on\n"
        await again.destroy()


async def test_unknown_sandboxes_and_programs_are_gone(machine: Any) -> None:
    """What does not exist is named as such, whatever its name."""
    for name in ("none", "", "../x", "a/b", "A"):
        with pytest.raises(SandboxGone):
            await machine.session.attach(name)
    box = await machine.box()
    with pytest.raises(InvalidInput):
        await box.process("../../x", {})
    assert os.fspath(Path(box.native.directory)).endswith(box.id)
    await box.destroy()
