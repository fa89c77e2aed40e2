"""Runs inside the sandbox as `python3 -I -S -c`: tries what must not work and prints what happened as JSON.

The source of this module is handed over as text; it imports the standard library only and takes the path of the secret
and the port of the listener as arguments.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pathlib
import socket
import sys

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_UNSHARE_USER = 0x10000000
_GET_NO_NEW_PRIVS, _GET_SECCOMP, _READ_BOUNDING = 39, 21, 23


def _cannot_open(path: str) -> bool:
    try:
        pathlib.Path(path).open("rb").close()
    except OSError:
        return True
    return False


def _cannot_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return [name for _, name in socket.if_nameindex()] in (["lo"], [])
    return False


def _alone() -> bool:
    try:
        seen = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208 - importing pathlib would double the time of the probe
    except OSError:
        seen = set()
    return os.getppid() == 1 and seen <= {1, os.getpid()}


def _read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _refused(libc: ctypes.CDLL) -> bool:
    keyctl = libc.syscall(_KEYCTL[os.uname().machine], 0, -3, 0)
    refused = keyctl == -1 and ctypes.get_errno() == errno.EPERM
    return bool(refused and libc.unshare(_UNSHARE_USER) == -1 and ctypes.get_errno() == errno.EPERM)


def main(secret: str, port: int) -> None:
    """Prints the findings: each true where the sandbox holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    print(  # noqa: T201 - that is how it reports
        json.dumps(
            {
                "files hidden": _cannot_open(secret)
                and not pathlib.Path("/root").exists()
                and not pathlib.Path("/home").exists(),
                "environment cleared": set(os.environ) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"},
                "network off": _cannot_connect(port),
                "host processes hidden": _alone(),
                "system read-only": _read_only("/usr") and _read_only("/") and _read_only("/etc"),
                "no privileges": not any(libc.prctl(_READ_BOUNDING, number) == 1 for number in range(64)),
                "no new privileges": libc.prctl(_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
                "system calls filtered": libc.prctl(_GET_SECCOMP, 0, 0, 0, 0) == 2 and _refused(libc),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
