"""The level `process`: a plain process that Landlock keeps from the host's files and a filter from its network and IPC.

Landlock is the kernel's own sandboxing for unprivileged programs; its numbers are those of `linux/landlock.h`. It needs no
namespaces, so that it works where those are forbidden, and hides nothing: names and process ids of the host can be seen.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import attrs

from sandstorm_provider_local._confinement import Job, Spawned, process_limits
from sandstorm_provider_local._shimmed import Scratch, Start, new_scratch, spawn_shimmed
from sandstorm_provider_local._unconfined import plain_environment

NEEDED_ABI = 4
"""The first version that keeps a program from TCP ports, in Linux 6.7; the level is not given below it."""
SCOPED_ABI = 6
"""The first version that keeps a program from signalling others, in Linux 6.12."""

_CREATE_RULESET, _ADD_RULE = 444, 445
_ASK_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_ALL_BY_ABI = {4: (1 << 15) - 1, 5: (1 << 16) - 1}
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_ABOUT_THE_HOST = ("passwd", "group", "hosts")
"""Files of the stand-in `/etc` that say something else than the host's own, which stay closed."""

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version of Landlock in this kernel; 0 where it has none or it is switched off."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)))


@attrs.frozen(kw_only=True)
class Landlock:
    """What is the same for every program of a session.

    Attributes:
        abi: The version of Landlock, at least `NEEDED_ABI`.
        scratch: The directory in which programs get theirs.
        path: The search path of programs.
        seccomp: The filter; one for programs without namespaces.
        etc: The stand-in for `/etc` of the other levels: of the host's, a program may read what is also in there.
        extra: Host directories with runtimes outside of `/usr`.
    """

    abi: int
    scratch: Path
    path: str
    seccomp: bytes
    etc: str
    extra: Sequence[str] = ()

    def spawn(self, job: Job) -> Spawned:
        """Starts the program, as the unprivileged user of the job. Raises `OSError` where it cannot be confined or started."""
        scratch = new_scratch(self.scratch, job)
        ruleset = self._ruleset(scratch)
        try:
            return spawn_shimmed(
                job,
                scratch,
                Start(
                    argv=job.argv,
                    env=plain_environment(job, scratch, self.path),
                    cwd=f"{scratch.work}/{job.cwd}",
                    limits=process_limits(job.disk, job.memory, job.max_tasks),
                    ruleset=ruleset,
                    seccomp=self.seccomp,
                ),
            )
        finally:
            os.close(ruleset)

    def _ruleset(self, scratch: Scratch) -> int:
        everything = _ALL_BY_ABI[min(self.abi, max(_ALL_BY_ABI))]
        handled = struct.pack("=QQ", everything, _TCP)
        if self.abi >= SCOPED_ABI:
            handled += struct.pack("=Q", _ABSTRACT_SOCKETS_AND_SIGNALS)
        ruleset = _called(_libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0), "landlock_create_ruleset")
        try:
            for path in (scratch.work, scratch.tmp):
                _allow(ruleset, path, everything)
            for path in _DEVICES:
                _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & everything)
            for path in (*_SYSTEM, *self.extra, *self._public()):
                _allow(ruleset, path, _READ)
        except BaseException:
            os.close(ruleset)
            raise
        return ruleset

    def _public(self) -> Iterator[str]:
        for place in Path(self.etc).rglob("*"):
            name = place.relative_to(self.etc)
            if not place.is_dir() and str(name) not in _ABOUT_THE_HOST:
                yield f"/etc/{name}"


def _allow(ruleset: int, path: str, access: int) -> None:
    with suppress(FileNotFoundError, PermissionError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                access &= _OF_FILES
            rule = struct.pack("=Qi", access, fd)
            _called(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), f"landlock_add_rule for {path}")
        finally:
            os.close(fd)


def _called(returned: int, call: str) -> int:
    if returned < 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return returned
