"""The fault machine: routers, a journal and vendors that go wrong at every await, judged by the vendors' own logs.

    python tests/faults/machine.py [--seed N] [--faults N] [--rounds N] [--jobs N] [--shrink]

A round is named by its seed, which is printed where something does not hold: `--seed N --rounds 1` plays it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

MEMORY = Path("/dev/shm")


def play(seed: int, muted: Collection[Any] = (), strict: bool = False) -> tuple[int, str | None, Counter[Any], list[Any], Any]:
    """One round: its seed, what did not hold, what struck, and where."""
    import random

    import trio
    from trio._core import _run
    from trio.testing import MockClock

    drawn = random.Random(f"ids {seed}")
    secrets.token_hex = lambda nbytes=None: (
        f"{drawn.getrandbits(8 * (nbytes or 32)):0{2 * (nbytes or 32)}x}"
    )  # before the core has it
    from _world import World

    import sandstorm._engine as engine

    engine.token_hex = secrets.token_hex
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    _run._r.seed(seed)
    logging.getLogger("sandstorm").setLevel(logging.CRITICAL + 1)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        world = World(Path(folder), str(seed), muted, strict)
        said = None
        try:
            trio.run(world.play, clock=MockClock(autojump_threshold=0))
        except BaseException as exc:
            said = "; ".join(world.found[:3]) or f"{type(exc).__name__}: {_leaf(exc)!r}"
        return seed, said, world.dice.effective, world.dice.struck, world.known


def _leaf(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def shrink(seed: int, said: str, struck: list[Any]) -> list[Any]:
    """The strikes without which the same does not happen any more."""
    name, muted, needed = said.split(":", maxsplit=1)[0], set(), [strike for strike, _ in struck]
    size = len(needed) // 2
    while size:
        for start in range(0, len(needed), size):
            more = muted | set(needed[start : start + size])
            again = play(seed, more)[1]
            if again is not None and again.split(":")[0] == name:
                muted = more
        needed = [strike for strike in needed if strike not in muted]
        size //= 2
    return [strike for strike in play(seed, muted)[3] if strike[0] not in muted]


def main() -> int:
    """Plays rounds; 1 where something does not hold, or a kind of fault was never met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10**9)
    parser.add_argument("--faults", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stop", action="store_true", help="end at the first round that breaks")
    parser.add_argument("--shrink", action="store_true", help="say which faults of a broken round are needed")
    parser.add_argument("--strict", action="store_true", help="known bugs break a round as well")
    parser.add_argument("--full", action="store_true", help="every kind of fault has to be met")
    given = parser.parse_args()
    begun = shown = time.monotonic()
    total: Counter[tuple[str, str]] = Counter()
    broken: dict[int, str] = {}
    known: Counter[str] = Counter()
    seed, last, rounds = given.seed, given.seed + given.rounds, 0
    with ProcessPoolExecutor(given.jobs) as pool:
        waiting: set[Any] = set()
        while True:
            while len(waiting) < 2 * given.jobs and seed < last and sum(total.values()) < given.faults:
                waiting.add(pool.submit(play, seed, (), given.strict))
                seed += 1
            if not waiting:
                break
            done = next(as_completed(waiting))
            waiting.discard(done)
            number, said, effective, struck, met = done.result()
            known.update(met)
            total += effective
            rounds += 1
            if said is not None:
                broken[number] = said
                print(f"BROKEN seed {number}: {said}", flush=True)
                if given.shrink:
                    print(f"  needs {shrink(number, said, struck)}", flush=True)
                if given.stop:
                    last = seed
            if time.monotonic() - shown > 20:
                shown = time.monotonic()
                print(f"{rounds} rounds, {sum(total.values())} faults, {shown - begun:.0f} s", flush=True)
    print(f"known bugs met: {dict(known)}")
    return report(total, broken, rounds, time.monotonic() - begun, given.full)


def report(total: Counter[tuple[str, str]], broken: dict[int, str], rounds: int, seconds: float, full: bool) -> int:
    """Prints what struck by site and kind; 1 where something is wrong."""
    from _faults import FEASIBLE

    missed = [f"{site}/{kind}" for site, kinds in FEASIBLE.items() for kind in kinds if not total[site, kind]]
    for site, kinds in FEASIBLE.items():
        print(f"{site:>20}  " + "  ".join(f"{kind} {total[site, kind]}" for kind in kinds))
    print(f"{sum(total.values())} effective faults in {rounds} rounds and {seconds:.0f} s; {len(broken)} rounds broken")
    print("broken by: " + str(dict(Counter(said.split(":")[0] for said in broken.values()))))
    if missed:
        print("never met: " + ", ".join(missed))
    return int(bool(broken) or (full and bool(missed)))


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of names are walked in one order only with this
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
