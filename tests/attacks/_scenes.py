"""Attacks that take more than one program: `python _scenes.py SCENE` prints what was seen as JSON.

Start it in a mount namespace of its own.
"""
# ruff: noqa: ASYNC240, ASYNC221, ASYNC220 - a script that does one thing at a time

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
from _bait import PYTHON, ROOT, USER, Bait, as_user, bait
from _range import HERE, PROBES, SPEC

from sandstorm import AsyncSandstorm, SandstormError
from sandstorm._async_box import AsyncBox

LOOK = """
import os, sys
token = "".join(sys.argv[1:])
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                if token.encode() in file.read():
                    print(open(f"/proc/{pid}/comm").read().strip(), name)
        except OSError:
            pass
"""
UNREST = {
    "stop once": "os.kill(-1, signal.SIGSTOP)",
    "kill": "os.kill(-1, signal.SIGKILL)",
    "every signal": "[os.kill(-1, number) for number in range(1, 65) if number not in (9, 19, 32, 33)]",
    "kill the first": "[os.kill(1, number) for number in range(1, 65) if number not in (32, 33)]",
    "stop forever": "print(1, flush=True)\nwhile True: os.kill(-1, signal.SIGSTOP)",
    "kill forever": "print(1, flush=True)\nwhile True: os.kill(-1, signal.SIGKILL)",
    "fill every place": "[os.posix_spawn('/bin/sleep', ['sleep', '60'], {}) for _ in range(400)]",
}
"""What a program does to everything of its own user that it can reach: the processes that look after it are of that user."""


@asynccontextmanager
async def router(bait: Bait) -> AsyncIterator[AsyncSandstorm]:
    """A client with a state of its own."""
    settings = {"store": f"sqlite:///{bait.top}/journal.db", "plugins": {"local": {"state_dir": str(bait.top / "state")}}}
    async with AsyncSandstorm(settings=settings) as client:
        yield client


def look(token: str, user: int) -> list[str]:
    """The programs in whose command line or variables a user finds the token."""
    argv = [PYTHON, "-I", "-S", "-c", LOOK, token[:8], token[8:]]
    done = subprocess.run(argv, env={}, cwd="/", capture_output=True, check=True, text=True, **as_user(user))
    return sorted(set(done.stdout.splitlines()))


async def secrets(bait: Bait) -> dict[str, Any]:
    """Who has a secret, while programs that were given it run: as root and as another user; and where it is on a command line."""
    os.environ["SANDSTORM_SECRET_KEY"] = bait.token
    spec = attrs.evolve(SPEC, secrets=("KEY",))
    async with router(bait) as client, client.sandbox(spec, constraints=HERE) as box, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.run(argv=["sleep", "20"], spec=spec, constraints=HERE, timeout=2.0))
        async with box.exec("sh", "-c", "echo up; exec sleep 20", timeout=20) as running:
            await anext(aiter(running))
            await trio.sleep(1.0)
            as_root = await trio.to_thread.run_sync(look, bait.token, os.geteuid())
            as_other = await trio.to_thread.run_sync(look, bait.token, USER if ROOT else os.geteuid())
            await running.kill()
        careless = subprocess.Popen([PYTHON, "-c", "import time; time.sleep(20)", bait.token], env={})
        try:
            await trio.sleep(0.2)
            shown = await trio.to_thread.run_sync(look, bait.token, USER)
        finally:
            careless.kill()
            careless.wait()
    return {"as root": as_root, "as another user": as_other, "on a command line": shown}


async def unrest(bait: Bait) -> dict[str, Any]:
    """For each kind of unrest: how the next program of the same box ended, after how many seconds, and whether the box ended well."""
    found: dict[str, Any] = {}
    async with router(bait) as client:
        for name, code in UNREST.items():
            began = time.monotonic()
            with trio.move_on_after(30):
                async with client.sandbox(SPEC, constraints=HERE) as box:
                    found[name] = await _after(box, code)
            found.setdefault(name, {})["ended"] = time.monotonic() - began < 25
    return found


async def _after(box: AsyncBox, code: str) -> dict[str, Any]:
    program = f"import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n{code}"
    async with box.exec("python3", "-I", "-S", "-c", program, timeout=8) as running:
        with trio.move_on_after(0.7):
            async for _ in running:
                pass
        began, told = time.monotonic(), ""
        with trio.move_on_after(12):
            try:
                told = (await box.run("print(1)", "python", timeout=1)).exit.kind
            except SandstormError as exc:
                told = type(exc).__name__
        return {"next": told, "seconds": round(time.monotonic() - began, 2)}


async def neighbours(bait: Bait) -> dict[str, Any]:
    """What a program gets of another box, with all that is known of it outside; and what root gets outside, in the same way."""
    async with (
        router(bait) as client,
        client.sandbox(SPEC, constraints=HERE) as other,
        client.sandbox(SPEC, constraints=HERE) as box,
    ):
        await other.upload("secret", bait.token.encode())
        async with other.exec("sh", "-c", f"echo {bait.token}; exec sleep 60", timeout=60) as running:
            await anext(aiter(running))
            agent, directory = other.native.agent_pid, other.native.directory
            paths = [f"/proc/{agent}/root/work/secret", f"/proc/{agent}/cwd/secret"]
            paths += [str(path) for path in Path(directory).rglob("stdout")]
            reading = json.dumps({"token": bait.pieces, "paths": paths})
            looking = json.dumps({"token": bait.pieces, "pid": agent, "pids": [agent]})
            inside = {}
            for name, given in {"read": reading, "custodians": looking}.items():
                result = await box.run(PROBES.read_text(), "python", args=[name, given])
                inside[name] = json.loads(result.stdout.splitlines()[-1])["got"]
            free = subprocess.run([PYTHON, "-I", "-S", str(PROBES), "read", reading], capture_output=True, check=True).stdout
            await box.run(
                f"import os\nfor number in range(1, 65):\n try: os.kill({agent}, number)\n except OSError: pass", "python"
            )
            lives = (await other.run("print('lives')", "python")).stdout == b"lives\n"
            await running.kill()
    return {"inside": inside, "as root": json.loads(free.splitlines()[-1])["got"], "lives": lives}


SCENES = {work.__name__: work for work in (secrets, unrest, neighbours)}


def main(scene: str) -> None:
    """Prints what was seen."""
    with bait() as made:
        os.environ["HOME"] = str(made.home)
        os.chdir("/")
        print(json.dumps(trio.run(SCENES[scene], made)))


if __name__ == "__main__":
    main(sys.argv[1])
