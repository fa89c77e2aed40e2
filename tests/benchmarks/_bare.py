"""The baseline of the local provider: bubblewrap alone, as the provider starts it."""

from __future__ import annotations

import os
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from sandstorm import SandboxSpec
from sandstorm_provider_local._confinement import Confinement, Job
from sandstorm_provider_local._session import LocalSession, open_session
from sandstorm_provider_local._state import UidLease

PROGRAM = ("python3", "-I", "-S", "-c", "print(1)")


@attrs.frozen
class Bare:
    """A program in bubblewrap with the flags, seccomp filter, user and cgroup of a run, and the `level` that was verified."""

    confinement: Confinement
    job: Job
    level: str

    def run(self) -> None:
        """Starts bubblewrap, reads all that it writes, and waits for its end: nothing else."""
        spawned = self.confinement.spawn(self.job)
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


@asynccontextmanager
async def bare(state: str) -> AsyncIterator[tuple[LocalSession, Bare]]:
    """A session of the local provider, and what spawns as it does. Raises `ProviderDown` where no sandbox can be made here."""
    async with open_session(state, None) as session:
        await session.check()
        ground, lease, spec = await session._found_ground(), UidLease(session._state), SandboxSpec()
        try:
            group = session._owned.group(ground, spec.memory, spec.cpu)
            job = Job(
                argv=PROGRAM,
                disk=spec.disk,
                uid=lease.uid,
                join_fds=group.join_fds if group else (),
                memory=None if group else spec.memory,
                max_tasks=None if group else ground.max_tasks,
            )
            assert session._facts is not None
            assert isinstance(ground.confinement, Confinement), "there is no bubblewrap to compare with"
            yield session, Bare(ground.confinement, job, str(session._facts.data["level"]))
        finally:
            lease.close()
