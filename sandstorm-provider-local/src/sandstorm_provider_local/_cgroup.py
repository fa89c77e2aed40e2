"""Control groups: what limits memory, processes and CPU of a whole sandbox, in version 1 and 2.

Everything is tried and nothing assumed: what cannot be written is not used. The supervisor of a box uses this module too,
hence nothing that takes long to import.
"""
# ruff: noqa: PTH102, PTH106, PTH110, PTH118, PTH120, PTH123, PTH208, SIM105 - pathlib and contextlib take longer to import than this may take to start

from __future__ import annotations

import os
import time

from sandstorm_provider_local._owner import is_dead, own_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PREFIX = "sandstorm-"
_CPU_PERIOD = 100_000
"""Microseconds over which the CPU share is enforced; the kernel's own default."""
PIDS_MAX = 192
"""Processes and threads in a sandbox, bubblewrap's own two included. Node alone has eleven threads."""
_SIGKILL = 9
_FREEZING = 2.0
"""Seconds that the kernel gets to freeze a group; it needs milliseconds."""
_DYING = 2.0
"""Seconds that the processes of a dead router's group get to end; they need milliseconds."""


class Limits:
    """What a group may use: MiB of memory, swap excluded, vCPU, and MiB of files that live in memory besides."""

    def __init__(self, memory: int, cpu: float, files: int = 0) -> None:
        self.memory = memory
        self.cpu = cpu
        self.files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Limits) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Hierarchy:
    """Where groups can be made: version 1 has a directory for each controller, version 2 one for all."""

    def __init__(self, version: int, memory: str, pids: str, cpu: str | None, freezer: str | None = None) -> None:
        self.version = version
        self.memory = memory
        self.pids = pids
        self.cpu = cpu
        self.freezer = freezer

    @property
    def roots(self) -> tuple[str, ...]:
        """The distinct directories of what limits; that of the freezer comes on top."""
        return tuple(dict.fromkeys(root for root in (self.memory, self.pids, self.cpu) if root is not None))

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"cgroup-v{self.version}"

    def to_json(self) -> dict[str, Any]:
        """It as plain values, from which `Hierarchy(**values)` makes it again."""
        return dict(vars(self))


def find_hierarchy() -> Hierarchy | None:
    """The hierarchy in which this process may make groups with memory and process limits, or None."""
    own, mounted = _memberships(), _mounts()
    return next((found for found in _candidates(own, mounted) if _usable(found)), None)


def _memberships() -> dict[str, str]:
    members = {}
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            members[controller] = path
    return members


def _mounts() -> dict[str, str]:
    """Mount points by controller; "" is version 2."""
    points: dict[str, str] = {}
    for line in _read("/proc/self/mounts").splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2":
            points[""] = point
        elif kind == "cgroup":
            known = ("memory", "pids", "cpu", "freezer")
            points |= {option: point for option in options.split(",") if option in known}
    return points


def _candidates(own: dict[str, str], mounted: dict[str, str]) -> Iterator[Hierarchy]:
    def places(controller: str) -> list[str]:
        # In a container the path may be the host's: then the mount itself is this process's group.
        point = mounted.get(controller)
        if point is None:
            return []
        inside = os.path.join(point, own.get(controller, "/").lstrip("/")).rstrip("/")
        return [place for place in dict.fromkeys((inside, point)) if os.access(place, os.W_OK)]

    for memory in places("memory"):
        for pids in places("pids"):
            yield Hierarchy(1, memory, pids, next(iter(places("cpu")), None), next(iter(places("freezer")), None))
    for place in places(""):
        # A group with processes of its own cannot share out controllers; the one above it can.
        for root in (place, os.path.dirname(place)):
            try:
                shared = _read(os.path.join(root, "cgroup.subtree_control")).split()
            except OSError:
                continue
            if {"memory", "pids"} <= set(shared):
                yield Hierarchy(2, root, root, root if "cpu" in shared else None, root)


def _usable(hierarchy: Hierarchy) -> bool:
    try:
        Cgroup(hierarchy, f"{PREFIX}{own_token()}-probe", Limits(64, 1.0), freezer=True).close()
    except OSError:
        if hierarchy.freezer is None:
            return False
        hierarchy.freezer = None
        return _usable(hierarchy)
    return True


def sweep(hierarchy: Hierarchy) -> None:
    """Removes the groups of routers and supervisors that are dead, and nobody else's, once their processes have ended."""
    dead = []
    for root in dict.fromkeys((*hierarchy.roots, *([hierarchy.freezer] if hierarchy.freezer else ()))):
        try:
            names = os.listdir(root)
        except OSError:
            continue  # it is gone, with all that was in it
        ours = [name for name in names if name.startswith(PREFIX)]
        dead += [os.path.join(root, name) for name in ours if is_dead(name[len(PREFIX) :].rpartition("-")[0])]
    until = time.monotonic() + _DYING
    while (dead := [group for group in dead if not _removed(group)]) and time.monotonic() < until:
        time.sleep(0.002)


def _removed(group: str) -> bool:
    """Whether it is gone now; its processes are killed, and what is frozen is thawed, since it does not die else."""
    try:
        for name, text in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            if os.path.exists(os.path.join(group, name)):
                _write(os.path.join(group, name), text)
        _kill_members(group)
        os.rmdir(group)
    except OSError:
        return not os.path.exists(group)
    return True


def _kill_members(group: str) -> None:
    for pid in _members(group):
        try:
            os.kill(pid, _SIGKILL)
        except ProcessLookupError:
            pass


