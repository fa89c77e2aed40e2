"""How a program is confined: the bubblewrap command line, and the process that runs it.

A benchmark or a reviewer gets exactly what a run gets from `Confinement.spawn`, without the event plumbing.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pathlib
import resource
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from sandstorm_provider_local._warden import title

WORKDIR = "/work"
MIB = 1024 * 1024
INSIDE_ID = 1000
"""User and group id that a program sees as its own; outside it is another one without any rights."""
_OPEN_FILES = 1024
_TMP = 64
"""MiB of `/tmp` and of `/dev/shm`, beside the work area."""

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS = 38


@attrs.frozen
class Spawned:
    """A running bubblewrap and the reading ends of its pipes. `status` carries bubblewrap's own report, as JSON lines.

    Levels without bubblewrap have a shim in its place: it ends with all that it started once `leash` is closed.
    """

    popen: subprocess.Popen[bytes]
    stdout: int
    stderr: int
    status: int
    leash: int | None = None


@attrs.frozen(kw_only=True)
class Job:
    """One program to confine.

    Attributes:
        argv: Program and arguments.
        env: Its whole environment, beside PATH, HOME and LANG.
        cwd: Its working directory, relative to the work area.
        stdin: All that it may read.
        files: Files that are put into a fresh work area first, by relative path.
        work: The host directory that becomes the work area; None for one in memory that goes with the program.
        disk: MiB of the work area where it is in memory, and of the largest single file where it is not.
        uid: The user id outside to run as; None for the caller's own.
        join_fds: Open `cgroup.procs` files of the group to join.
        memory: MiB for each process, where there is no group that limits all of them.
        max_tasks: Processes and threads of the user id, likewise.
        binds: Host paths and where they appear inside, read-only.
        network: Whether it shares the host's network, its loopback included: for our own installers alone.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = attrs.field(factory=dict)
    cwd: str = ""
    stdin: bytes = b""
    files: Mapping[str, bytes] = attrs.field(factory=dict)
    work: str | None = None
    disk: int
    uid: int | None = None
    join_fds: Sequence[int] = ()
    memory: int | None = None
    max_tasks: int | None = None
    binds: Sequence[tuple[str, str]] = ()
    network: bool = False


