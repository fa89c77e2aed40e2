"""Boxes: files that outlive programs, and paths that do not leave them."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from sandstorm.provider import (
    CapacityError,
    Command,
    Conflict,
    Exit,
    InvalidInput,
    InvalidSpec,
    SandboxGone,
    SandboxLost,
)
from sandstorm_provider_local._birth import scene
from sandstorm_provider_local._state import Records


async def chunks(*data: bytes) -> AsyncIterator[bytes]:
    """The data, one piece after another."""
    for piece in data:
        yield piece


async def read(box: object, path: str) -> bytes:
    """A whole file of a box."""
    async with box.download(path) as data:  # type: ignore[attr-defined]
        return b"".join([chunk async for chunk in data])


async def test_files_outlive_programs(machine: Any) -> None:
    """What one program writes the next one reads, and files go in and out exactly."""
    box = await machine.session.create(machine.order(files={"a/b": b"first"}, env={"NAME": "value"}))
    await box.upload("c/d/e", chunks(b"\0\xff" * 300_000, b"end"))
    ran = await machine.collect(
        await box.start(Command(argv=("bash", "-c", "cat a/b; wc -c < c/d/e; echo $NAME > f"), timeout=9))
    )
    assert (ran.stdout, ran.exit) == (b"first600003\n", Exit(code=0)), ran
    ran = await machine.collect(await box.start(Command(argv=("cat", "b", "../f"), cwd="a", timeout=9)))
    assert ran.stdout == b"firstvalue\n"
    assert await read(box, "c/d/e") == b"\0\xff" * 300_000 + b"end"
    with pytest.raises(FileNotFoundError):
        await read(box, "missing")
    await box.destroy()


async def test_no_path_leaves_the_work_area(machine: Any) -> None:
    """Links and pipes that a program planted are refused, in both directions and at every depth."""
    box = await machine.session.create(machine.order())
    outside = machine.state / "outside"
    outside.write_text("host")
    script = f"ln -s {outside} file; ln -s {machine.state} dir; ln -s / root; mkfifo pipe"
    assert (await machine.collect(await box.start(Command(argv=("bash", "-c", script), timeout=9)))).exit.ok
    for path in ("file", "dir/outside", f"root{outside}", "pipe"):
        with pytest.raises(InvalidSpec):
            await read(box, path)
        with pytest.raises(InvalidSpec):
            await box.upload(path, chunks(b"stolen"))
    for path in ("../outside", "/etc/passwd", ""):
        with pytest.raises(InvalidInput):
            await read(box, path)
    assert outside.read_text() == "host"
    outside.unlink()
    await box.destroy()


async def test_boxes_are_found_attached_and_destroyed_twice(machine: Any) -> None:
    """A box is known by its marker until it is destroyed, and destroying it again succeeds."""
    order = machine.order()
    box = await machine.session.create(order)
    with pytest.raises(Conflict):
        await machine.session.create(order)
    async with machine.session.find(order.marker) as found:
        assert [(info.id, info.marker) async for info in found] == [(order.marker, order.marker)]
    again = await machine.session.attach(order.marker)
    assert again is box
    await box.destroy()
    await box.destroy()
    with pytest.raises(SandboxGone):
        await machine.session.attach(order.marker)
    with pytest.raises(SandboxGone):
        await box.start(Command(argv=("true",), timeout=1))
    async with machine.session.find() as found:
        assert [info async for info in found] == []


async def test_the_disk_of_a_box_ends_at_its_size(machine: Any) -> None:
    """A box that is full says so to its programs, in one file or in many, and to uploads."""
    box = await machine.box(disk=4)
    assert (await machine.bash(box, "head -c 9M /dev/zero", output_limit=1 << 24)).exit.ok
    big = await box.start(Command(argv=("dd", "if=/dev/zero", "of=big", "bs=1M", "count=9"), timeout=9))
    assert (await machine.collect(big)).exit == Exit(kind="disk-limit", signal=25)
    ran = await machine.bash(box, "rm -f big; for i in 1 2 3; do head -c 2M /dev/zero > $i || exit 9; done")
    assert (ran.exit, ran.stderr.count(b"No space left")) == (Exit(code=9), 1), ran
    with pytest.raises(CapacityError):
        await box.upload("more", chunks(b"x" * (5 << 20)))
    await box.destroy()


async def test_failed_creation_leaves_nothing(machine: Any) -> None:
    """Files that cannot be placed, and a cancellation at any moment, leave no box behind; the fixture looks for the rest."""
    with pytest.raises(InvalidSpec):
        await machine.session.create(machine.order(files={"a": b"", "a/b": b""}))
    for pause in (0.0, 0.005, 0.02, 0.04):
        with trio.move_on_after(pause):
            await machine.session.create(machine.order())
    for marker in [record.marker for record in Records(machine.state).all()]:
        await (await machine.session.attach(marker)).destroy()  # those that were made in time
    assert machine.processes() == []


async def test_a_box_that_nobody_keeps_ends_with_its_session(machine: Any) -> None:
    """What was never destroyed ends when the session closes, its programs included; the fixture looks."""
    box = await machine.box()
    await box.start(Command(argv=("sleep", "1238"), timeout=60))


async def test_a_supervisor_that_is_killed_leaves_nothing(machine: Any) -> None:
    """The programs of a box end with its supervisor, what waits for them is told, and its rest is swept at once."""
    box = await machine.box(files={"a": b"x"})
    process = await box.start(Command(argv=("sleep", "1239"), timeout=60))
    owner = Records(machine.state).get(box.id).owner
    with pytest.raises(SandboxLost):
        async with process.events() as events:
            os.kill(int(owner.split("-")[1]), signal.SIGKILL)
            with trio.fail_after(5):
                async for _ in events:
                    pass
    with pytest.raises(SandboxGone):
        await box.start(Command(argv=("true",), timeout=9))
    with pytest.raises(SandboxGone):
        await read(box, "a")
    with trio.fail_after(5):
        await box.link.finished.wait()
    await machine.wait_empty()
    with pytest.raises(SandboxGone):
        await machine.session.attach(box.id)


async def test_a_start_is_repeated_without_harm(machine: Any) -> None:
    """The same start id means the same program, which runs once and is heard by all who listen."""
    box = await machine.box()
    command = Command(argv=("bash", "-c", "echo once >> log; sleep 0.2; cat log"), timeout=9, start_id="s1")
    first, again = await box.start(command), await box.start(command)
    assert first.id == again.id
    heard = []

    async def listen(process: Any) -> None:
        heard.append((await machine.collect(process)).stdout)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, first)
        nursery.start_soon(listen, again)
    assert heard == [b"once\n"] * 2
    await box.destroy()


async def test_cancelled_starts_leave_no_program(machine: Any) -> None:
    """A start that is cancelled ends what it had begun."""
    box = await machine.box()
    with trio.CancelScope() as scope:
        scope.cancel()
        await box.start(Command(argv=("bash", "-c", "sleep 0.3; touch ran"), timeout=9))
    assert scope.cancelled_caught
    await trio.sleep(0.5)
    with pytest.raises(FileNotFoundError):
        await box.stat("ran")
    await box.destroy()


async def test_many_large_outputs_are_exact(machine: Any) -> None:
    """Output of several programs at once arrives whole, each in its own stream."""
    box = await machine.box(disk=8)
    ran: dict[int, Any] = {}

    async def run(number: int) -> None:
        script = f"head -c 3000000 /dev/zero | tr '\\0' {number}; head -c 100000 /dev/zero | tr '\\0' e >&2"
        ran[number] = await machine.bash(box, script, output_limit=1 << 24)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(run, number)
    for number, got in ran.items():
        assert (got.stdout, got.stderr) == (str(number).encode() * 3_000_000, b"e" * 100_000)
    await box.destroy()


async def test_a_marker_is_taken_by_whatever_has_it(machine: Any) -> None:
    """A box and a one-shot sandbox cannot have the same marker."""
    order = machine.order()
    box = await machine.session.create(order)
    with pytest.raises(Conflict):
        await machine.session.launch(order, Command(argv=("true",), timeout=9))
    await box.destroy()


# --- boxes without a supervisor ---------------------------------------------------------------------------------------


async def plain(machine: Any, **fields: Any) -> Any:
    """A box as the levels have it that no supervisor can look after."""
    session = machine.session
    return await session._owned.create(session._ground, scene(session._ground, None), None, machine.order(**fields))


async def test_plain_boxes_run_programs_and_keep_files(machine: Any) -> None:
    """What one program writes the next one reads, and the caller too."""
    box = await plain(machine, files={"a/b": b"first"})
    assert (await machine.bash(box, "cat a/b; echo more > a/c")).stdout == b"first"
    assert await read(box, "a/c") == b"more\n"
    async with box.list("a") as entries:
        assert sorted([entry.path async for entry in entries]) == ["a/b", "a/c"]
    assert (await machine.session.attach(box.id)) is box
    await box.destroy()
    with pytest.raises(SandboxGone):
        await box.start(Command(argv=("true",), timeout=9))


async def test_a_full_plain_box_is_stopped(machine: Any) -> None:
    """A program that writes more than the disk is killed, and that is named."""
    box = await plain(machine, disk=4)
    assert (await machine.bash(box, "head -c 9M /dev/zero > big")).exit == Exit(kind="disk-limit", signal=25)
    many = "for i in 1 2 3; do head -c 2M /dev/zero > $i; done; sleep 9"
    assert (await machine.bash(box, many)).exit.kind == "disk-limit"
    await box.destroy()


async def test_what_a_program_made_unreadable_is_removed(machine: Any) -> None:
    """Permissions that a program took away do not keep a plain box from being removed."""
    box = await plain(machine)
    await machine.bash(box, "mkdir -p a/b; touch a/b/c; chmod 0 a/b a")
    await box.destroy()
    assert not await trio.Path(box.native.work_area).exists()
