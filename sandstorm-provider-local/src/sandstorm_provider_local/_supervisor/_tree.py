"""A process and all that descends from it, as the host's `/proc` shows them."""
# ruff: noqa: PTH123, PTH208, SIM105 - pathlib and contextlib take longer to import than this may take to start

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SIGKILL, _SIGSTOP = 9, 19
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def send_signal(pid: int, number: int) -> None:
    """Sends a signal to a process, if it is there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def children(pid: int) -> list[int]:
    """Its children; none where it is gone."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def tree(root: int) -> list[int]:
    """The process and its descendants at this moment."""
    found = [root]
    for pid in found:
        found += children(pid)
    return found


def kill_tree(roots: Iterable[int]) -> list[int]:
    """Kills processes with their descendants, however fast they multiply; the ids of all that were killed."""
    stopped: dict[int, None] = {}
    grown = True
    # What is stopped cannot start another, so that the search ends; the list of a running process may miss some.
    while grown:
        grown = False
        for root in roots:
            for pid in tree(root):
                if pid not in stopped:
                    stopped[pid] = None
                    send_signal(pid, _SIGSTOP)
                    grown = True
    for pid in stopped:
        send_signal(pid, _SIGKILL)
    return list(stopped)


def _fields(pid: int) -> list[bytes]:
    """The fields of its `stat` from the state on; [b"X"] where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return [b"X"]


def is_gone(pid: int) -> bool:
    """Whether it has ended, though nobody may have asked how yet."""
    return _fields(pid)[0] in (b"X", b"Z")


def session(pid: int) -> int | None:
    """The id of its session, or None where it is gone."""
    fields = _fields(pid)
    return int(fields[3]) if len(fields) > 3 else None


def memory(pids: Iterable[int]) -> int:
    """Bytes that these processes have in memory; what they share is counted for each."""
    return sum(int(fields[21]) * _PAGE for pid in pids if len(fields := _fields(pid)) > 21)


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time of these processes, and of their children that have ended."""
    return sum(sum(map(int, fields[11:15])) for pid in pids if len(fields := _fields(pid)) > 14) / _TICKS
