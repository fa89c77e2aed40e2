"""What is left where a process was killed at a bad moment, each of which a random kill has once met."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from sandstorm.provider import Command, Exit, ProviderDown, SandboxGone, SandboxLost, StreamLost
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._owner import is_dead
from sandstorm_provider_local._state import Records
from sandstorm_provider_local._warden import title

PATIENCE = 5.0


async def wait_until(holds: Callable[[], bool]) -> None:
    """Returns once it holds."""
    with trio.fail_after(PATIENCE):
        while not holds():  # noqa: ASYNC110 - the kernel has no event for it
            await trio.sleep(0.001)


def wait(holds: Callable[[], bool]) -> None:
    """Likewise, where nothing else is to go on meanwhile."""
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)


@contextmanager
def started(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    """The next line that it writes."""
    assert process.stdout is not None
    return process.stdout.readline()


def children(pid: int) -> list[int]:
    """The processes that it has started."""
    return [int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def called(name: str) -> list[int]:
    """The processes with this name as the first word of their command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(name.encode() + b"\0"):
                found.append(int(entry.name))
    return found


async def kill_supervisor(machine: Any, box: Any) -> None:
    """Kills the supervisor of a box, and returns when it is dead."""
    owner = Records(machine.state).get(box.id).owner
    os.kill(int(owner.split("-")[1]), signal.SIGKILL)
    await wait_until(lambda: is_dead(owner))


# --- single programs --------------------------------------------------------------------------------------------------

HALF_BORN = """
import os, subprocess, sys, time
from sandstorm_provider_local._warden import Warden, title
Warden(None)
child = subprocess.Popen([title(), "300"], executable="/usr/bin/sleep", start_new_session=True)
other = subprocess.Popen(["/usr/bin/sleep", "301"], start_new_session=True)
print(os.getpid(), child.pid, other.pid, flush=True)
time.sleep(300)
"""


def test_what_a_killed_router_had_half_begun_is_ended() -> None:
    """A sandbox that does not end with its router, since it was not set up yet, is ended by the warden, which then goes too."""
    with started(HALF_BORN) as router:
        pid, child, other = map(int, line_of(router).split())
        warden = set(children(pid)) - {child, other}
    try:
        wait(lambda: is_gone(child))
        wait(lambda: all(map(is_gone, warden)))
        assert len(warden) == 1
        assert not is_gone(other)
    finally:
        os.kill(other, signal.SIGKILL)


async def test_the_warden_finds_bubblewrap_and_its_first_process(machine: Any) -> None:
    """Both bear the title of their router for as long as the program runs, and nobody else does."""
    sandbox, _ = await machine.session.launch(machine.order(), Command(argv=("sleep", "1240"), timeout=60))
    await wait_until(lambda: len(called(title())) == 2)
    await sandbox.destroy()
    assert called(title()) == []


# --- boxes ------------------------------------------------------------------------------------------------------------


async def test_a_supervisor_that_is_killed_at_once_leaves_nothing(machine: Any) -> None:
    """Its box has not become its own yet, and its router, which lives on, removes it."""
    order = machine.order()
    known = set(supervisors())

    async def kill() -> None:
        await wait_until(lambda: bool(set(supervisors()) - known))
        for pid in set(supervisors()) - known:
            os.kill(pid, signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(ProviderDown):
            await machine.session.create(order)
    await wait_until(lambda: not list((machine.state / "boxes").iterdir()))


def supervisors() -> list[int]:
    """Those that this process has started."""
    found = []
    for pid in children(os.getpid()):
        with suppress(OSError):
            if b"_supervisor import main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


async def test_a_paused_box_whose_supervisor_was_killed_is_cleared_at_once(machine: Any) -> None:
    """What is frozen does not die by itself: its router thaws it, waits for its end and removes its groups."""
    box = await machine.box()
    if not machine.facts.data["freezer"]:
        pytest.skip("there is no freezer here")
    await box.start(Command(argv=("sleep", "1241"), timeout=60))
    await box.pause()
    await kill_supervisor(machine, box)
    with trio.fail_after(5):
        await box.link.finished.wait()
    assert machine.processes() == []


async def test_what_was_half_removed_is_removed(machine: Any) -> None:
    """A box whose record is gone already goes with the next sweep, whatever is in it; one with a record stays."""
    box = await machine.box()
    half = machine.state / "boxes" / "half"
    (half / "out" / "p1").mkdir(parents=True)
    (half / "out" / "p1" / "stdout").write_bytes(b"x")
    async with LocalProvider(state_dir=str(machine.state)).connect():
        assert not half.exists()
    assert (await machine.bash(box, "echo there")).stdout == b"there\n"
    await box.destroy()


async def test_records_appear_whole(machine: Any) -> None:
    """What is being added has no place yet among those that are there, so that a kill leaves it to its router's directory."""
    own = next((machine.state / "sessions").iterdir())
    sizes = set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, look, machine.state / "boxes", sizes, time.monotonic() + 0.6)
        for _ in range(8):
            await machine.run("true")
    assert 0 not in sizes
    assert list(own.glob("new-*")) == []