@attrs.frozen(kw_only=True)
class Confinement:
    """What is the same for every program of a session.

    Attributes:
        bwrap: The path of bubblewrap.
        version: Its version.
        etc: A directory that stands in for the host's `/etc`.
        proc: Whether a fresh `/proc` can be mounted; without, there is none at all.
        seccomp: The filter, or None where this machine has none.
        extra: Host directories with runtimes outside of `/usr`, bound read-only.
        path: The search path of programs.
        can_disable_userns: Whether this bubblewrap can forbid further user namespaces here.
        hostname: Whether it has a host name of its own.
        system: Bubblewrap's arguments that put an image's root file system in place; None for the host's `/usr`.
    """

    bwrap: str
    version: str
    etc: str
    proc: bool
    seccomp: bytes | None
    extra: Sequence[str] = ()
    path: str
    can_disable_userns: bool
    hostname: bool = True
    system: tuple[str, ...] | None = None
    prefix: tuple[str, ...] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self._fixed_arguments()))

    def _fixed_arguments(self) -> list[str]:
        arguments = [self.bwrap, "--unshare-all", "--unshare-user"]
        if self.can_disable_userns:
            arguments.append("--disable-userns")
        arguments += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
        if self.hostname:
            arguments += ["--hostname", "sandbox"]
        arguments += ["--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID)]
        arguments += self._host_system() if self.system is None else self.system
        if self.proc:
            arguments += ["--proc", "/proc"]
        shared = str(_TMP * MIB)
        arguments += ["--dev", "/dev", "--size", shared, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]  # noqa: S108 - a path inside the sandbox
        arguments += ["--perms", "1777", "--size", shared, "--tmpfs", "/tmp"]  # noqa: S108 - a path inside the sandbox
        return arguments

    def _host_system(self) -> list[str]:
        arguments = ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            if pathlib.Path(f"/{name}").is_symlink():
                arguments += ["--symlink", str(Path("/", name).readlink()).lstrip("/"), f"/{name}"]
            elif pathlib.Path(f"/{name}").is_dir():
                arguments += ["--ro-bind", f"/{name}", f"/{name}"]
        for directory in self.extra:
            arguments += ["--ro-bind", directory, directory]
        arguments += ["--ro-bind", self.etc, "/etc"]
        if pathlib.Path("/etc/alternatives").is_dir():
            arguments += ["--ro-bind", "/etc/alternatives", "/etc/alternatives"]
        return arguments

    def spawn(self, job: Job) -> Spawned:
        """Starts the program; it is in its group, without privileges and limited, before it can start another.

        Call it from a thread that lives as long as the program may: bubblewrap ends when that thread does.
        Raises `OSError` where the process cannot be started.
        """
        with ExitStack() as given_away:
            fds: list[int] = []

            def sealed(data: bytes) -> int:
                fd = sealed_file(data)
                given_away.callback(os.close, fd)
                return fd

            def hand_over(data: bytes) -> str:
                # Bubblewrap closes what it was handed, so that the program does not inherit it.
                fds.append(sealed(data))
                return str(fds[-1])

            def pipe() -> tuple[int, int]:
                reading, writing = os.pipe2(os.O_CLOEXEC)
                given_away.callback(os.close, writing)
                on_failure.callback(os.close, reading)
                os.set_blocking(reading, False)
                return reading, writing

            with ExitStack() as on_failure:
                stdout, write_stdout = pipe()
                stderr, write_stderr = pipe()
                status, write_status = pipe()
                fds.append(write_status)
                dynamic = [*self._work_arguments(job)]
                for host, inside in job.binds:
                    dynamic += ["--ro-bind", host, inside]
                if job.network:
                    dynamic.append("--share-net")
                for path, data in job.files.items():
                    dynamic += ["--file", hand_over(data), f"{WORKDIR}/{path}"]
                dynamic += ["--remount-ro", "/", "--chdir", f"{WORKDIR}/{job.cwd}".rstrip("/")]
                for name, value in {"PATH": self.path, "HOME": WORKDIR, "LANG": "C.UTF-8", **job.env}.items():
                    dynamic += ["--setenv", name, value]
                if self.seccomp is not None:
                    dynamic += ["--seccomp", hand_over(self.seccomp)]
                # Through a file, since everybody on the machine may read a command line and these may be secrets.
                arguments = hand_over(b"".join(argument.encode(errors="surrogateescape") + b"\0" for argument in dynamic))
                popen = subprocess.Popen(  # noqa: S603 - running code is the point
                    [title(), *self.prefix[1:], "--json-status-fd", str(write_status), "--args", arguments, "--", *job.argv],
                    executable=self.bwrap,
                    stdin=sealed(job.stdin) if job.stdin else subprocess.DEVNULL,
                    stdout=write_stdout,
                    stderr=write_stderr,
                    pass_fds=fds,
                    env={},
                    cwd="/",
                    preexec_fn=_Descent(job),  # noqa: PLW1509 - it only makes system calls
                )
                on_failure.pop_all()
            return Spawned(popen, stdout, stderr, status)

    def _work_arguments(self, job: Job) -> list[str]:
        if job.work is not None:
            return ["--bind", job.work, WORKDIR]
        return ["--size", str(job.disk * MIB), "--tmpfs", WORKDIR]


def sealed_file(data: bytes) -> int:
    """An open file with exactly `data`, at its beginning, that nobody can change any more."""
    fd = os.memfd_create("sandstorm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def process_limits(disk: int, memory: int | None, max_tasks: int | None) -> list[tuple[int, int]]:
    """The resource limits of each process: MiB of a file, and where there is no group, MiB of memory and tasks of its user."""
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, _OPEN_FILES), (resource.RLIMIT_FSIZE, disk * MIB)]
    if memory is not None:
        limits.append((resource.RLIMIT_DATA, memory * MIB))
    if max_tasks is not None:
        limits.append((resource.RLIMIT_NPROC, max_tasks))
    return limits


class _Descent:
    """What the child does between fork and exec: system calls only, since other threads may hold locks."""

    def __init__(self, job: Job) -> None:
        self._join_fds = tuple(job.join_fds)
        self._uid = job.uid
        self._limits = process_limits(job.disk, job.memory, job.max_tasks)

    def __call__(self) -> None:
        for fd in self._join_fds:
            os.write(fd, b"0")
        for kind, amount in self._limits:
            hard = resource.getrlimit(kind)[1]
            allowed = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
            resource.setrlimit(kind, (allowed, allowed))
        if self._uid is not None:
            os.setgroups(())
            os.setresgid(self._uid, self._uid, self._uid)
            os.setresuid(self._uid, self._uid, self._uid)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
