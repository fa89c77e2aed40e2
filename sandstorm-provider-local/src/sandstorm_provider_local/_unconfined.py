"""The level `none`: a plain process, with resource limits, a cleared environment and directories of its own. No isolation."""

from __future__ import annotations

from pathlib import Path

import attrs

from sandstorm_provider_local._confinement import Job, Spawned, process_limits
from sandstorm_provider_local._shimmed import Scratch, Start, new_scratch, spawn_shimmed


def plain_environment(job: Job, scratch: Scratch, path: str) -> dict[str, str]:
    """The environment of a program that sees the host's own paths: nothing of the router's is in it."""
    return {"PATH": path, "HOME": scratch.work, "TMPDIR": scratch.tmp, "LANG": "C.UTF-8", **job.env}


@attrs.frozen(kw_only=True)
class Unconfined:
    """What is the same for every program of a session.

    Attributes:
        scratch: The directory in which programs get theirs.
        path: The search path of programs.
    """

    scratch: Path
    path: str

    def spawn(self, job: Job) -> Spawned:
        """Starts the program, as the unprivileged user of the job. Raises `OSError` where the process cannot be started."""
        scratch = new_scratch(self.scratch, job)
        return spawn_shimmed(
            job,
            scratch,
            Start(
                argv=job.argv,
                env=plain_environment(job, scratch, self.path),
                cwd=f"{scratch.work}/{job.cwd}",
                limits=process_limits(job.disk, job.memory, job.max_tasks),
            ),
        )