def _members(group: str) -> list[int]:
    return [int(pid) for pid in _read(os.path.join(group, "cgroup.procs")).split()]


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class Cgroup:
    """One group in every controller, with open files through which a process joins it."""

    def __init__(self, hierarchy: Hierarchy, name: str, limits: Limits, *, freezer: bool = False) -> None:
        self._hierarchy = hierarchy
        roots = hierarchy.roots
        if freezer and hierarchy.freezer is not None:
            roots = tuple(dict.fromkeys((*roots, hierarchy.freezer)))
        self._groups = [os.path.join(root, name) for root in roots]
        self._memory = os.path.join(hierarchy.memory, name)
        self._name = name
        self._set: Limits | None = None
        self._freezes = freezer and hierarchy.freezer is not None
        self.join_fds: list[int] = []
        try:
            for group in self._groups:
                try:
                    os.mkdir(group)
                except FileExistsError:
                    pass
            self.limit(limits)
            for group in self._groups:
                self.join_fds.append(os.open(os.path.join(group, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def limit(self, limits: Limits) -> None:
        """Sets the limits, where they differ from the present ones."""
        if limits == self._set:
            return
        amount = str((limits.memory + limits.files) * 1024 * 1024)
        if self._hierarchy.version == 1:
            with_swap = os.path.join(self._memory, "memory.memsw.limit_in_bytes")
            has_swap = os.path.exists(with_swap)
            if has_swap:
                _write(with_swap, "-1")
            _write(os.path.join(self._memory, "memory.limit_in_bytes"), amount)
            if has_swap:
                _write(with_swap, amount)
        else:
            _write(os.path.join(self._memory, "memory.max"), amount)
            if os.path.exists(os.path.join(self._memory, "memory.swap.max")):
                _write(os.path.join(self._memory, "memory.swap.max"), "0")
        _write(os.path.join(self._hierarchy.pids, self._name, "pids.max"), str(PIDS_MAX))
        if self._hierarchy.cpu is not None:
            self._limit_cpu(os.path.join(self._hierarchy.cpu, self._name), max(1000, int(limits.cpu * _CPU_PERIOD)))
        self._set = limits

    def _limit_cpu(self, group: str, quota: int) -> None:
        if self._hierarchy.version == 1:
            _write(os.path.join(group, "cpu.cfs_period_us"), str(_CPU_PERIOD))
            _write(os.path.join(group, "cpu.cfs_quota_us"), str(quota))
        else:
            _write(os.path.join(group, "cpu.max"), f"{quota} {_CPU_PERIOD}")

    @property
    def memory_limit(self) -> int | None:
        """The limit in bytes that the kernel has, or None where it has none."""
        name = "memory.limit_in_bytes" if self._hierarchy.version == 1 else "memory.max"
        text = _read(os.path.join(self._memory, name)).strip()
        return int(text) if text.isdigit() else None

    @property
    def memory_used(self) -> int:
        """Bytes that it uses now, files in memory included."""
        name = "memory.usage_in_bytes" if self._hierarchy.version == 1 else "memory.current"
        return int(_read(os.path.join(self._memory, name)))

    @property
    def programs_memory(self) -> int:
        """Bytes that its programs use, without files: `rss` of `memory.stat` in version 1, `anon` in version 2."""
        key = "rss " if self._hierarchy.version == 1 else "anon "
        for line in _read(os.path.join(self._memory, "memory.stat")).splitlines():
            if line.startswith(key):
                return int(line[len(key) :])
        return 0

    @property
    def oom_kills(self) -> int:
        """How many processes of the group the kernel has killed for want of memory, ever."""
        name = "memory.oom_control" if self._hierarchy.version == 1 else "memory.events"
        for line in _read(os.path.join(self._memory, name)).splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    @property
    def tasks(self) -> int:
        """Processes and threads in it."""
        return int(_read(os.path.join(self._hierarchy.pids, self._name, "pids.current")))

    @property
    def pids(self) -> list[int]:
        """The processes in it."""
        return _members(self._groups[0])

    @property
    def empty(self) -> bool:
        """Whether no process is in it."""
        return not self.pids

    def holds(self, pid: int) -> bool:
        """Whether a process is in it, in every controller."""
        return all(pid in _members(group) for group in self._groups)

    def kill(self) -> None:
        """Kills every process in it."""
        try:
            _kill_members(self._groups[0])
        except OSError:
            pass

    # --- the freezer --------------------------------------------------------------------------------------

    @property
    def freezes(self) -> bool:
        """Whether its processes can be frozen."""
        return self._freezes

    def freeze(self) -> None:
        """Stops every process in it, unseen by them. Raises `OSError`, then thawed again, where the kernel does not manage."""
        until = time.monotonic() + _FREEZING
        while True:
            # Said again and again, since version 1 forgets a process that could not be stopped at the first word.
            self._turn("FROZEN", "1")
            if self._frozen():
                return
            if time.monotonic() > until:
                self.thaw()
                raise TimeoutError(f"not frozen within {_FREEZING:g} seconds")
            time.sleep(0.001)

    def thaw(self) -> None:
        """Lets them go on."""
        self._turn("THAWED", "0")

    def _turn(self, state: str, flag: str) -> None:
        group = os.path.join(self._hierarchy.freezer or "", self._name)
        if self._hierarchy.version == 1:
            _write(os.path.join(group, "freezer.state"), state)
        else:
            _write(os.path.join(group, "cgroup.freeze"), flag)

    def _frozen(self) -> bool:
        group = os.path.join(self._hierarchy.freezer or "", self._name)
        if self._hierarchy.version == 1:
            return _read(os.path.join(group, "freezer.state")).strip() == "FROZEN"
        return "frozen 1" in _read(os.path.join(group, "cgroup.events"))

    def close(self) -> None:
        """Removes it. What still holds a process stays for the next sweep."""
        for fd in self.join_fds:
            os.close(fd)
        self.join_fds = []
        for group in self._groups:
            try:
                os.rmdir(group)
            except OSError:
                pass
