"""Small damages to a copy of the core, each of which the machine has to find by the named invariant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sandstorm

CORE = Path(sandstorm.__file__).parent
MACHINE = Path(__file__).with_name("machine.py")

MUTANTS = {
    "no-epoch-check": (
        "for c in ATTEMPT_PROGRESS)} WHERE id = ? AND epoch = ?",
        "for c in ATTEMPT_PROGRESS)} WHERE id = ? AND ? > 0",
    ),
    "absence-too-early": ("if began < taken.dispatch_by + lag:", "if began < 0:"),
    "predicted-cost-reserved": ("exposure=candidate.quote.high", "exposure=candidate.quote.low"),
}
"""What is replaced in the one place of the core that has it, and by what."""
FOUND_BY = {"no-epoch-check": "fence", "absence-too-early": "absence", "predicted-cost-reserved": "money"}


def found(name: str, folder: Path) -> str:
    """What the machine says of the core with this damage."""
    copy = folder / "sandstorm"
    shutil.copytree(CORE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before, after = MUTANTS[name]
    (place,) = [path for path in copy.rglob("*.py") if before in path.read_text()]
    text = place.read_text()
    assert text.count(before) == 1, f"{name} fits more than one place"
    place.write_text(text.replace(before, after))
    command = [sys.executable, str(MACHINE), "--seed", "1", "--rounds", "30"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    ran = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    return ran.stdout.decode() + ran.stderr.decode()