def look(boxes: Path, sizes: set[int], until: float) -> None:
    """Notes the sizes of what it finds."""
    while time.monotonic() < until:
        for entry in os.scandir(boxes):
            try:
                sizes.add(entry.stat().st_size)
            except FileNotFoundError:
                continue


async def test_output_that_went_with_the_box_is_a_lost_sandbox(machine: Any) -> None:
    """The files of a box go before its supervisor says so; where the box goes on they were dropped, which is another error."""
    box = await machine.box()
    dropped, lost = [await box.start(Command(argv=("echo", "hello"), timeout=9)) for _ in range(2)]
    for process in (dropped, lost):
        spool = Path(box.native.directory) / "out" / process.id
        await wait_until((spool / "stdout").exists)
        await wait_until(lambda place=spool / "stdout": place.stat().st_size == 6)
        shutil.rmtree(spool)
    with pytest.raises(StreamLost):
        await machine.collect(dropped)

    async def end() -> None:
        await trio.sleep(0.1)
        os.kill(box.native.agent_pid, signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        with pytest.raises((SandboxLost, SandboxGone)):
            await machine.collect(lost)
    await box.link.finished.wait()


async def test_a_terminal_takes_input_at_once(machine: Any) -> None:
    """What is written before the terminal is there waits for it."""
    box = await machine.box()
    for _ in range(8):
        process = await box.start(Command(argv=("sh", "-c", "read line; echo got $line"), terminal=(80, 24), timeout=20))
        await process.write(b"it\n")
        ran = await machine.collect(process)
        assert b"got it" in ran.stdout
        assert ran.exit == Exit(code=0)
    await box.destroy()


# --- groups -----------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import os, sys, trio, json
from sandstorm.provider import Order, SandboxSpec
from sandstorm_provider_local import LocalProvider
open(sys.argv[2] + "/cgroup.procs", "w").write("0")
async def main():
    async with LocalProvider(state_dir=sys.argv[1]).connect() as session:
        spec = SandboxSpec(memory=128, disk=16)
        offer = LocalProvider().offers(spec, await session.refresh())[0]
        order = Order(spec=spec, offer=offer, marker="far", dispatch_by=trio.current_time() + 60, lifetime=300.0, keep=True)
        box = await session.create(order)
        os.write(1, b"made\\n")
        await trio.sleep(300)
trio.run(main)
"""


async def test_groups_are_removed_wherever_their_router_made_them(machine: Any) -> None:
    """A router in another group of the machine makes its boxes' groups there; whoever finds the record removes them."""
    pool = machine.session._pool
    if pool is None or pool.hierarchy.version != 1:
        pytest.skip("only version 1 of control groups lets a process be put anywhere")
    with elsewhere(pool.hierarchy.memory) as place:
        record = kill_router_of_far_box(machine.state, place)
        assert record["groups"]["memory"] == str(place)
        assert groups(place, "-box")
        await machine.session.sweep()
        assert not groups(place, "-box")
        assert "far" not in [record.marker for record in Records(machine.state).all()]


@contextmanager
def elsewhere(parent: str) -> Iterator[Path]:
    """A group for a router; what it made itself is its next session's to remove."""
    place = Path(tempfile.mkdtemp(prefix="sandstormtest", dir=parent))
    try:
        yield place
    finally:
        for left in groups(place, ""):
            left.rmdir()
        wait(lambda: not (place / "cgroup.procs").read_text())
        place.rmdir()


def groups(place: Path, suffix: str) -> list[Path]:
    """Those below another one."""
    return list(place.glob(f"sandstorm-*{suffix}"))


def kill_router_of_far_box(state: Path, place: Path) -> dict[str, Any]:
    """The record of a box all of whose processes outside were killed."""
    with started(ELSEWHERE, str(state), str(place)) as router:
        assert line_of(router) == b"made\n"
        record: dict[str, Any] = json.loads((state / "boxes" / "far" / "record.json").read_text())
        for child in children(router.pid):
            os.kill(child, signal.SIGKILL)  # its warden and the supervisor
    wait(lambda: is_dead(record["owner"]))
    return record
