"""What routing and the journal add to a one-shot run on this machine, beside the bare bubblewrap that it comes down to."""

from __future__ import annotations

import os
import select
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import trio
from _measure import Figure, Pairs, interleaved, timed
from sandstorm_provider_local._confinement import Confinement, Job
from sandstorm_provider_local._session import open_session
from sandstorm_provider_local._state import UidLease

from sandstorm import Sandstorm, SandboxSpec

PROGRAM = ("python3", "-I", "-S", "-c", "print(1)")
TARGET = 1.35
WARM_UP = 5


def measure(quick: bool) -> Iterable[Figure]:
    """The ratio of `Sandstorm.run` to the spawn alone, and the milliseconds between the two."""
    pairs, level = trio.run(_pairs, 20 if quick else 300)
    bare = f"bubblewrap with the same flags, seccomp, user and cgroup: {median(pairs.baseline) * 1000:.1f} ms"
    yield Figure(
        name="one-shot local run",
        value=pairs.ratio,
        unit="x",
        target=TARGET,
        baseline=bare,
        detail=f"{level}; `{' '.join(PROGRAM)}`, warm blocking client, synced SQLite file; {pairs.spread}",
    )
    yield Figure(name="the same, beyond the bare spawn", value=pairs.difference * 1000, unit="ms", detail="median difference")


async def _pairs(count: int) -> tuple[Pairs, str]:
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        Path(folder).chmod(0o711)  # the sandbox's own user has to reach what the provider keeps below
        state = str(Path(folder, "state"))
        async with open_session(state, None) as session:
            facts = await session.refresh()
            confinement, lease = session._confinement, UidLease(session._state)
            if confinement is None:
                raise RuntimeError(f"no sandbox can be made on this machine: {facts.data['failed']}")
            try:
                spec = SandboxSpec()
                group = session._group(spec.memory, spec.cpu)
                job = Job(
                    argv=PROGRAM,
                    disk=spec.disk,
                    uid=lease.uid,
                    join_fds=group.join_fds if group else (),
                    memory=None if group else spec.memory,
                    max_tasks=None if group else session._max_tasks,
                )
                return _interleaved(confinement, job, folder, state, count), str(facts.data["level"])
            finally:
                lease.close()


def _interleaved(confinement: Confinement, job: Job, folder: str, state: str, count: int) -> Pairs:
    settings = {"store": f"sqlite:///{folder}/journal.db", "providers": ["local"], "plugins": {"local": {"state_dir": state}}}
    with Sandstorm(settings=settings) as sandstorm:

        def routed() -> None:
            result = sandstorm.run(argv=PROGRAM)
            assert result.stdout == b"1\n", result

        for _ in range(WARM_UP):
            routed()
            _bare(confinement, job)
        return interleaved(lambda: timed(routed), lambda: timed(lambda: _bare(confinement, job)), count)


def _bare(confinement: Confinement, job: Job) -> None:
    """Starts bubblewrap, reads all that it writes, and waits for its end: nothing else."""
    spawned = confinement.spawn(job)
    said: dict[int, bytes] = dict.fromkeys((spawned.stdout, spawned.stderr, spawned.status), b"")
    open_fds = set(said)
    with select.epoll() as poll:
        for fd in open_fds:
            poll.register(fd, select.EPOLLIN)
        while open_fds:
            for fd, _ in poll.poll():
                data = os.read(fd, 65536)
                said[fd] += data
                if not data:
                    poll.unregister(fd)
                    open_fds.discard(fd)
    assert spawned.popen.wait() == 0, said
    assert said[spawned.stdout] == b"1\n", said
    for fd in said:
        os.close(fd)
