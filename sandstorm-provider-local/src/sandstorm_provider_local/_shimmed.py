"""A program under a shim: what the levels without bubblewrap share."""

from __future__ import annotations

import marshal
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from sandstorm_provider_local._confinement import Job, Spawned, sealed_file

_SHIM = str(Path(__file__).with_name("_shim.py"))


@attrs.frozen
class Scratch:
    """Host directories of one program: `top` is removed with it, `work` is its work area, `tmp` takes the place of `/tmp`."""

    top: str
    work: str
    tmp: str


def new_scratch(parent: Path, job: Job) -> Scratch:
    """Makes them; `work` is the one of the job where it brings one."""
    top = parent / f"program-{secrets.token_hex(8)}"
    top.mkdir(mode=0o711)
    work = Path(job.work) if job.work is not None else top / "work"
    for place in {work, top / "tmp"} - {Path(job.work or "")}:
        place.mkdir(mode=0o700)
        if job.uid is not None:
            os.chown(place, job.uid, job.uid)
    return Scratch(str(top), str(work), str(top / "tmp"))


@attrs.frozen(kw_only=True)
class Start:
    """How a shim starts a program.

    Attributes:
        argv: What is executed.
        env: Its whole environment.
        cwd: The host directory in which it starts.
        limits: Resource limits of each process.
        ruleset: An open Landlock ruleset to enter, or None.
        seccomp: The system call filter, or None.
        exact: Whether its exit code is the program's own; else one above 128 stands for a signal.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    limits: Sequence[tuple[int, int]]
    ruleset: int | None = None
    seccomp: bytes | None = None
    exact: bool = True


def spawn_shimmed(job: Job, scratch: Scratch, start: Start) -> Spawned:
    """Starts the shim, which starts the program and removes `scratch.top` at its end. Raises `OSError`."""
    with ExitStack() as given_away, ExitStack() as on_failure:

        def pipe(*, ours_reads: bool) -> tuple[int, int]:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            ours, theirs = (reading, writing) if ours_reads else (writing, reading)
            given_away.callback(os.close, theirs)
            on_failure.callback(os.close, ours)
            os.set_blocking(ours, False)
            return ours, theirs

        def memory_file(data: bytes) -> int:
            fd = sealed_file(data)
            given_away.callback(os.close, fd)
            return fd

        stdout, write_stdout = pipe(ours_reads=True)
        stderr, write_stderr = pipe(ours_reads=True)
        status, write_status = pipe(ours_reads=True)
        leash, their_leash = pipe(ours_reads=False)
        rulesets = [] if start.ruleset is None else [start.ruleset]
        order = memory_file(
            marshal.dumps(
                {
                    "argv": list(start.argv),
                    "env": dict(start.env),
                    "cwd": start.cwd,
                    "limits": list(start.limits),
                    "uid": job.uid,
                    "join": list(job.join_fds),
                    "files": {f"{scratch.work}/{path}": bytes(data) for path, data in job.files.items()},
                    "ruleset": rulesets,
                    "seccomp": start.seccomp,
                    "exact": start.exact,
                    "status": write_status,
                    "leash": their_leash,
                    "remove": [scratch.top],
                }
            )
        )
        popen = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", _SHIM, str(order)],
            stdin=memory_file(job.stdin) if job.stdin else subprocess.DEVNULL,
            stdout=write_stdout,
            stderr=write_stderr,
            pass_fds=[order, write_status, their_leash, *rulesets, *job.join_fds],
            env={},
            cwd="/",
            start_new_session=True,
        )
        on_failure.pop_all()
    return Spawned(popen, stdout, stderr, status, leash)
