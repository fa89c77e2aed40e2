"""A session with this machine, and short ways to ask it for something."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from sandstorm.provider import Command, Exit, Offer, Order, Output, SandboxSpec
from sandstorm_provider_local import LocalProvider

_GROUP = re.compile(rf"^sandstorm-\d+-{os.getpid()}-")


@attrs.frozen(kw_only=True)
class Ran:
    """What came of a program."""

    stdout: bytes
    stderr: bytes
    exit: Exit


@attrs.define
class Machine:
    """A session and what a test needs around it."""

    session: Any
    facts: Any
    state: Path
    made: int = 0

    def order(self, **fields: Any) -> Order:
        """An order for a spec of these fields, with a marker of its own."""
        self.made += 1
        spec = SandboxSpec(**{"memory": 128, "disk": 32, **fields})
        offer = LocalProvider().offers(spec, self.facts)[0]
        assert isinstance(offer, Offer), offer
        return Order(spec=spec, offer=offer, marker=f"test-{self.made}", dispatch_by=trio.current_time() + 60, lifetime=300.0)

    async def collect(self, process: Any) -> Ran:
        """All that a program wrote, with its offsets checked, and its exit."""
        return await _collect(process)

    def processes(self) -> list[int]:
        """Processes on the host that are sandboxes of this session."""
        return _processes(self.state)

    async def run(self, *argv: str, timeout: float = 20.0, limit: int = 1 << 20, stdin: bytes = b"", **fields: Any) -> Ran:
        """What came of a one-shot program."""
        command = Command(argv=argv, timeout=timeout, output_limit=limit, stdin=stdin)
        sandbox, process = await self.session.launch(self.order(**fields), command)
        try:
            return await self.collect(process)
        finally:
            await sandbox.destroy()


async def _collect(process: Any) -> Ran:
    """All that a program wrote, with its offsets checked, and its exit."""
    streams = {"stdout": b"", "stderr": b""}
    async with process.events() as events:
        async for event in events:
            if isinstance(event, Output):
                assert event.offset == len(streams[event.stream])
                streams[event.stream] += event.data
            else:
                return Ran(stdout=streams["stdout"], stderr=streams["stderr"], exit=event)
    raise AssertionError("no exit")


def leftovers(state: Path) -> list[str]:
    """Groups of this process, its sandboxes, its session directories and bubblewraps that it started."""
    own = f"-{os.getpid()}-"
    found = [str(path) for path in Path("/sys/fs/cgroup").rglob("sandstorm-*") if _GROUP.match(path.name)]
    found += [str(path) for path in (state / "boxes").iterdir()]
    found += [str(path) for path in (state / "sessions").iterdir() if own in path.name]
    return found + [f"process {pid}" for pid in _processes(state)]


def _processes(state: Path) -> list[int]:
    """Processes on the host that this test process's bubblewraps are, or that run in their namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(state).encode() in command:
                found.append(int(entry.name))
    return found


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    """A session with its own state directory; nothing may be left of it afterwards."""
    state = Path("/tmp") / f"sandstorm-test-{os.getpid()}"
    async with LocalProvider(state_dir=str(state)).connect() as session:
        facts = await session.refresh()
        assert facts.data["level"] is not None, facts.data
        yield Machine(session, facts, state)
    assert leftovers(state) == []
    shutil.rmtree(state)
