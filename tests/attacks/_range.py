"""Runs the attacks of one column of the table, `python _range.py COLUMN [ATTACK ...]`, and prints what each got as JSON.

Start it in a mount namespace of its own. What an attack says is not all that counts: what it killed, sent, wrote or left
behind is looked at from outside.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio
from _bait import PYTHON, ROOT, USER, Bait, as_user, bait, datagrams, decoy
from _table import ATTACKS, DISK, MEMORY, OUTPUT, controls, promised

from sandstorm import Constraints, SandboxSpec, Sandstorm
from sandstorm.provider import Command, Output
from sandstorm_provider_local._confinement import Confinement, Job
from sandstorm_provider_local._landlock import Landlock, landlock_abi
from sandstorm_provider_local._process import Bounds, LocalProcess
from sandstorm_provider_local._runtimes import bwrap_features, find_bwrap, find_runtimes, make_etc
from sandstorm_provider_local._seccomp import seccomp_filter

PROBES = Path(__file__).with_name("_probes.py")
SOURCE = PROBES.read_text()
SPEC = SandboxSpec(memory=MEMORY, disk=DISK, isolation="namespaces-noproc")
HERE = Constraints(only=("local",))
TASKS = 192
Run = Callable[[str, str, float], tuple[bytes, str]]
"""Runs a probe with its parameters for so many seconds at most; its output, and how it ended."""


@attrs.frozen
class Column:
    """How attacks are run, on which level, as which user the decoy runs, so that only the sandbox protects it, and the bytes that may come."""

    run: Run
    user: int = USER
    level: str = ""
    output: int = OUTPUT


@attrs.frozen
class Victim:
    """What stands for the router, and the socket of a service that takes datagrams at a path."""

    process: subprocess.Popen[bytes]
    path: str
    receiver: socket.socket


@contextmanager
def outside(bait: Bait, user: int) -> Iterator[Column]:
    """Without any sandbox, as a plain child process of the router."""

    def run(name: str, parameters: str, timeout: float) -> tuple[bytes, str]:
        near, far = os.pipe()  # stands for what a careless router hands on
        process = subprocess.Popen(
            [PYTHON, "-I", "-S", "-c", SOURCE, name, parameters],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=bait.top / "work",
            pass_fds=[near],
            start_new_session=True,
            **as_user(user),
        )
        try:
            stdout, _ = process.communicate(timeout=timeout)
            return stdout, "exited"
        except subprocess.TimeoutExpired as late:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=0.5)
            return late.stdout or b"", "deadline"
        finally:
            os.close(near)
            os.close(far)
            process.poll()

    yield Column(run, user)


@contextmanager
def client(bait: Bait) -> Iterator[Sandstorm]:
    """A router with a state of its own."""
    settings = {"store": f"sqlite:///{bait.top}/journal.db", "plugins": {"local": {"state_dir": str(bait.top / "state")}}}
    with Sandstorm(settings=settings) as sandstorm:
        yield sandstorm


@contextmanager
def one_shot(bait: Bait) -> Iterator[Column]:
    """In a sandbox of its own for each."""
    with client(bait) as sandstorm:

        def run(name: str, parameters: str, timeout: float) -> tuple[bytes, str]:
            result = sandstorm.run(
                SOURCE, "python", args=[name, parameters], spec=SPEC, constraints=HERE, timeout=timeout, output_limit=OUTPUT
            )
            return result.stdout, result.exit.kind

        yield Column(run, level=sandstorm.run(argv=["true"], constraints=HERE).isolation)


@contextmanager
def box(bait: Bait, way: str) -> Iterator[Column]:
    """In one box, which has to survive all of it: as programs, as cells or in terminals."""
    with client(bait) as sandstorm, sandstorm.sandbox(SPEC, constraints=HERE) as sandbox:
        sandbox.upload("_probes.py", PROBES)
        record = json.loads((Path(sandbox.native.directory) / "record.json").read_text())

        def program(name: str, parameters: str, timeout: float) -> tuple[bytes, str]:
            result = sandbox.run(SOURCE, "python", args=[name, parameters], timeout=timeout, output_limit=OUTPUT)
            return result.stdout, result.exit.kind

        def cell(name: str, parameters: str, timeout: float) -> tuple[bytes, str]:
            code = f"import sys, runpy\nsys.argv = ['', {name!r}, {parameters!r}]\nrunpy.run_path('_probes.py', run_name='__main__');"
            result = sandbox.run(code, "python", keep_state=True, timeout=timeout, output_limit=OUTPUT)
            return result.stdout, result.exit.kind

        def terminal(name: str, parameters: str, timeout: float) -> tuple[bytes, str]:
            argv = ("python3", "-I", "-S", "_probes.py", name, parameters)
            with sandbox.exec(*argv, terminal=(80, 24), timeout=timeout) as running:
                data = b"".join(output.data for output in running)
                assert running.exit is not None
                return data, running.exit.kind

        run = {"box": program, "cell": cell, "terminal": terminal}[way]
        yield Column(
            run,
            record["uid"] if ROOT else USER,
            sandbox.isolation,
            OUTPUT if way != "terminal" else Command(argv=(), timeout=1).output_limit,
        )
        assert sandbox.run("print('alive')", "python").stdout == b"alive\n"


@contextmanager
def level(bait: Bait, name: str) -> Iterator[Column]:
    """On a level that this machine would not choose, since it has a better one."""
    runtimes = find_runtimes(as_other_user=ROOT)
    scratch = bait.top / "programs"
    scratch.mkdir(mode=0o711)
    bwrap = find_bwrap(None, scratch)
    features = bwrap_features(bwrap) if bwrap else None
    etc, machine = make_etc(scratch), platform.machine()
    way: Landlock | Confinement
    if name == "process":
        seccomp = seccomp_filter(machine, namespaces=False)
        assert seccomp is not None
        way = Landlock(abi=landlock_abi(), scratch=scratch, path=runtimes.path, seccomp=seccomp, etc=etc)
    else:
        assert bwrap is not None
        assert features is not None
        way = Confinement(
            bwrap=bwrap,
            version=features.version,
            etc=etc,
            proc=False,
            seccomp=seccomp_filter(machine),
            path=runtimes.path,
            can_disable_userns=features.can_disable_userns,
        )

    def run(probe: str, parameters: str, timeout: float) -> tuple[bytes, str]:
        job = Job(
            argv=("python3", "-I", "-S", "-c", SOURCE, probe, parameters),
            disk=DISK,
            uid=USER if ROOT else None,
            memory=MEMORY,
            max_tasks=TASKS + (0 if ROOT else _tasks()),
        )
        return trio.run(_collect, way, job, timeout)

    yield Column(run)


def _tasks() -> int:
    """Threads that this user has already, with which those of a sandbox are counted."""
    found = 0
    for task in Path("/proc").glob("[0-9]*/task/*"):
        with suppress(OSError):
            found += task.stat().st_uid == os.geteuid()
    return found


async def _collect(way: Landlock | Confinement, job: Job, timeout: float) -> tuple[bytes, str]:
    bounds = Bounds(deadline=trio.current_time() + timeout, output_limit=OUTPUT)
    process = LocalProcess(way.spawn(job), bounds, lambda: 0)
    stdout, kind = b"", ""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.watch)
            async with process.events() as events:
                async for event in events:
                    if isinstance(event, Output):
                        stdout += event.data if event.stream == "stdout" else b""
                    else:
                        kind = event.kind
    finally:
        await process.kill()
        process.close()
    return stdout, kind


COLUMNS: dict[str, Callable[[Bait], Any]] = {
    "user": lambda bait: outside(bait, USER),
    "root": lambda bait: outside(bait, 0),
    "one-shot": one_shot,
    **{way: lambda bait, way=way: box(bait, way) for way in ("box", "cell", "terminal")},
    **{name: lambda bait, name=name: level(bait, name) for name in ("process", "noproc")},
}


# --- what came of it --------------------------------------------------------------------------------------------------


def strike(bait: Bait, column: Column, victim: Victim, name: str, *, free: bool) -> dict[str, Any]:
    """What an attack got: what it says, and what is seen of it from outside. `free` is whether there is no sandbox."""
    attack = ATTACKS[name]
    given = {"token": bait.pieces, "pid": victim.process.pid, "address": victim.path, **attack.parameters(bait)}
    if free:
        given |= attack.outside(bait)
        if name == "custodians":
            given["pids"] = [victim.process.pid]
    stdout, kind = column.run(attack.probe, json.dumps(given), attack.timeout)
    seen = []
    if name == "signal-router" and _ended(victim.process):
        seen.append("the decoy has ended")
    with suppress(BlockingIOError):
        while True:
            seen.append(f"received {victim.receiver.recv(100)!r}")
    if name == "flood" and len(stdout) > column.output:
        seen.append(f"{len(stdout)} bytes")
    if name == "daemons":
        seen += [f"process {pid} lives" for pid in _end_daemons(f"daemon-{bait.token}")]
    reports = [line for line in stdout.splitlines() if line.startswith(b'{"got"')]
    said = json.loads(reports[-1])["got"] if reports else []
    return {"got": said + seen, "exit": kind, "reported": bool(reports) or b"they run" in stdout}


def _ended(process: subprocess.Popen[bytes]) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.2)
    return process.returncode is not None


def _end_daemons(name: str) -> list[int]:
    """The daemons that an attack has left, which are ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (entry / "cmdline").read_bytes().startswith(name.encode()):
                    found.append(int(entry.name))
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


def main(column: str, *only: str) -> None:
    """Prints what the attacks of a column got, or some of them."""
    free = column in ("user", "root")
    names = [name for name, user in controls().items() if user == column] if free else promised(column)
    with bait() as made:
        os.environ.update({"SANDSTORM_ATTACKED_KEY": made.token, "HOME": str(made.home)})
        os.chdir("/")
        with COLUMNS[column](made) as way, datagrams(made) as (path, receiver), decoy(made, way.user) as process:
            victim = Victim(process, path, receiver)
            found = {}
            # The one that kills the decoy comes last, since the others want to see it.
            for name in sorted(names, key=lambda name: name == "signal-router"):
                if only and name not in only:
                    continue
                began = time.monotonic()
                found[name] = strike(made, way, victim, name, free=free)
                found[name]["seconds"] = round(time.monotonic() - began, 2)
        print(json.dumps({"level": way.level, "attacks": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
