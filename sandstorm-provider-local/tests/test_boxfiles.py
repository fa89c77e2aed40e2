"""Files of a box from outside: sizes, listings, changes, and that no path leaves the work area."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from sandstorm.provider import Command, FileChange, InvalidInput, InvalidSpec, SandboxGone, StreamLost
from sandstorm_provider_local._inotify import DirectoryWatch
from sandstorm_provider_local._workarea import WorkArea

REFUSED = (InvalidInput, InvalidSpec, FileNotFoundError)
OUTSIDE = "outside"
"""What stands in every file around the work areas of these tests."""


async def chunks(*data: bytes) -> AsyncIterator[bytes]:
    """The data, one piece after another."""
    for piece in data:
        yield piece


async def names(box: Any, path: str = ".", **fields: Any) -> list[str]:
    """The paths of a listing."""
    async with box.list(path, **fields) as entries:
        return sorted([entry.path async for entry in entries])


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def read(box: Any, path: str) -> bytes:
    """A whole file of a box."""
    async with box.download(path) as data:
        return b"".join([chunk async for chunk in data])


# --- in real boxes ----------------------------------------------------------------------------------------------------


async def test_any_size_goes_in_and_out(machine: Any) -> None:
    """Empty files, odd pieces and many megabytes arrive exactly, and are the program's own."""
    box = await machine.box(disk=64)
    large = os.urandom(1 << 20) * 20
    for path, pieces in {"empty": [b""], "odd": [b"a", b"", b"bc" * 70_001], "deep/er/large": [large[:7], large[7:]]}.items():
        await box.upload(path, chunks(*pieces))
        assert await read(box, path) == b"".join(pieces)
    await box.upload("odd", chunks(b"short"))
    assert await read(box, "odd") == b"short"
    ran = await machine.bash(box, "stat -c %U deep/er/large; echo more >> odd; cat odd; rm -r deep; ls")
    assert ran.stdout == b"sandbox\nshortmore\nempty\nodd\n", ran
    await box.destroy()


async def test_entries_are_told_as_they_are(machine: Any) -> None:
    """Files, directories, links and pipes are named with size, mode and path, to any depth, and links are not followed."""
    box = await machine.box()
    await machine.bash(box, "mkdir -p d/e; printf abc > d/f; chmod 640 d/f; ln -s / d/root; mkfifo d/e/p; touch .hidden")
    assert await names(box) == [".hidden", "d"]
    assert await names(box, "d") == ["d/e", "d/f", "d/root"]
    assert await names(box, recursive=True) == [".hidden", "d", "d/e", "d/e/p", "d/f", "d/root"]
    info = await box.stat("d/f")
    assert (info.path, info.kind, info.size, info.mode) == ("d/f", "file", 3, 0o640)
    assert abs(info.modified - (await box.stat(".")).modified) < 60
    assert [(await box.stat(path)).kind for path in (".", "d", "d/root", "d/e/p")] == ["directory", "directory", "link", "other"]
    with pytest.raises(FileNotFoundError):
        await names(box, "missing")
    with pytest.raises(InvalidSpec):
        await names(box, "d/root")
    await box.destroy()


async def test_listings_at_once_are_whole(machine: Any) -> None:
    """Two listings of one large directory do not take entries from each other."""
    box = await machine.box()
    await machine.bash(box, "touch $(seq 3000)")
    async with box.list(".") as first:
        seen = [(await anext(first)).path]
        assert len(await names(box)) == 3000
        seen += [entry.path async for entry in first]
    assert len(set(seen)) == len(seen) == 3000
    await box.destroy()


async def test_directories_are_made_and_removed(machine: Any) -> None:
    """Directories are made with their parents, and removed with all that is in them, whatever its mode."""
    box = await machine.box()
    for _ in range(2):
        await box.make_directory("a/b/c")
    await machine.bash(box, "touch a/b/c/f; ln -s / a/link; mkdir -p a/x/y; chmod 0 a/x/y a/x")
    await box.remove("a/link")
    await box.remove("a")
    assert await names(box) == []
    with pytest.raises(FileNotFoundError):
        await box.remove("a")
    for path in (".", "..", "/", ""):
        with pytest.raises(InvalidInput):
            await box.remove(path)
    await box.destroy()


