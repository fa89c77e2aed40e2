"""Which isolation this machine really gives: tried in a sandbox, and published as found and not as intended."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import attrs
import trio

from sandstorm.provider import Exit, Output, ProviderError
from sandstorm_provider_local._cgroup import Cgroup, CgroupPool, Limits
from sandstorm_provider_local._confinement import Confinement, Job
from sandstorm_provider_local._process import Bounds, LocalProcess

_MEMORY = 128
_SECONDS = 10.0
_FILTERED = "system calls filtered"


@attrs.frozen(kw_only=True)
class Verdict:
    """What was found.

    Attributes:
        level: The level of `ISOLATION_LEVELS` that was verified, or None where none was.
        verified: What holds, each in a few words.
        failed: What does not, or what went wrong.
    """

    level: str | None
    verified: tuple[str, ...]
    failed: tuple[str, ...]


async def verify(confinement: Confinement, python: str, pool: CgroupPool | None, uid: int | None, session: Path) -> Verdict:
    """Runs the probe once and judges what it saw. Fails closed: one line that does not hold, and there is no level."""
    group = pool.take(Limits(_MEMORY, 1.0)) if pool else None
    try:
        findings = await _findings(confinement, python, group, uid, session)
    except (OSError, ProviderError, ValueError) as exc:
        return Verdict(level=None, verified=(), failed=(str(exc),))
    finally:
        if pool and group:
            pool.give_back(group)
    missing = {_FILTERED} if confinement.seccomp is None else set()
    failed = tuple(name for name, holds in findings.items() if not holds)
    verified = tuple(name for name, holds in findings.items() if holds)
    level = None if set(failed) - missing else _level(confinement, group)
    return Verdict(level=level, verified=verified, failed=failed)


def _level(confinement: Confinement, group: Cgroup | None) -> str:
    if not confinement.proc:
        return "namespaces-noproc"
    return "namespaces+cgroup" if group else "namespaces"


async def _findings(
    confinement: Confinement, python: str, group: Cgroup | None, uid: int | None, session: Path
) -> dict[str, bool]:
    probe = files("sandstorm_provider_local").joinpath("_probe.py").read_text()
    with _bait(session) as (secret, port):
        job = Job(
            argv=(python, "-I", "-S", "-c", probe, secret, str(port)),
            disk=16,
            uid=uid,
            join_fds=group.join_fds if group else (),
        )
        spawned = confinement.spawn(job)
        process = LocalProcess(spawned, Bounds(deadline=trio.current_time() + _SECONDS, output_limit=65536), lambda: 0)
        try:
            # The child has joined its group and dropped its user before spawn returned.
            outside = _outside(spawned.popen.pid, group)
            told, said = await _output(process)
        finally:
            await process.kill()
            process.close()
    try:
        inside: dict[str, bool] = json.loads(told)
    except ValueError:
        raise ValueError(f"the probe did not run: {said or told or 'no output'}") from None
    return {**inside, **outside}


def _outside(pid: int, group: Cgroup | None) -> dict[str, bool]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    ids = next(line.split()[1:] for line in status if line.startswith("Uid:"))
    findings = {"unprivileged user": "0" not in ids}
    if group is not None:
        findings["memory, processes and CPU limited"] = group.memory_limit == _MEMORY << 20 and group.holds(pid)
    return findings


@contextmanager
def _bait(session: Path) -> Iterator[tuple[str, int]]:
    """A secret that everybody on the host may read, and a listener on the host's loopback."""
    secret = session / f"secret-{secrets.token_hex(8)}"
    secret.write_text("secret")
    secret.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            yield str(secret), listener.getsockname()[1]
        finally:
            secret.unlink()


async def _output(process: LocalProcess) -> tuple[str, str]:
    streams = {"stdout": b"", "stderr": b""}
    with trio.move_on_after(_SECONDS):
        async with process.events() as events:
            async for event in events:
                if isinstance(event, Output):
                    streams[event.stream] += event.data
                elif isinstance(event, Exit):
                    break
    return streams["stdout"].decode(errors="replace"), streams["stderr"].decode(errors="replace").strip()
