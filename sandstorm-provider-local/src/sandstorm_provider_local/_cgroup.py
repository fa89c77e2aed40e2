"""Control groups: what limits memory, processes and CPU of a whole sandbox, in version 1 and 2.

Groups are pooled: making and removing one costs more than starting a program, so that a session keeps its own and
takes up one again once it is empty. Everything is tried and nothing assumed: what cannot be written is not used.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import attrs

from sandstorm_provider_local._owner import is_dead, own_token

_PREFIX = "sandstorm-"
_CPU_PERIOD = 100_000
"""Microseconds over which the CPU share is enforced; the kernel's own default."""
PIDS_MAX = 192
"""Processes and threads in a sandbox, bubblewrap's own two included. Node alone has eleven threads."""


@attrs.frozen
class Limits:
    """What a group may use: MiB of memory, swap excluded, and vCPU."""

    memory: int
    cpu: float


@attrs.frozen
class Hierarchy:
    """Where groups can be made: version 1 has a directory for each controller, version 2 one for all."""

    version: int
    memory: Path
    pids: Path
    cpu: Path | None

    @property
    def roots(self) -> tuple[Path, ...]:
        """The distinct directories."""
        return tuple(dict.fromkeys(root for root in (self.memory, self.pids, self.cpu) if root is not None))

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"cgroup-v{self.version}"


def find_hierarchy() -> Hierarchy | None:
    """The hierarchy in which this process may make groups with memory and process limits, or None."""
    own, mounted = _memberships(), _mounts()
    return next((found for found in _candidates(own, mounted) if _usable(found)), None)


def _memberships() -> dict[str, str]:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    members = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            members[controller] = path
    return members


def _mounts() -> dict[str, Path]:
    """Mount points by controller; "" is version 2."""
    points: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2":
            points[""] = Path(point)
        elif kind == "cgroup":
            points |= {option: Path(point) for option in options.split(",") if option in ("memory", "pids", "cpu")}
    return points


def _candidates(own: dict[str, str], mounted: dict[str, Path]) -> Iterator[Hierarchy]:
    def places(controller: str) -> list[Path]:
        # In a container the path may be the host's: then the mount itself is this process's group.
        point = mounted[controller]
        inside = point / own.get(controller, "/").lstrip("/")
        return [place for place in dict.fromkeys((inside, point)) if os.access(place, os.W_OK)]

    if {"memory", "pids"} <= mounted.keys():
        for memory in places("memory"):
            for pids in places("pids"):
                yield Hierarchy(1, memory, pids, next(iter(places("cpu")), None) if "cpu" in mounted else None)
    if "" in mounted:
        for place in places(""):
            # A group with processes of its own cannot share out controllers; the one above it can.
            for root in (place, place.parent):
                with suppress(OSError):
                    shared = (root / "cgroup.subtree_control").read_text().split()
                    if {"memory", "pids"} <= set(shared):
                        yield Hierarchy(2, root, root, root if "cpu" in shared else None)


def _usable(hierarchy: Hierarchy) -> bool:
    try:
        Cgroup(hierarchy, f"{_PREFIX}{own_token()}-probe", Limits(64, 1.0)).close()
    except OSError:
        return False
    return True


def sweep(hierarchy: Hierarchy) -> None:
    """Removes the groups of routers that are dead, and nobody else's."""
    for root in hierarchy.roots:
        for group in root.glob(f"{_PREFIX}*"):
            if is_dead(group.name.removeprefix(_PREFIX).rpartition("-")[0]):
                with suppress(OSError):
                    _kill_members(group)
                    group.rmdir()


def _kill_members(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


class Cgroup:
    """One group in every controller, with open files through which a process joins it."""

    def __init__(self, hierarchy: Hierarchy, name: str, limits: Limits) -> None:
        self._hierarchy = hierarchy
        self._groups = [root / name for root in hierarchy.roots]
        self._name = name
        self._set: Limits | None = None
        self.join_fds: list[int] = []
        try:
            for group in self._groups:
                group.mkdir(exist_ok=True)
            self.limit(limits)
            self.join_fds = [os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for group in self._groups]
        except BaseException:
            self.close()
            raise

    def limit(self, limits: Limits) -> None:
        """Sets the limits, where they differ from the present ones."""
        if limits == self._set:
            return
        memory = self._hierarchy.memory / self._name
        amount = str(limits.memory * 1024 * 1024)
        if self._hierarchy.version == 1:
            with_swap = memory / "memory.memsw.limit_in_bytes"
            if with_swap.exists():
                with_swap.write_text("-1")
            (memory / "memory.limit_in_bytes").write_text(amount)
            if with_swap.exists():
                with_swap.write_text(amount)
        else:
            (memory / "memory.max").write_text(amount)
            with suppress(FileNotFoundError):
                (memory / "memory.swap.max").write_text("0")
        (self._hierarchy.pids / self._name / "pids.max").write_text(str(PIDS_MAX))
        if self._hierarchy.cpu is not None:
            self._limit_cpu(self._hierarchy.cpu / self._name, max(1000, int(limits.cpu * _CPU_PERIOD)))
        self._set = limits

    def _limit_cpu(self, group: Path, quota: int) -> None:
        if self._hierarchy.version == 1:
            (group / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {_CPU_PERIOD}")

    @property
    def memory_limit(self) -> int | None:
        """The limit in bytes that the kernel has, or None where it has none."""
        name = "memory.limit_in_bytes" if self._hierarchy.version == 1 else "memory.max"
        text = (self._hierarchy.memory / self._name / name).read_text().strip()
        return int(text) if text.isdigit() else None

    @property
    def oom_kills(self) -> int:
        """How many processes of the group the kernel has killed for want of memory, ever."""
        name = "memory.oom_control" if self._hierarchy.version == 1 else "memory.events"
        for line in (self._hierarchy.memory / self._name / name).read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    @property
    def empty(self) -> bool:
        """Whether no process is in it."""
        return not (self._groups[0] / "cgroup.procs").read_text().strip()

    def holds(self, pid: int) -> bool:
        """Whether a process is in it, in every controller."""
        return all(str(pid) in (group / "cgroup.procs").read_text().split() for group in self._groups)

    def kill(self) -> None:
        """Kills every process in it."""
        with suppress(OSError):
            _kill_members(self._groups[0])

    def close(self) -> None:
        """Removes it. What still holds a process stays for the next sweep."""
        for fd in self.join_fds:
            os.close(fd)
        self.join_fds = []
        for group in self._groups:
            with suppress(OSError):
                group.rmdir()


class CgroupPool:
    """The groups of one session."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.hierarchy = hierarchy
        self._token = own_token()
        self._made = 0
        self._free: list[Cgroup] = []
        self._all: list[Cgroup] = []

    def take(self, limits: Limits) -> Cgroup:
        """An empty group with these limits."""
        for index, group in enumerate(self._free):
            if group.empty:
                del self._free[index]
                group.limit(limits)
                return group
        self._made += 1
        group = Cgroup(self.hierarchy, f"{_PREFIX}{self._token}-{id(self):x}x{self._made}", limits)
        self._all.append(group)
        return group

    def give_back(self, group: Cgroup) -> None:
        """Keeps the group for another sandbox; it is taken up again once it is empty."""
        self._free.append(group)

    @property
    def all_empty(self) -> bool:
        """Whether no process is in any of them."""
        return all(group.empty for group in self._all)

    def kill(self) -> None:
        """Kills every process in any of them."""
        for group in self._all:
            group.kill()

    def close(self) -> None:
        """Removes all of them."""
        for group in self._all:
            group.close()
