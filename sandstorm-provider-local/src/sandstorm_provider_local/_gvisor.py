"""The level `gvisor`: a program on a kernel of its own, which `runsc` runs as an unprivileged process.

Each program gets an OCI bundle: `/usr` and the stand-in `/etc` read-only, `/tmp` in memory, its work area, and nothing else of the
host. `runsc` runs rootless and without control groups of its own: its shim puts it into the sandbox's group and takes it down.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from sandstorm_provider_local._confinement import MIB, WORKDIR, Job, Spawned, process_limits
from sandstorm_provider_local._shimmed import Scratch, Start, new_scratch, spawn_shimmed

OVERHEAD = 32
"""MiB that the kernel of one sandbox takes itself: 23 to 25 at its peak beside a small program, with version 20221219."""
PLATFORMS = ("systrap", "ptrace")
"""How it catches system calls, fastest first; the first that runs is used. Old versions have the second alone."""
_SEARCHED = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_TMP = 64
_CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_LIMIT_NAMES = {
    getattr(resource, name): name for name in ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_NPROC")
}


def find_runsc(setting: str | None) -> str | None:
    """The `runsc` to use: the one that is set, else the one below `/usr`; None for none that can be executed."""
    if setting is not None:
        return setting if os.access(setting, os.X_OK) else None
    return shutil.which("runsc", path=_SEARCHED)


def runsc_version(runsc: str) -> str | None:
    """Its version, or None where it does not even start."""
    try:
        said = subprocess.run([runsc, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout  # noqa: S603 - our own arguments
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].split()[-1] if said.split() else None


@attrs.frozen(kw_only=True)
class Gvisor:
    """What is the same for every program of a session.

    Attributes:
        runsc: The path of `runsc`.
        version: Its version.
        platform: One of `PLATFORMS`.
        scratch: The directory in which programs get theirs.
        path: The search path of programs.
        etc: A directory that stands in for the host's `/etc`.
        extra: Host directories with runtimes outside of `/usr`, bound read-only.
    """

    runsc: str
    version: str
    platform: str
    scratch: Path
    path: str
    etc: str
    extra: Sequence[str] = ()

    def spawn(self, job: Job) -> Spawned:
        """Starts the program on a kernel of its own. Raises `OSError` where the process cannot be started.

        Limits on single processes are the guest kernel's; memory, processes and CPU of all are limited by the job's group alone,
        whose memory needs `OVERHEAD` on top.
        """
        scratch = new_scratch(self.scratch, job)
        bundle = Path(scratch.top) / "bundle"
        self._make_root(bundle / "rootfs", [inside for _, inside in job.binds])
        (bundle / "config.json").write_text(json.dumps(self._config(job, scratch)))
        for place in (bundle / "config.json", bundle):
            # Its variables may be secrets.
            place.chmod(0o500 if place.is_dir() else 0o400)
            if job.uid is not None:
                os.chown(place, job.uid, job.uid)
        argv = [self.runsc, "--rootless", "--ignore-cgroups", "--network", "none", "--platform", self.platform]
        # Its name has to be unique on the machine: `runsc` makes an abstract socket of it.
        argv += ["--root", scratch.tmp, "run", "--bundle", str(bundle), Path(scratch.top).name]
        return spawn_shimmed(
            job,
            scratch,
            Start(argv=argv, env={"PATH": _SEARCHED}, cwd=scratch.tmp, limits=(), exact=False),
        )

    def _make_root(self, root: Path, places: Sequence[str]) -> None:
        root.mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            if pathlib.Path(f"/{name}").is_symlink():
                (root / name).symlink_to(str(Path("/", name).readlink()).lstrip("/"))
        for name in ("usr", "etc", "proc", "dev", "sys", "tmp", "work", *(path.lstrip("/") for path in (*self.extra, *places))):
            (root / name).mkdir(parents=True, exist_ok=True)

    def _config(self, job: Job, scratch: Scratch) -> dict[str, Any]:
        limits = [
            {"type": _LIMIT_NAMES[kind], "soft": amount, "hard": amount}
            for kind, amount in process_limits(job.disk, job.memory, job.max_tasks)
        ]
        variables = {"PATH": self.path, "HOME": WORKDIR, "LANG": "C.UTF-8", **job.env}
        none: list[str] = []
        return {
            "ociVersion": "1.0.0",
            "process": {
                "user": {"uid": 0, "gid": 0},
                # Through a shell, whose exit tells a program that is not there from a sandbox that could not be made.
                "args": ["/bin/sh", "-c", 'exec "$@"', "sh", *job.argv],
                "env": [f"{name}={value}" for name, value in variables.items()],
                "cwd": f"{WORKDIR}/{job.cwd}".rstrip("/"),
                "capabilities": dict.fromkeys(_CAPABILITY_SETS, none),
                "rlimits": limits,
                "noNewPrivileges": True,
            },
            "root": {"path": "rootfs", "readonly": True},
            "hostname": "sandbox",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                _bound("/usr", "/usr"),
                *(_bound(path, path) for path in _real_directories()),
                _bound(self.etc, "/etc"),
                *(_bound(path, path) for path in self.extra),
                *(_bound(host, inside) for host, inside in job.binds),
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", f"size={_TMP * MIB}"]},  # noqa: S108 - inside
                _bound(scratch.work, WORKDIR, "rw"),
            ],
            "linux": {"namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")]},
        }


def _bound(source: str, destination: str, mode: str = "ro") -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", mode]}


def _real_directories() -> list[str]:
    """Directories of programs that are no links into `/usr`, on systems that have not merged them."""
    paths = [pathlib.Path("/", name) for name in ("bin", "sbin", "lib", "lib32", "lib64")]
    return [str(path) for path in paths if path.is_dir() and not path.is_symlink()]
