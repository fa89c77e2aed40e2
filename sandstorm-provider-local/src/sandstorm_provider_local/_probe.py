"""Runs inside the sandbox as `python3 -I -S -c`: tries what must not work, prints what happened as JSON, and waits to be killed.

The source of this module is handed over as text; it imports the standard library only and takes as arguments the directory
with the bait, the port of the listener, the process id of the router and the version of the host's kernel.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pathlib
import socket
import sys
import time

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_CAPGET = {"x86_64": 125, "aarch64": 90}
_CAPABILITY_VERSION = 0x20080522
_UNSHARE_USER = 0x10000000
_GET_NO_NEW_PRIVS, _GET_SECCOMP, _READ_BOUNDING = 39, 21, 23
_OWN_VARIABLES = {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD", "TMPDIR"}
_PATIENCE = 30.0


def _refused(path: str, flags: int) -> bool:
    try:
        os.close(os.open(path, flags, 0o600))
    except OSError:
        return True
    return False


def _closed(bait: str) -> bool:
    secret = _refused(f"{bait}/secret", os.O_RDONLY) and _refused(f"{bait}/secret", os.O_WRONLY)
    return secret and _refused(f"{bait}/new", os.O_WRONLY | os.O_CREAT)


def _modes_kept(bait: str) -> bool:
    try:
        os.chmod(f"{bait}/secret", 0o666)  # noqa: PTH101, S103 - the mode that it has already
    except OSError:
        return True
    return False


def _unreachable(family: int, address: tuple[str, int] | str) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.settimeout(1)
            probe.connect(address)
    except OSError:
        return True
    return False


def _only_loopback() -> bool:
    try:
        return [name for _, name in socket.if_nameindex()] in (["lo"], [])
    except OSError:
        return True  # there are no sockets at all


def _network_off(bait: str, port: int) -> bool:
    abstract = _unreachable(socket.AF_UNIX, "\0" + os.path.basename(bait))  # noqa: PTH119 - as below
    return abstract and _path_unreachable(bait) and _unreachable(socket.AF_INET, ("127.0.0.1", port)) and _only_loopback()


def _path_unreachable(bait: str) -> bool:
    try:
        # By its name alone, since a path to a socket is limited to 107 bytes.
        os.chdir(bait)
    except OSError:
        return True
    return _unreachable(socket.AF_UNIX, "socket")


def _alone() -> bool:
    try:
        seen = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208 - importing pathlib would double the time of the probe
    except OSError:
        seen = set()
    return os.getppid() <= 1 and seen <= {1, os.getpid()}


def _cannot_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return True
    return False


def _read_only(path: str) -> bool:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return True
    try:
        with open("/proc/mounts") as mounts:  # noqa: PTH123 - gVisor has no such flag, but says so here
            found = {point: options.split(",") for _, point, _, options, *_ in map(str.split, mounts)}
    except OSError:
        return False
    return "ro" in found.get(path, ())


def _no_capabilities(libc: ctypes.CDLL) -> bool:
    sets = (ctypes.c_uint32 * 6)(*[1] * 6)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    return libc.syscall(_CAPGET[os.uname().machine], header, sets) == 0 and not any(sets)


def _filtered(libc: ctypes.CDLL) -> bool:
    keyctl = libc.syscall(_KEYCTL[os.uname().machine], 0, -3, 0)
    refused = keyctl == -1 and ctypes.get_errno() == errno.EPERM
    return bool(refused and libc.unshare(_UNSHARE_USER) == -1 and ctypes.get_errno() == errno.EPERM)


def main(bait: str, port: int, router: int, kernel: str) -> None:
    """Prints the findings: each true where the sandbox holds. Leaves a daemon behind, which holds its output."""
    libc = ctypes.CDLL(None, use_errno=True)
    alone = _alone()
    print(  # noqa: T201 - that is how it reports
        json.dumps(
            {
                "files hidden": not any(pathlib.Path(path).exists() for path in (bait, "/root", "/home")),
                "host files closed": _closed(bait),
                "modes of host files kept": _modes_kept(bait),
                "environment cleared": set(os.environ) <= _OWN_VARIABLES,
                "network off": _network_off(bait, port),
                "host processes hidden": alone,
                "host processes safe from signals": alone or _cannot_signal(router),
                "system read-only": _read_only("/usr") and _read_only("/") and _read_only("/etc"),
                "no privileges": _no_capabilities(libc),
                "no privileges to be had": not any(libc.prctl(_READ_BOUNDING, number) == 1 for number in range(64)),
                "no new privileges": libc.prctl(_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
                "system calls filtered": libc.prctl(_GET_SECCOMP, 0, 0, 0, 0) == 2 and _filtered(libc),
                "kernel of its own": os.uname().version != kernel,
            }
        ),
        flush=True,
    )
    if os.fork() == 0:
        os.setsid()
    time.sleep(_PATIENCE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
