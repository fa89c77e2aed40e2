"""What can be seen from outside of what a router started: its processes, groups, mounts, files, listeners and leases."""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path

from sandstorm_provider_local._cgroup import PREFIX, Hierarchy, find_hierarchy
from sandstorm_provider_local._owner import is_dead

STAYING = ("bundles", "environments")
"""Directories of the state whose contents are kept for the next router on purpose."""


def marked(mark: int) -> set[int]:
    """Every living process that descends from the router with this mark, wherever it has gone since."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "limits").read_text()
            except OSError:
                continue
            if f"Max msgqueue size         {mark} " in text and state_of(int(entry.name)) not in ("Z", "X"):
                found.add(int(entry.name))
    return found


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def state_of(pid: int) -> str:
    """The letter of its state; X where it is gone."""
    return _fields(pid)[0]


def parent_of(pid: int) -> int:
    """The process id of its parent, or 0."""
    return int(_fields(pid)[1])


def command_of(pid: int) -> str:
    """Its command line, on one line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def below(roots: set[int], among: set[int]) -> set[int]:
    """These processes, as far as they are among those given, and all that descend from them there."""
    found = roots & among
    while more := {pid for pid in among - found if parent_of(pid) in found}:
        found |= more
    return found


def described(pids: set[int]) -> str:
    """Processes for people."""
    return "; ".join(f"{pid} (parent {parent_of(pid)}, {state_of(pid)}): {command_of(pid)[:160]}" for pid in sorted(pids))


def dead_groups() -> set[str]:
    """Control groups whose router or supervisor is gone, in every controller and wherever this process may make some."""
    hierarchy, found = _hierarchy(), set()
    for root in (*hierarchy.roots, hierarchy.freezer) if hierarchy else ():
        for group in Path(root).glob(PREFIX + "*") if root else ():
            if is_dead(group.name.removeprefix(PREFIX).rpartition("-")[0]):
                found.add(str(group))
    return found


@functools.cache
def _hierarchy() -> Hierarchy | None:
    return find_hierarchy()


def mounts(of: str) -> list[str]:
    """Mounts outside of any sandbox that mention a path."""
    lines = [line for who in ("self", "1") for line in _lines(f"/proc/{who}/mountinfo")]
    return [line for line in lines if of in line]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def listener(port: int) -> str | None:
    """The inode of whatever listens on a port of the loopback."""
    for line in _lines("/proc/net/tcp"):
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
            return fields[9]
    return None


def leftovers(state: Path) -> list[str]:
    """Files of a state directory that nothing documents, and user ids that are still leased."""
    found = []
    for directory, names, files in os.walk(state):
        if Path(directory) == state:
            names[:] = [name for name in names if name not in STAYING]
        here = Path(directory)
        if here.parent == state / "boxes" or here.parent == state / "sessions":
            found.append(str(here))
        if here == state / "uids":
            found += [f"leased: {name}" for name in files if _is_locked(here / name)]
        else:
            found += [str(here / name) for name in files]
    return found


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
