"""What a run costs in memory while it is under way: 1,000 and 10,000 at once, each count in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import attrs
import trio
from _measure import Figure, installed_plugins

from sandstorm import Constraints, SandboxSpec, Task
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import Settings
from sandstorm._sqlite import SqliteStore
from sandstorm.testing import ReferenceProvider, plugin_for

COUNTS = (1_000, 10_000)
TARGET_KIB = 32.0
SLEEP_SECONDS = 200.0
START_SECONDS = 120.0
"""How long starting all of the runs may take before the benchmark counts as broken; they must not wake meanwhile."""
WARM_UP = 50
"""Runs before the baseline is taken, so that code, caches and the SQLite connection are not charged to the runs."""


class AdvancingClock(trio.abc.Clock):
    """Real time that can be moved on, so that programs which sleep for minutes all end at once, when all are asleep."""

    def __init__(self) -> None:
        self._moved = 0.0

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        """Seconds."""
        return time.perf_counter() + self._moved

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Seconds of real time until then."""
        return deadline - self.current_time()

    def advance(self, seconds: float) -> None:
        """Moves the time on."""
        self._moved += seconds


@attrs.frozen
class Growth:
    """KiB of resident memory beyond that before the runs: while all are under way, and at the highest of the whole time."""

    held: float
    peak: float
    seconds: float


def measure(quick: bool) -> Iterable[Figure]:
    """KiB for each of 1,000 and of 10,000 runs on the reference provider, journal on a file included."""
    for count in COUNTS[:1] if quick else COUNTS:
        growth = _in_child(count)
        baseline = f"the same process after {WARM_UP} runs, one after the other"
        yield Figure(
            name=f"memory of each of {count:,} runs under way",
            value=growth.held / count,
            unit="KiB",
            target=TARGET_KIB,
            baseline=baseline,
            detail=f"growth of RSS while all programs sleep: {growth.held / 1024:.0f} MiB; {growth.seconds:.1f} s in all",
        )
        yield Figure(
            name=f"the same at the peak, all {count:,} ending at once",
            value=growth.peak / count,
            unit="KiB",
            target=TARGET_KIB,
            baseline=baseline,
            detail=f"growth of the highest RSS: {growth.peak / 1024:.0f} MiB",
        )


def _in_child(count: int) -> Growth:
    command = [sys.executable, str(Path(__file__)), str(count)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=2 * START_SECONDS).stdout
    return Growth(**json.loads(told))


def grow(count: int) -> Growth:
    """What so many runs at once add to this process."""
    clock = AdvancingClock()
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        return trio.run(_grow, count, clock, folder, clock=clock)


async def _grow(count: int, clock: AdvancingClock, folder: str) -> Growth:
    provider = ReferenceProvider()
    settings = Settings(disable=installed_plugins())
    store = SqliteStore(f"sqlite:///{folder}/journal.db")
    async with open_engine(settings, Plugins.load(settings, extra=[("reference", plugin_for(provider))]), store=store) as engine:
        for _ in range(WARM_UP):
            await _run(engine, "out hello")
        before, began = _resident("VmRSS"), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(_run, engine, f"sleep {SLEEP_SECONDS:g}\nout hello")
            await _all_asleep(provider, count)
            held = _resident("VmRSS") - before
            clock.advance(SLEEP_SECONDS)
        assert not provider.vendor.live()
        return Growth(held, _resident("VmHWM") - before, time.perf_counter() - began)


async def _run(engine: Engine, code: str) -> None:
    task = Task(code=code, language="python")
    result = await engine.run(engine.request(task, SandboxSpec(), Constraints(max_cost="1")))
    assert result.stdout == b"hello\n"


async def _all_asleep(provider: ReferenceProvider, count: int) -> None:
    """Returns once so many programs run at the vendor, and what was queued for the journal is written."""
    asleep, seen = 0, 0
    with trio.fail_after(START_SECONDS):
        while asleep < WARM_UP + count:
            await trio.sleep(0.2)
            log = provider.vendor.log
            asleep += sum(log[number].step == "events" for number in range(seen, len(log)))
            seen = len(log)
    await trio.sleep(0.5)


def _resident(name: str) -> float:
    """KiB, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


if __name__ == "__main__":
    print(json.dumps(attrs.asdict(grow(int(sys.argv[1])))))
