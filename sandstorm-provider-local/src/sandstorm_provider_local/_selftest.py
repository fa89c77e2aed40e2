"""Which isolation this machine really gives: tried in a sandbox, and published as found and not as intended."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import attrs
import trio

from sandstorm.provider import Output, ProviderError
from sandstorm_provider_local._cgroup import Cgroup, Limits
from sandstorm_provider_local._confinement import Confinement, Job, Spawned
from sandstorm_provider_local._gvisor import Gvisor
from sandstorm_provider_local._landlock import Landlock
from sandstorm_provider_local._pool import CgroupPool
from sandstorm_provider_local._process import Bounds, LocalProcess

_MEMORY = 128
_SECONDS = 10.0
_CHUNK = 4096
_FILTERED = "system calls filtered"
_OWN_KERNEL = "kernel of its own"
_LIMITED = "memory, processes and CPU limited"
_UNBOUNDED = "no privileges to be had"

_ALWAYS = frozenset(
    {"environment cleared", "unprivileged user", "no privileges", "no new privileges", "ends with all it started"}
)
_NO_NAMESPACES = _ALWAYS | {"host files closed", "network off", _FILTERED}
_SEPARATE = _ALWAYS | {
    "files hidden",
    "host files closed",
    "modes of host files kept",
    "network off",
    "host processes hidden",
    "host processes safe from signals",
    "system read-only",
    _UNBOUNDED,
}


class Level(Protocol):
    """One way to confine programs."""

    def spawn(self, job: Job) -> Spawned:
        """Starts the program. Raises `OSError`."""


@attrs.frozen(kw_only=True)
class Verdict:
    """What was found.

    Attributes:
        level: The level of `ISOLATION_LEVELS` that was verified, or None where none was.
        verified: What holds, each in a few words.
        failed: What does not, or what went wrong: with a level, what that level does not enforce here.
    """

    level: str | None
    verified: tuple[str, ...]
    failed: tuple[str, ...]


async def verify(confinement: Level, python: str, pool: CgroupPool | None, uid: int | None, session: Path) -> Verdict:
    """Runs the probe once and judges what it saw. Fails closed: without all that the level promises, there is no level."""
    group = pool.take(Limits(_MEMORY, 1.0)) if pool else None
    try:
        findings = await _findings(confinement, python, group, uid, session)
    except (OSError, ProviderError, ValueError) as exc:
        return Verdict(level=None, verified=(), failed=(str(exc),))
    finally:
        if pool and group:
            pool.give_back(group)
    level, promised, beside_the_point = _promise(confinement, group)
    held = {name for name, holds in findings.items() if holds}
    verified = tuple(name for name in findings if name in held - beside_the_point)
    failed = tuple(name for name in findings if name not in held | beside_the_point)
    return Verdict(level=level if promised <= held else None, verified=verified, failed=failed)


def _promise(confinement: Level, group: Cgroup | None) -> tuple[str, frozenset[str], frozenset[str]]:
    """The name of the level, what must hold for it, and what says nothing about it."""
    limited = frozenset({_LIMITED} if group else ())
    if isinstance(confinement, Confinement):
        filtered = frozenset({_FILTERED} if confinement.seccomp is not None else ())
        # Without a group, `namespaces` says in its name what is not limited.
        beside = frozenset({_OWN_KERNEL} if group else {_OWN_KERNEL, _LIMITED})
        return _named(confinement, group), _SEPARATE | filtered | limited, beside
    if isinstance(confinement, Gvisor):
        # Its kernel has no filter that could be seen from inside; what it lets through is its own, not the host's.
        return "gvisor", _SEPARATE | limited | {_OWN_KERNEL}, frozenset({_FILTERED})
    level, promised = ("process", _NO_NAMESPACES) if isinstance(confinement, Landlock) else ("none", _ALWAYS)
    # Without new privileges it does not matter which ones could be given.
    return level, promised | limited, frozenset({_OWN_KERNEL, _UNBOUNDED})


def _named(confinement: Confinement, group: Cgroup | None) -> str:
    if not confinement.proc:
        return "namespaces-noproc"
    return "namespaces+cgroup" if group else "namespaces"


async def _findings(confinement: Level, python: str, group: Cgroup | None, uid: int | None, session: Path) -> dict[str, bool]:
    probe = files("sandstorm_provider_local").joinpath("_probe.py").read_text()
    with _bait(session) as (bait, port):
        job = Job(
            argv=(python, "-I", "-S", "-c", probe, bait, str(port), str(os.getpid()), os.uname().version),
            disk=16,
            uid=uid,
            join_fds=group.join_fds if group else (),
        )
        spawned = confinement.spawn(job)
        process = LocalProcess(spawned, Bounds(deadline=trio.current_time() + _SECONDS, output_limit=65536), lambda: 0)
        try:
            told, said = await _first_line(process)
            # It waits now, so that what it is can be seen.
            outside = _outside(process, spawned, group) if told.endswith("\n") else {}
            await process.kill()
            outside["ends with all it started"] = _at_end(spawned.stdout)
        finally:
            await process.kill()
            process.close()
    try:
        inside: dict[str, bool] = json.loads(told)
    except ValueError:
        raise ValueError(f"the probe did not run: {said or told or 'no output'}") from None
    return {**inside, **outside}


def _outside(process: LocalProcess, spawned: Spawned, group: Cgroup | None) -> dict[str, bool]:
    pid = spawned.popen.pid if spawned.leash is None else process.child_pid
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    ids = next(line.split()[1:] for line in status if line.startswith("Uid:"))
    limited = group is not None and pid is not None and group.memory_limit == _MEMORY << 20 and group.holds(pid)
    return {"unprivileged user": "0" not in ids, _LIMITED: limited}


def _at_end(pipe: int) -> bool:
    """Whether nobody holds the writing end any more: a daemon that lives on would."""
    with suppress(BlockingIOError):
        while os.read(pipe, _CHUNK):
            pass
        return True
    return False


@contextmanager
def _bait(session: Path) -> Iterator[tuple[str, int]]:
    """A directory where everybody on the host may read and write, with a secret and a socket, and a listener on loopback."""
    bait = session / f"bait-{secrets.token_hex(8)}"
    bait.mkdir()
    bait.chmod(0o777)
    (bait / "secret").write_text("secret")
    (bait / "secret").chmod(0o666)
    with ExitStack() as listening:
        listening.callback(shutil.rmtree, bait)
        listener = listening.enter_context(socket.create_server(("127.0.0.1", 0)))
        directory = os.open(bait, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        listening.callback(os.close, directory)
        # Through the descriptor, since a path to a socket is limited to 107 bytes.
        for name in (f"/proc/self/fd/{directory}/socket", f"\0{bait.name}"):
            unix = listening.enter_context(socket.socket(socket.AF_UNIX))
            unix.bind(name)
            unix.listen()
        (bait / "socket").chmod(0o666)
        yield str(bait), listener.getsockname()[1]


async def _first_line(process: LocalProcess) -> tuple[str, str]:
    streams = {"stdout": b"", "stderr": b""}
    with trio.move_on_after(_SECONDS):
        async with process.events() as events:
            async for event in events:
                if not isinstance(event, Output):
                    break
                streams[event.stream] += event.data
                if streams["stdout"].endswith(b"\n"):
                    break
    return streams["stdout"].decode(errors="replace"), streams["stderr"].decode(errors="replace").strip()
