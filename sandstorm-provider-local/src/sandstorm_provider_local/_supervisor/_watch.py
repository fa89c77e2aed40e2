"""A look at the memory of the programs alone: the kernel's limit covers their files as well."""

from __future__ import annotations

from sandstorm_provider_local._supervisor._tree import memory, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandstorm_provider_local._supervisor._box import Box

_PERIOD = 0.25


class MemoryWatch:
    """Ends the largest program once all of them together use more memory than the box has. It looks while there are any."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._limit = box.sandbox.config["limits"]["memory"] << 20
        self._looking = False

    def begin(self) -> None:
        """A program has been started."""
        if not self._looking and self._box.group is not None:
            self._looking = True
            self._box.loop.after(_PERIOD, self._look)

    def _look(self) -> None:
        box = self._box
        self._looking = False
        # What a program that has ended left behind counts as well.
        keepers = {name: keeper for name, keeper in box.agent.keepers.items() if keeper.pid}
        if box.group is not None and keepers and box.group.programs_memory > self._limit:
            sizes = {name: memory(tree(keeper.pid)) for name, keeper in keepers.items()}
            # What was just killed counts in the group until the kernel has taken it down, which others must not pay for.
            if sum(sizes.values()) > self._limit:
                keepers[max(sizes, key=lambda name: sizes[name])].owner.kill("out-of-memory")
        if box.agent.keepers:
            self.begin()
