"""Routers, a journal and vendors go wrong at every await: what is promised holds, but for the bugs that are known by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MACHINE = Path(__file__).with_name("machine.py")


def _machine(*given: str, timeout: float) -> str:
    """What the machine said."""
    ran = subprocess.run([sys.executable, str(MACHINE), *given], capture_output=True, timeout=timeout, check=False)
    said = ran.stdout.decode() + ran.stderr.decode()
    assert ran.returncode == 0, said
    return said


def test_a_few_rounds_break_nothing() -> None:
    """The rounds of fixed seeds: nothing leaks, runs twice, goes over budget or is booked wrongly."""
    assert "0 rounds broken" in _machine("--seed", "1", "--rounds", "20", timeout=120)


@pytest.mark.slow
def test_ten_thousand_faults_break_nothing() -> None:
    """As many rounds as it takes to meet every kind of fault at every site."""
    assert "0 rounds broken" in _machine("--seed", "100", "--faults", "10000", "--full", timeout=1200)
