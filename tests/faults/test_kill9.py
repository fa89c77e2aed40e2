"""Routers, supervisors and bubblewraps are killed at random moments; nothing survives its lifetime, and nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILL9 = Path(__file__).with_name("kill9.py")
SEED = os.environ.get("SANDSTORM_KILL9_SEED")
"""That of an earlier run, which every run prints, to see the same again."""


def _kill9(times: int) -> str:
    """What the given number of rounds said."""
    seed = ["--seed", SEED] if SEED else []
    command = [sys.executable, str(KILL9), "--times", str(times), *seed]
    ran = subprocess.run(command, capture_output=True, timeout=60 + 20 * times, check=False)
    said = ran.stdout.decode() + ran.stderr.decode()
    assert ran.returncode == 0, said
    return said


def test_twelve_kills_leave_nothing() -> None:
    """After each kill what was attached ends at once, what is kept at its lifetime, and one session later nothing is left."""
    assert "12 kills" in _kill9(12)


@pytest.mark.slow
def test_two_hundred_kills_leave_nothing() -> None:
    """The same two hundred times, so that rare moments are met as well."""
    assert "200 kills" in _kill9(200)
