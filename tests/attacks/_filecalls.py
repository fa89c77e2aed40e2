"""Every file call against every way out of the work area: `python _filecalls.py sandbox` or `python _filecalls.py naive`.

Prints the pairs of call and way that got out, as JSON. `naive` makes the same calls as a router would that trusts paths: on a
directory of the host, in which an unprivileged user has planted the same. Start it in a mount namespace of its own.
"""
# ruff: noqa: ASYNC240 - naive calls are written as one writes them; the rest is a script that does one thing at a time

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from _bait import PYTHON, USER, Bait, as_user, bait
from _filesides import PATIENCE, Boxed, Naive, Outside

from sandstorm import AsyncSandstorm, Constraints, InvalidInput, SandboxSpec, SandstormError
from sandstorm._async_box import AsyncBox

REFUSED = (SandstormError, OSError, ValueError)
RACE = 1.0
"""Seconds of calls while a program swaps what they are about."""
MET, SLOWEST = 10, 60.0
"""How often the file and the link have each to be met while they are swapped, and seconds after which that is given up."""
SPEC = SandboxSpec(memory=64, disk=16)
HERE = Constraints(only=("local",))

PLANT = """
import json, os, socket, stat, sys
for name, target in json.loads(sys.argv[1]).items():
    os.symlink(target, name)
os.makedirs("deep/er")
os.symlink("../../link-directory", "deep/er/link")
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
for name, make in {
    "hard": lambda: os.link(sys.argv[2] + "/secret", "hard"),
    "device": lambda: os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(0, 0)),
    "zero": lambda: os.mknod("zero", stat.S_IFCHR | 0o666, os.makedev(1, 5)),
}.items():
    try:
        make()
    except OSError:
        pass
for name in (b"\\xff\\xfe", b"\\x1b[31m", b"new\\nline", b"...", b"-rf", b"~"):
    open(name, "w").write("inside")
"""
SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
os.makedirs("real/sub", exist_ok=True)
for name in ("real/secret", "leaf", "real/sub/secret"):
    open(name, "w").write("inside")
os.symlink(sys.argv[1], "real-link")
os.symlink(sys.argv[1] + "/secret", "leaf-link")
print("ready", flush=True)
while True:
    for name in (b"real", b"leaf"):
        libc.renameat2(-100, name, -100, name + b"-link", 2)
"""


def ways(bait: Bait, other: str) -> tuple[dict[str, str], list[str]]:
    """The links that are planted, by name, and the paths that are tried. `other` is another sandbox's work area from outside."""
    outside = str(bait.top / "outside")
    links = {
        "link-file": f"{outside}/secret",
        "link-directory": outside,
        "link-home": str(bait.home / ".ssh"),
        "link-shadow": "/etc/shadow",
        "link-root": "/",
        "link-process": "/proc/1/root",
        "link-self": "/proc/self/root",
        "link-other": other,
        "link-up": "../outside",
        "link-link": "link-directory",
    }
    paths = [*links, *(f"{name}/secret" for name in links), "link-home/id_ed25519", "link-other/secret", "deep/er/link/secret"]
    paths += [f"link-root/{outside}/secret", f"link-process/{outside}/secret", f"link-self/{outside}", "deep/er/link", "hard"]
    paths += ["../outside", "../outside/secret", f"{outside}/secret", f"/{outside}", "deep/../../outside/secret", "./../outside"]
    paths += ["/etc/shadow", "..", "/", "", "deep/er/../../../outside", "\0", f"link-file\0{outside}", "a" * 300, "a/" * 3000]
    return links, [*paths, "pipe", "socket", "device", "zero", "pipe/x", "\udcff\udcfe"]


CALLS = (
    "download", "upload", "list", "list-recursive", "stat", "make-directory", "remove", "upload-directory", "download-directory",
    "cwd", "outputs", "watch",
)  # fmt: skip


async def call(files: Any, name: str, path: str, outside: Outside) -> bool:
    """Makes one call; whether it got out."""
    found: Any = None
    finished = False
    with trio.move_on_after(outside.patience):
        with suppress(*REFUSED):
            if name == "upload":
                found = await files.upload(path, b"stolen")
            elif name == "list-recursive":
                found = await files.list(path, recursive=True)
            elif name == "make-directory":
                found = await files.make_directory(f"{path}/made")
            elif name == "upload-directory":
                found = await files.upload_directory(path, outside.source)
            elif name == "download-directory":
                found = await files.download_directory(path, outside.target)
            elif name == "watch":
                found = await files.watched(path, outside.touch)
            else:
                found = await getattr(files, name.replace("-", "_"))(path)
        finished = True
    # A link has a size of its own; whoever follows it tells that of the secret.
    followed = name == "stat" and found == len(outside.token)
    out = not finished or followed or found is True or outside.token in str(found) or outside.got or outside.changed
    if out or name in ("watch", "download-directory"):
        outside.restore()
    return out


