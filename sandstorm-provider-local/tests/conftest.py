"""A session with this machine, and short ways to ask it for something."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Container
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from sandstorm.provider import Artifact, Command, Exit, Offer, Order, Output, SandboxSpec
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._state import Records

_GROUP = re.compile(rf"^sandstorm-\d+-{os.getpid()}-")


@attrs.frozen(kw_only=True)
class Ran:
    """What came of a program."""

    stdout: bytes
    stderr: bytes
    exit: Exit
    artifacts: tuple[Artifact, ...] = ()


@attrs.define
class Machine:
    """A session and what a test needs around it."""

    session: Any
    facts: Any
    state: Path
    made: int = 0
    supervisors: set[str] = attrs.field(factory=set)

    def order(self, *, keep: bool = False, lifetime: float = 300.0, **fields: Any) -> Order:
        """An order for a spec of these fields, with a marker of its own."""
        self.made += 1
        spec = SandboxSpec(**{"memory": 128, "disk": 32, **fields})
        offer = LocalProvider().offers(spec, self.facts)[0]
        assert isinstance(offer, Offer), offer
        dispatch_by = trio.current_time() + 60
        return Order(spec=spec, offer=offer, marker=f"test-{self.made}", dispatch_by=dispatch_by, lifetime=lifetime, keep=keep)

    async def box(self, **fields: Any) -> Any:
        """A box for an order of these fields; `keep` and `lifetime` are those of the order."""
        box = await self.session.create(self.order(**fields))
        self.supervisors.add(Records(self.state).get(box.id).owner)
        return box

    async def bash(self, box: Any, script: str, **fields: Any) -> Ran:
        """What came of a bash script in a box."""
        return await self.collect(await box.start(Command(argv=("bash", "-c", script), **{"timeout": 20.0, **fields})))

    async def wait_empty(self) -> None:
        """Returns when no sandbox of this state directory runs or is recorded; there is no event for what others end."""
        with trio.fail_after(5):
            while self.processes() or any((self.state / "boxes").iterdir()):  # noqa: ASYNC110 - see above
                await trio.sleep(0.01)

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
    artifacts: list[Artifact] = []
    async with process.events() as events:
        async for event in events:
            if isinstance(event, Output):
                assert event.offset == len(streams[event.stream])
                streams[event.stream] += event.data
            elif isinstance(event, Artifact):
                artifacts.append(event)
            else:
                return Ran(stdout=streams["stdout"], stderr=streams["stderr"], exit=event, artifacts=tuple(artifacts))
    raise AssertionError("no exit")


def leftovers(state: Path, supervisors: Container[str] = ()) -> list[str]:
    """Groups of this process and of these supervisors, its sandboxes, its session directories and bubblewraps that it started."""
    own = f"-{os.getpid()}-"
    # Not Path.rglob: it fails where another process removes a group meanwhile.
    groups = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names if name.startswith("sandstorm-")]
    found = [name for name in groups if _GROUP.match(name) or name.removesuffix("-box")[len("sandstorm-") :] in supervisors]
    found += [str(path) for name in ("boxes", "snapshots") for path in (state / name).iterdir()]
    found += [str(path) for path in (state / "sessions").iterdir() if own in path.name]
    found += [f"child {pid}" for pid in children()]
    return found + [f"process {pid}" for pid in _processes(state)]


def children() -> list[int]:
    """Processes that this one started and that are there yet, as zombies too."""
    found = []
    for thread in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (thread / "children").read_text().split()]
    return found


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


def new_state_directory() -> Path:
    """A directory that sandboxes of root can be reached in."""
    state = Path(tempfile.mkdtemp(prefix="sandstorm-test-"))
    state.chmod(0o711)
    return state


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    """A session with its own state directory; nothing may be left of it afterwards."""
    state = new_state_directory()
    async with LocalProvider(state_dir=str(state)).connect() as session:
        facts = await session.refresh()
        assert facts.data["level"] is not None, facts.data
        made = Machine(session, facts, state)
        yield made
    assert leftovers(state, made.supervisors) == []
    shutil.rmtree(state)
