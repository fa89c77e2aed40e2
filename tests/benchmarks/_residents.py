"""What the processes of one box keep in memory, from the kernel."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import attrs

KIB_PER_MIB = 1024.0


@attrs.frozen
class Resident:
    """MiB: `rss` counts a page that is shared with other processes fully, `pss` its share of it."""

    rss: float
    pss: float

    @classmethod
    def of(cls, pids: Iterable[int]) -> Self:
        """All of them together."""
        rss = pss = 0.0
        for pid in pids:
            try:
                lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
            except ProcessLookupError:  # it has ended, and its parent has not taken note of that yet
                continue
            sizes = {line.split(":")[0]: float(line.split()[1]) / KIB_PER_MIB for line in lines}
            rss, pss = rss + sizes["Rss"], pss + sizes["Pss"]
        return cls(rss, pss)


@attrs.frozen
class Residents:
    """The supervisor of a box, and all that it has started: bubblewrap, the agent and its keepers."""

    supervisor: Resident
    inside: Resident


def residents(directory: Path) -> Residents:
    """Those of the box with this directory."""
    supervisor = int(json.loads((directory / "record.json").read_text())["pid"])
    return Residents(Resident.of([supervisor]), Resident.of(_descendants(supervisor)))


def _descendants(pid: int) -> list[int]:
    children = [int(child) for child in (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()]
    return children + [below for child in children for below in _descendants(child)]