async def sweep(files: Any, plant: Callable[[], Awaitable[None]], paths: list[str], outside: Outside) -> list[tuple[str, str]]:
    """The calls and paths that got out. What a call removes is planted again."""
    found = []
    for name in CALLS:
        await plant()
        for path in paths:
            if await call(files, name, path, outside):
                found.append((name, path[:80]))
                if name == "remove":
                    await plant()
    return found


async def honest(files: Any, outside: Outside) -> dict[str, bool]:
    """Whether each call does what it is for, where nobody is in its way."""
    worked = {
        "upload": await files.upload("fair/file", b"fair") is None,
        "download": await files.download("fair/file") == b"fair",
    }
    worked["upload-directory"] = await files.upload_directory("fair", outside.source) == 1
    worked["list"] = len(await files.list("fair")) == 2
    worked["make-directory"] = await files.make_directory("fair/below") is None
    worked["list-recursive"] = len(await files.list("fair", recursive=True)) == 3
    worked["stat"] = (await files.stat("fair/file")).size == 4
    await files.download_directory("fair", outside.target)
    worked["download-directory"] = (outside.target / "file").read_bytes() == b"fair"
    outside.restore()
    await files.upload("fair/secret", b"fair")
    worked["cwd"] = await files.cwd("fair") == b"fair"
    worked["outputs"] = await files.outputs("fair/file") == b"fair"
    async with files.watch("fair") as changes:
        await files.upload("fair/new", b"")
        worked["watch"] = (await anext(changes)).path == "fair/new"
    await files.remove("fair")
    worked["remove"] = "fair" not in [entry.path for entry in await files.list(".")]
    return worked


async def race(files: Any, outside: Outside, seconds: float) -> list[tuple[str, str]]:
    """The calls that got out while a program swaps a directory and a file for links."""
    found: set[tuple[str, str]] = set()
    until, number = trio.current_time() + seconds, 0
    while trio.current_time() < until:
        number += 1
        tried = [("download", "leaf"), ("upload", "leaf"), ("download", "real/secret"), ("upload", f"real/new-{number}")]
        tried += [("make-directory", f"real/new-{number}"), ("list", "real"), ("remove", f"real/name-{outside.token}")]
        tried += [("outputs", "leaf"), ("list-recursive", "."), ("download-directory", "."), ("remove", "real/sub")]
        for name, path in tried:
            if await call(files, name, path, outside):
                found.add((name, path.partition("/")[0]))
    return sorted(found)


# --- the two of them --------------------------------------------------------------------------------------------------


