"""Who made a directory or a cgroup, so that what a dead process left can be told from what a living one uses.

The supervisor of a box uses it too, hence nothing that takes long to import.
"""
# ruff: noqa: PTH116, PTH123 - pathlib takes longer to import than this may take to start

from __future__ import annotations

import os


def _started(pid: int) -> str | None:
    """The time at which a process started, in clock ticks since boot; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, so the fields are counted from the last parenthesis.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _pid_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def own_token() -> str:
    """Names this process among all that ever were on this machine: namespace of process ids, process id, start time."""
    pid = os.getpid()
    return f"{_pid_namespace()}-{pid}-{_started(pid)}"


def is_dead(token: str) -> bool:
    """Whether the process that a token names is gone. False where it cannot be known from here."""
    parts = token.split("-")
    if len(parts) != 3 or not parts[1].isdigit() or parts[0] != _pid_namespace():
        return False
    return _started(int(parts[1])) != parts[2]
