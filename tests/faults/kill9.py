"""Kills routers, supervisors and bubblewraps at random moments and looks at what is left: `make faults`.

    python tests/faults/kill9.py [--times N] [--seed SEED] [--round NUMBER] [--jobs N]

The seed is printed; with it, and `--round` for a single one, the same steps and the same moments come again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from _round import Broken, Round, Tally

JOBS = 3
"""Rounds at a time: most of a round is waiting for lifetimes."""


def main() -> int:
    """Plays the rounds; 1 where something that was promised does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**6)))
    parser.add_argument("--round", type=int, action="append", help="only this one, counted from 0; may be repeated")
    parser.add_argument("--jobs", type=int, default=JOBS)
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    begun = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        numbers = given.round if given.round is not None else range(given.times)
        results = list(pool.map(lambda number: play(given.seed, number), numbers))
    tallies = [tally for tally in results if tally is not None]
    print(f"{len(results)} kills in {time.monotonic() - begun:.0f} s, {len(results) - len(tallies)} broken")
    print(f"killed: {dict(Counter(tally.target for tally in tallies))}")
    print(f"during: {dict(Counter(tally.step for tally in tallies))}")
    if tallies:
        print(f"kept boxes that lived on: {sum(tally.kept for tally in tallies)}")
        print(f"slowest end of what was attached: {max(tally.gone for tally in tallies):.2f} s")
    return int(len(tallies) < len(results))


def play(seed: str, number: int) -> Tally | None:
    """One round, or None where it broke, which is printed."""
    played = Round(seed, number)
    try:
        return played.play()
    except Broken as broken:
        what = str(broken)
    except Exception:
        what = traceback.format_exc(limit=-2)
    tally = played.tally
    print(f"round {number}: killed {tally.target}, {1000 * tally.delay:.1f} ms after {tally.step}: {what}", flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