async def test_a_tree_without_end_is_refused(machine: Any) -> None:
    """A tree that is nested very deeply is neither walked to its end nor does it use the router up."""
    box = await machine.box()
    code = "import os; [(os.mkdir('d'), os.chdir('d')) for _ in range(1500)]"
    assert (await machine.collect(await box.start(Command(argv=("python3", "-c", code), timeout=20)))).exit.ok
    before = descriptors()
    for call in (names(box, recursive=True), box.remove("d")):
        with pytest.raises(InvalidSpec, match="nested deeper"):
            await call
    assert descriptors() == before
    await box.destroy()


async def test_changes_are_told(machine: Any) -> None:
    """What is made, written and removed in a directory is told in order, once each, and the end of the directory is the end."""
    box = await machine.box(files={"d/old": b"x"})
    async with box.watch("d") as changes:
        await machine.bash(box, "cd d; echo 1 > new; mv old older; mkdir sub; touch sub/unseen; rm new")
        with trio.fail_after(5):
            seen = [await anext(changes) for _ in range(6)]
        assert FileChange("d/new", "changed") in seen
        assert [change for change in seen if change.kind != "changed"] == [
            FileChange("d/new", "created"),
            FileChange("d/old", "removed"),
            FileChange("d/older", "created"),
            FileChange("d/sub", "created"),
            FileChange("d/new", "removed"),
        ]
        await box.remove("d")
        with trio.fail_after(5):
            rest = {change async for change in changes if change.kind == "removed"}
        assert rest == {FileChange("d/older", "removed"), FileChange("d/sub", "removed")}
    await box.destroy()


async def test_links_lead_nowhere(machine: Any) -> None:
    """No file call follows a link that a program planted, as the last component or on the way."""
    outside = machine.state / "outside"
    outside.mkdir()
    (outside / "file").write_text(OUTSIDE)
    box = await machine.box()
    await machine.bash(box, f"ln -s {outside} dir; ln -s {outside}/file file; ln -s .. up; ln -s /proc/self/root root")
    for path in ("file", "dir/file", f"root{outside}/file", "up/work/file"):
        with pytest.raises(InvalidSpec):
            await read(box, path)
        with pytest.raises(InvalidSpec):
            await box.upload(path, chunks(b"stolen"))
    for path in ("dir", "up", "root"):
        with pytest.raises(InvalidSpec):
            await names(box, path)
        with pytest.raises(InvalidSpec):
            await box.make_directory(f"{path}/made")
        with pytest.raises(InvalidSpec):
            await box.stat(f"{path}/file")
        with pytest.raises(InvalidSpec):
            async with box.watch(path):
                pass
        await box.remove(path)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("file", OUTSIDE)]
    await box.destroy()
    (outside / "file").unlink()
    outside.rmdir()


async def test_links_that_come_and_go_lead_nowhere(machine: Any) -> None:
    """A program that swaps a directory for a link, all the time, gets nothing out of the router."""
    outside = machine.state / "outside"
    outside.mkdir()
    box = await machine.box()
    code = (
        "import os\n"
        "os.mkdir('real'); open('real/file', 'w').write('inside'); os.symlink(OUTSIDE, 'link')\n"
        "libc = __import__('ctypes').CDLL(None)\n"
        "print('ready', flush=True)\n"
        "while True: libc.renameat2(-100, b'real', -100, b'link', 2)\n"
    ).replace("OUTSIDE", repr(str(outside)))
    (outside / "file").write_text(OUTSIDE)
    swapping = await box.start(Command(argv=("python3", "-c", code), timeout=60))
    async with swapping.events() as events:
        await anext(events)
        read_inside = 0
        for number in range(300):
            try:
                assert await read(box, "real/file") == b"inside"
                read_inside += 1
            except REFUSED:
                pass
            for call in (box.upload(f"real/new{number}", chunks(b"x")), box.make_directory(f"real/d{number}")):
                with suppress(*REFUSED):
                    await call
    await swapping.kill()
    assert read_inside
    assert [path.name for path in outside.iterdir()] == ["file"]
    await box.destroy()
    (outside / "file").unlink()
    outside.rmdir()