def plant_naive(work: Path, links: dict[str, str], outside: Outside) -> None:
    """The work area of a user who wants out."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    work.chmod(0o777)
    argv = [PYTHON, "-c", PLANT, json.dumps(links), str(outside.place)]
    subprocess.run(argv, cwd=work, check=True, **as_user(USER))


@contextmanager
def swapping(work: Path, outside: Outside) -> Iterator[None]:
    """A process that swaps."""
    argv = [PYTHON, "-c", SWAP, str(outside.place)]
    process = subprocess.Popen(argv, cwd=work, stdout=subprocess.PIPE, **as_user(USER))
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


async def naive(bait: Bait) -> dict[str, Any]:
    """What gets out of a directory."""
    outside, other = Outside(bait, 0.7), bait.top / "other"
    other.mkdir()
    (other / "secret").write_text(bait.token)
    links, paths = ways(bait, str(other))
    # What is at the other end of these is the machine's, and a call that trusts paths would harm it.
    harmless = [path for path in paths if path not in ("..", "/", "", "link-root", "link-process", "link-self", "../outside/..")]
    work = bait.top / "area"

    async def plant() -> None:
        plant_naive(work, links, outside)

    files = Naive(work)
    reading = ("download", "stat", "outputs", "cwd", "list")
    found = []
    for name in CALLS:
        await plant()
        for path in harmless:
            own = "outside" in path or path.startswith(("link-file", "link-directory", "link-up", "link-link", "deep", "hard"))
            if (own or name in reading) and await call(files, name, path, outside):
                found.append((name, path[:80]))
                if name == "remove":
                    await plant()
    # An empty one: a copy of all the links would follow them over the whole machine.
    plant_naive(work, {}, outside)
    with swapping(work, outside):
        found_racing: list[tuple[str, str]] = []
        until = time.monotonic() + 20
        while len({name for name, _ in found_racing}) < 3 and time.monotonic() < until:
            found_racing += await race(files, outside, RACE)
    return {"swept": found, "raced": sorted(set(found_racing))}


async def sandboxed(bait: Bait) -> dict[str, Any]:
    """What gets out of a box."""
    settings = {"store": f"sqlite:///{bait.top}/journal.db", "plugins": {"local": {"state_dir": str(bait.top / "state")}}}
    outside = Outside(bait, PATIENCE)
    async with AsyncSandstorm(settings=settings) as client, other_box(client, bait) as other:
        links, paths = ways(bait, other)
        async with client.sandbox(SPEC, constraints=HERE) as box:

            async def plant() -> None:
                await box.run(argv=["sh", "-c", "rm -rf /work/* /work/.[!.]* /work/..?*"])
                ran = await box.run(PLANT, "python", args=[json.dumps(links), str(outside.place)])
                assert ran.exit.ok, ran.stderr

            worked = await honest(Boxed(box), outside)
            swept = await sweep(Boxed(box), plant, paths, outside)
            await plant()
            snapshot = await box.snapshot()
            async with box.exec("python3", "-c", SWAP, str(outside.place), timeout=150) as running:
                await anext(aiter(running))
                raced = await race(Boxed(box), outside, RACE * 3)
                read, refused = await _read_fairly(box)
        specified_ = await specified(client, snapshot, paths, outside)
        met = {"read while swapped": read, "refused while swapped": refused}
        return {"honest": worked, "swept": swept, "raced": raced, **met, "specified": specified_}


async def _read_fairly(box: AsyncBox) -> tuple[int, int]:
    """How often a file that is swapped all the time could be read, and how often the link was met and refused."""
    read = refused = 0
    # Reads are counted by what they met. A fixed number of them lasts a few milliseconds, in which a swapper that waits for a
    # CPU may not swap once, and then all of them meet what it has left there: the file, or the link.
    with trio.move_on_after(SLOWEST):
        while min(read, refused) < MET:
            try:
                read += await box.download("leaf") in (b"inside", b"stolen")
            except REFUSED:
                refused += 1
            await trio.sleep(0.001)  # it may need this very CPU
    return read, refused


async def specified(client: AsyncSandstorm, snapshot: str, paths: list[str], outside: Outside) -> list[tuple[str, str]]:
    """Files of a spec that got out, in an empty work area and on top of what was planted."""
    found = []
    for path in paths:
        with suppress(InvalidInput):
            SandboxSpec(files={path: b"stolen"})
            if path.startswith(("/", "..")) or "/../" in path:
                found.append(("accepted", path))
    for path in (
        "link-file",
        "link-directory/stolen",
        "deep/er/link/stolen",
        "link-up/stolen",
        "pipe",
        f"link-root{outside.place}/stolen",
    ):
        spec = SandboxSpec(memory=64, disk=16, files={path: b"stolen"}, snapshot=snapshot)
        with suppress(*REFUSED), trio.fail_after(10):
            async with client.sandbox(spec, constraints=HERE):
                pass
        if outside.changed:
            found.append(("written", path))
    return found


@asynccontextmanager
async def other_box(client: AsyncSandstorm, bait: Bait) -> AsyncIterator[str]:
    """Another sandbox with a secret that everybody may read; its work area, as root outside gets there."""
    async with client.sandbox(SPEC, constraints=HERE) as other:
        await other.upload("secret", bait.token.encode())
        place = f"/proc/{other.native.agent_pid}/root/work"
        if os.geteuid() == 0:
            assert Path(f"{place}/secret").read_text() == bait.token
        yield place


def main(kind: str) -> None:
    """Prints what got out."""
    with bait() as made:
        os.environ["HOME"] = str(made.home)
        os.chdir("/")
        began = time.monotonic()
        found = trio.run({"naive": naive, "sandbox": sandboxed}[kind], made)
        # Threads that hang in a pipe are left behind.
        print(json.dumps({**found, "seconds": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
