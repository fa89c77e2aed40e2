"""Boxes: files that outlive programs, and paths that do not leave them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from sandstorm.provider import Command, Conflict, Exit, InvalidInput, InvalidSpec, SandboxGone


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
    assert await trio.Path(again.native.work_area).is_dir()
    await box.destroy()
    await box.destroy()
    with pytest.raises(SandboxGone):
        await machine.session.attach(order.marker)
    with pytest.raises(SandboxGone):
        await box.start(Command(argv=("true",), timeout=1))
    async with machine.session.find() as found:
        assert [info async for info in found] == []


async def test_a_full_box_is_stopped(machine: Any) -> None:
    """A program that writes more than the disk is killed, and that is named."""
    box = await machine.session.create(machine.order(disk=4))
    one = await machine.collect(await box.start(Command(argv=("head", "-c", "9M", "/dev/zero"), timeout=9, output_limit=1 << 24)))
    assert one.exit.ok
    big = Command(argv=("bash", "-c", "head -c 9M /dev/zero > big"), timeout=9)
    assert (await machine.collect(await box.start(big))).exit == Exit(kind="disk-limit", signal=25)
    many = Command(argv=("bash", "-c", "for i in 1 2 3; do head -c 2M /dev/zero > $i; done; sleep 9"), timeout=9)
    assert (await machine.collect(await box.start(many))).exit.kind == "disk-limit"
    await box.destroy()


async def test_what_a_program_made_unreadable_is_removed(machine: Any) -> None:
    """Permissions that a program took away do not keep a box from being removed."""
    box = await machine.session.create(machine.order())
    script = "mkdir -p a/b; touch a/b/c; chmod 0 a/b a"
    await machine.collect(await box.start(Command(argv=("bash", "-c", script), timeout=9)))
    await box.destroy()
    assert not await trio.Path(box.native.work_area).exists()