async def test_permissions_of_the_program_are_those_of_the_calls(machine: Any) -> None:
    """The router's own rights open nothing: a file that its owner may not read is not read."""
    box = await machine.box(files={"f": b"x"})
    await machine.bash(box, "chmod 0 f")
    with pytest.raises(InvalidSpec, match="chmod"):
        await read(box, "f")
    await box.destroy()
    with pytest.raises(SandboxGone):
        await box.stat("f")


# --- the work area alone ----------------------------------------------------------------------------------------------

COMPONENTS = st.sampled_from(["a", "b", "link", "up", "root", "..", ".", "", "file", "...", "é", "a" * 255, "\0"])
PATHS = st.lists(COMPONENTS, max_size=5).map("/".join) | st.text(max_size=8) | st.sampled_from(["/etc/passwd", "//", "~/x"])


@given(path=PATHS, call=st.sampled_from(["read", "write", "stat", "list", "make", "remove"]))
@settings(max_examples=400, deadline=None)
def test_no_path_whatever_leaves_the_work_area(path: str, call: str) -> None:
    """Whatever the path and the call, nothing around a work area full of links is read, made, changed or removed."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        work = top / "work"
        (work / "a" / "b").mkdir(parents=True)
        (top / "file").write_text(OUTSIDE)
        (work / "file").write_text("inside")
        for name, target in {"link": top / "file", "up": top, "a/up": top, "a/b/link": top / "file", "root": Path("/")}.items():
            (work / name).symlink_to(target)
        area = WorkArea(os.open(work, os.O_RDONLY | os.O_DIRECTORY), None)
        with suppress(*REFUSED):
            _call(area, call, path)
        area.close()
        assert sorted(entry.name for entry in top.iterdir()) == ["file", "work"]
        assert (top / "file").read_text() == OUTSIDE


def _call(area: WorkArea, call: str, path: str) -> None:
    if call == "read":
        fd = area.open_for_reading(path)
        try:
            assert os.read(fd, 100) != OUTSIDE.encode()
        finally:
            os.close(fd)
    elif call == "write":
        area.write(path, b"written")
    elif call == "stat":
        area.stat(path)
    elif call == "list":
        assert not [info for info in area.list(path, recursive=True) if info.path.endswith("work/file")]
    elif call == "make":
        area.make_directory(path)
    else:
        area.remove(path)


def test_a_thread_is_itself_again_afterwards(tmp_path: Path) -> None:
    """Work that is done as the box's user leaves the thread with its own rights, also when it fails."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    os.chown(tmp_path, 65000, 65000)
    area = WorkArea(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), 65000)
    area.act(lambda: area.write("f", b"x"))
    with pytest.raises(InvalidSpec):
        area.act(lambda: area.open_for_reading("f/g"))
    area.close()
    assert (tmp_path / "f").stat().st_uid == 65000
    (tmp_path / "own").touch()
    assert (tmp_path / "own").stat().st_uid == 0


def test_sockets_and_devices_are_not_files(tmp_path: Path) -> None:
    """What is neither file nor directory is refused, and refused at once."""
    area = WorkArea(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), None)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name in ("pipe", "socket"):
        with pytest.raises(InvalidSpec):
            area.open_for_reading(name)
        with pytest.raises(InvalidSpec):
            area.write(name, b"x")
        assert area.stat(name).kind == "other"
        assert stat.S_IMODE((tmp_path / name).lstat().st_mode) == area.stat(name).mode
    area.close()


def test_dropped_changes_are_told(tmp_path: Path) -> None:
    """Changes that came faster than they were read end the watch with an error, and not with silence."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    watch = DirectoryWatch(directory, ".")
    for number in range(limit // 2 + 10):
        (tmp_path / str(number)).touch()
        (tmp_path / str(number)).unlink()
    with pytest.raises(StreamLost):
        while watch.read():
            pass
    watch.close()
    os.close(directory)
