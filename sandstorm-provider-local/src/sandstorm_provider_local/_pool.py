"""The control groups of one session."""

from __future__ import annotations

from sandstorm_provider_local._cgroup import PREFIX, Cgroup, Hierarchy, Limits
from sandstorm_provider_local._owner import own_token


class CgroupPool:
    """The groups of programs that a session runs itself: one is taken up again once it is empty. A box has one of its own."""

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
        group = Cgroup(self.hierarchy, f"{PREFIX}{self._token}-{id(self):x}x{self._made}", limits)
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
