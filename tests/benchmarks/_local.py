"""What routing and the journal add to a one-shot run on this machine, beside the bare bubblewrap that it comes down to."""

from __future__ import annotations

import os
import select
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import trio
from _measure import Figure, Pairs, interleaved, timed

from sandstorm import SandboxSpec, Sandstorm
from sandstorm_provider_local._confinement import Confinement, Job
from sandstorm_provider_local._session import open_session
from sandstorm_provider_local._state import UidLease

PROGRAM = ("python3", "-I", "-S", "-c", "print(1)")
TARGET = 1.35
WARM_UP = 5
PAUSE_SECONDS = 0.1
"""Before each measurement of the second rhythm. Joining a cgroup took several milliseconds longer where no other process
had joined one just before: runs in a row pay that or not by chance, and runs apart always do. The cause is not traced."""


def measure(quick: bool) -> Iterable[Figure]:
    """The ratio of `Sandstorm.run` to the spawn alone, and the milliseconds between the two, in both rhythms."""
    for name, pause, count in (("", 0.0, 300), (", each after a pause", PAUSE_SECONDS, 80)):
        pairs, level = trio.run(_pairs, 10 if quick else count, pause)
        yield Figure(
            name=f"one-shot local run{name}",
            value=pairs.ratio,
            unit="x",
            target=TARGET,
            baseline=f"bubblewrap with the same flags, seccomp, user and cgroup: {median(pairs.baseline) * 1000:.1f} ms",
            detail=f"{pairs.difference * 1000:.1f} ms more; {pairs.spread}; {level}, warm blocking client, synced SQLite file",
        )


async def _pairs(count: int, pause: float) -> tuple[Pairs, str]:
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        _open_up(folder)
        state = f"{folder}/state"
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
                return _interleaved(confinement, job, (folder, state), count, pause), str(facts.data["level"])
            finally:
                lease.close()


def _open_up(folder: str) -> None:
    """Lets the sandbox's own user reach what the provider keeps below."""
    Path(folder).chmod(0o711)


def _interleaved(confinement: Confinement, job: Job, places: tuple[str, str], count: int, pause: float) -> Pairs:
    folder, state = places
    settings = {"store": f"sqlite:///{folder}/journal.db", "providers": ["local"], "plugins": {"local": {"state_dir": state}}}
    with Sandstorm(settings=settings) as sandstorm:

        def routed() -> None:
            result = sandstorm.run(argv=PROGRAM)
            assert result.stdout == b"1\n", result

        def bare() -> None:
            _bare(confinement, job)

        def after_pause(call: Callable[[], None]) -> float:
            time.sleep(pause)
            return timed(call)

        for _ in range(WARM_UP):
            routed()
            bare()
        return interleaved(lambda: after_pause(routed), lambda: after_pause(bare), count)


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
