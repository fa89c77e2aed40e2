"""What every benchmark shares: figures with their targets, and pairs that are measured in turns.

Machines are shared and noisy, so that a figure is never compared with one of another run: each measurement is taken
right beside one of its baseline, the two change places from pair to pair, and the median of the pairs is quoted.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.metadata import entry_points
from statistics import median
from typing import Literal, Self

import attrs

Unit = Literal["x", "us", "ms", "KiB", "MiB", "count", "failed"]


@attrs.frozen(kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        name: What was measured.
        value: The figure, in `unit`.
        unit: `x` is a ratio.
        target: The most that it may be, or None where it only informs.
        baseline: What it is compared with, with the baseline's own figure.
        detail: How it was measured, and the spread.
    """

    name: str
    value: float
    unit: Unit
    target: float | None = None
    baseline: str = ""
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.value <= self.target


@attrs.frozen
class Pairs:
    """Seconds of the subject and of its baseline, measured in turns."""

    subject: tuple[float, ...]
    baseline: tuple[float, ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Self:
        """The same pairs in two columns."""
        subject, baseline = zip(*pairs, strict=True)
        return cls(subject, baseline)

    @property
    def ratio(self) -> float:
        """The median of subject / baseline."""
        return median(self._ratios)

    @property
    def difference(self) -> float:
        """The median of subject - baseline, in seconds."""
        return self.beyond(1.0)

    def beyond(self, factor: float) -> float:
        """The median of subject - factor * baseline, in seconds."""
        return median(ours - factor * theirs for ours, theirs in zip(self.subject, self.baseline, strict=True))

    @property
    def spread(self) -> str:
        """How many pairs there are, and between which ratios half of them lie."""
        ordered = sorted(self._ratios)
        quarter = len(ordered) // 4
        return f"{len(ordered)} pairs, half of them within {ordered[quarter]:.2f}..{ordered[-1 - quarter]:.2f} x"

    @property
    def _ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.subject, self.baseline, strict=True)]


def interleaved(subject: Callable[[], float], baseline: Callable[[], float], count: int) -> Pairs:
    """`count` pairs of what the two return, seconds each; every other pair begins with the baseline."""
    pairs = []
    for number in range(count):
        if number % 2:
            theirs, ours = baseline(), subject()
        else:
            ours, theirs = subject(), baseline()
        pairs.append((ours, theirs))
    return Pairs.of(pairs)


async def in_turns(subject: Callable[[], Awaitable[float]], baseline: Callable[[], float], count: int) -> Pairs:
    """The same as `interleaved` for a subject that has to be awaited."""
    pairs = []
    for number in range(count):
        if number % 2:
            theirs, ours = baseline(), await subject()
        else:
            ours, theirs = await subject(), baseline()
        pairs.append((ours, theirs))
    return Pairs.of(pairs)


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call took."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def process_seconds(argv: Sequence[str]) -> float:
    """Seconds from before a process is started until it has ended. Raises `CalledProcessError` where it fails."""
    return timed(lambda: subprocess.run(argv, check=True, capture_output=True))


def seconds_until_told(argv: Sequence[str]) -> float:
    """Seconds from before a process is started until the `time.monotonic_ns()` that it prints last.

    What the process does after that, such as its shutdown, does not count.
    """
    began = time.monotonic_ns()
    told = subprocess.run(argv, check=True, capture_output=True).stdout.split()[-1]
    return (int(told) - began) / 1e9


def installed_plugins() -> tuple[str, ...]:
    """The plugins of this environment, which a benchmark disables in order to measure the core alone."""
    return tuple(sorted({entry.name for entry in entry_points(group="sandstorm")}))
