"""Runs the benchmarks and prints a table of figures against their targets: `make bench`.

Exits 0 also where a target is missed, since a figure of a shared machine is for people to judge; 1 where a benchmark broke.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Iterator

import attrs
from _measure import Figure

BENCHMARKS = ("plan", "imports", "memory", "journal", "writes", "local", "boxes", "files")
DECIMALS = {"x": 2, "ms": 1, "MiB": 1}


def main() -> int:
    """Runs what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="few repetitions: whether it works, and not how fast")
    given = parser.parse_args()
    figures, broken = [], []
    if not given.json:
        print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs, {platform.release()}")
    for name in given.only or BENCHMARKS:
        try:
            for figure in _measured(name, given.quick):
                figures.append(figure)
                if not given.json:
                    print(_line(figure), flush=True)
        except Exception:
            broken.append(name)
            traceback.print_exc()
    if given.json:
        rows = [{**attrs.asdict(figure), "met": figure.met} for figure in figures]
        print(
            json.dumps({"python": platform.python_version(), "cpus": os.cpu_count(), "figures": rows, "broken": broken}, indent=2)
        )
    return 1 if broken else 0


def _measured(name: str, quick: bool) -> Iterator[Figure]:
    """The figures of one benchmark; its module is loaded only now, so that one that cannot be does not stop the others."""
    yield from importlib.import_module(f"_{name}").measure(quick)


def _line(figure: Figure) -> str:
    verdict = {True: "ok", False: "MISSED", None: ""}[figure.met]
    if figure.unit == "failed":
        return f"{figure.name:64} {'not measured':>14}   {figure.detail}"
    target = "" if figure.target is None else f"target {figure.target:g}"
    shown = f"{figure.value:.{DECIMALS.get(figure.unit, 0)}f}"
    said = "; ".join(part for part in (f"baseline {figure.baseline}" if figure.baseline else "", figure.detail) if part)
    return f"{figure.name:64} {shown:>8} {figure.unit:5} {target:11} {verdict:6}  {said}"


if __name__ == "__main__":
    sys.exit(main())
