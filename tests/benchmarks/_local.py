"""What routing and the journal add to a one-shot run on this machine, beside the bare bubblewrap that it comes down to."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import trio
from _bare import PROGRAM, Bare, bare
from _measure import Figure, Pairs, interleaved, timed

from sandstorm import Sandstorm

TARGET = 1.35
WARM_UP = 5
PAUSE_SECONDS = 0.1
"""Before each measurement of the second rhythm. Joining a cgroup took several milliseconds longer where no other process
had joined one just before: runs in a row pay that or not by chance, and runs apart always do. The cause is not traced."""


def measure(quick: bool) -> Iterable[Figure]:
    """The ratio of `Sandstorm.run` to the spawn alone, and the milliseconds between the two, in both rhythms."""
    for name, pause, count in (("", 0.0, 300), (", each after a pause", PAUSE_SECONDS, 80)):
        pairs, level = trio.run(_pairs, 10 if quick else count, pause)
        yield Figure(
            name=f"one-shot local run{name}",
            value=pairs.ratio,
            unit="x",
            target=TARGET,
            baseline=f"bubblewrap with the same flags, seccomp, user and cgroup: {median(pairs.baseline) * 1000:.1f} ms",
            detail=f"{pairs.difference * 1000:.1f} ms more; {pairs.spread}; {level}, warm blocking client, synced SQLite file",
        )


async def _pairs(count: int, pause: float) -> tuple[Pairs, str]:
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        open_up(folder)
        state = f"{folder}/state"
        async with bare(state) as (_, baseline):
            return _interleaved(baseline, (folder, state), count, pause), baseline.level


def open_up(folder: str) -> None:
    """Lets the sandbox's own user reach what the provider keeps below."""
    Path(folder).chmod(0o711)


def client(folder: str, state: str) -> Sandstorm:
    """A client of this machine alone, with a synced SQLite file."""
    return Sandstorm(
        settings={
            "store": f"sqlite:///{folder}/journal.db",
            "providers": ["local"],
            "plugins": {"local": {"state_dir": state}},
        }
    )


def _interleaved(baseline: Bare, places: tuple[str, str], count: int, pause: float) -> Pairs:
    with client(*places) as sandstorm:

        def routed() -> None:
            result = sandstorm.run(argv=PROGRAM)
            assert result.stdout == b"1\n", result

        def after_pause(call: Callable[[], None]) -> float:
            time.sleep(pause)
            return timed(call)

        for _ in range(WARM_UP):
            routed()
            baseline.run()
        return interleaved(lambda: after_pause(routed), lambda: after_pause(baseline.run), count)
