"""What starting costs: importing the user namespace, the first client, `sandstorm --version`, and what gets installed."""

from __future__ import annotations

import compileall
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import median

from _measure import Figure, Pairs, interleaved, process_seconds, seconds_until_told

NAMES = "from sandstorm import Sandstorm, Constraints, SandboxSpec"
HEAVY = ("trio", "asyncio", "cattrs", "pluggy", "sqlite3")
TELL = "import time; print(time.monotonic_ns())"
CLIENT = "import sys; from sandstorm import Sandstorm; s = Sandstorm(settings={'store': sys.argv[1]}); s.__enter__()"


def measure(quick: bool) -> Iterable[Figure]:
    """Milliseconds of fresh interpreters, each beside `python -c pass`, and two counts."""
    _compile()
    count = 5 if quick else 40
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        store = f"sqlite:///{folder}/journal.db"
        yield _beyond_bare("import of Sandstorm, Constraints, SandboxSpec", NAMES, store, count, 60.0)
        yield _until_ready(store, count)
        yield _loaded()
    yield _version(count)
    names = closure("sandstorm-core")
    yield Figure(name="distributions of the core", value=len(names), unit="count", target=10, detail=", ".join(sorted(names)))


def closure(name: str) -> set[str]:
    """The distributions that a distribution needs here, itself included; what an extra or a marker leaves out is not installed."""
    found: set[str] = set()
    left = [name]
    while left:
        wanted = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if wanted in found:
            continue
        with contextlib.suppress(PackageNotFoundError):
            requires = distribution(wanted).requires or ()
            found.add(wanted)
            left += [found_name[0] for line in requires if "extra ==" not in line and (found_name := re.match(r"[\w.-]+", line))]
    return found


def _beyond_bare(name: str, program: str, store: str, count: int, target: float) -> Figure:
    pairs = _against_bare(program, store, count)
    return Figure(
        name=f"{name}, over bare Python",
        value=pairs.difference * 1000,
        unit="ms",
        target=target,
        baseline=f"python -c pass: {median(pairs.baseline) * 1000:.0f} ms",
        detail=pairs.spread,
    )


def _until_ready(store: str, count: int) -> Figure:
    # The journal exists from the first time on, as it does for all but a user's very first client.
    seconds_until_told(_python(f"{CLIENT}; {TELL}; s.close()", store))
    pairs = _against_bare(CLIENT, store, count, after="; s.close()")
    return Figure(
        name="first client ready",
        value=median(pairs.subject) * 1000,
        unit="ms",
        target=250.0,
        baseline=f"python -c pass: {median(pairs.baseline) * 1000:.0f} ms",
        detail=f"process start to `with Sandstorm()` entered, installed plugins and SQLite file included; {pairs.spread}",
    )


def _against_bare(program: str, store: str, count: int, after: str = "") -> Pairs:
    subject, baseline = _python(f"{program}; {TELL}{after}", store), _python(f"pass; {TELL}", store)
    return interleaved(lambda: seconds_until_told(subject), lambda: seconds_until_told(baseline), count)


def _loaded() -> Figure:
    program = f"{NAMES}; import sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    loaded = json.loads(subprocess.run(_python(program), check=True, capture_output=True).stdout)
    detail = ", ".join(loaded) or "none of " + ", ".join(HEAVY)
    return Figure(name="heavy modules loaded by that import", value=len(loaded), unit="count", target=0, detail=detail)


def _version(count: int) -> Figure:
    command = Path(sysconfig.get_path("scripts")) / "sandstorm"
    if not command.exists():
        return Figure(name="sandstorm --version", value=0.0, unit="failed", target=150.0, detail="sandstorm-cli is not installed")
    pairs = interleaved(lambda: process_seconds([str(command), "--version"]), lambda: process_seconds(_python("pass")), count)
    return Figure(
        name="sandstorm --version",
        value=median(pairs.subject) * 1000,
        unit="ms",
        target=150.0,
        baseline=f"python -c pass: {median(pairs.baseline) * 1000:.0f} ms",
        detail=f"the whole process; {pairs.spread}",
    )


def _python(program: str, *args: str) -> list[str]:
    return [sys.executable, "-c", program, *args]


def _compile() -> None:
    """Makes sure that no measured interpreter compiles what an installation would have compiled."""
    for package in ("sandstorm", "sandstorm_provider_local", "sandstorm_cli"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            with contextlib.redirect_stdout(io.StringIO()):
                compileall.compile_dir(folder, quiet=2)
