from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


def _run(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, str(RUN), *args], capture_output=True, timeout=120, check=False)


def test_json_holds_every_figure_with_its_verdict() -> None:
    """`--json` gives one document in which each figure has its value, its target and whether that is met."""
    ran = _run("--only", "plan", "--quick", "--json")
    assert ran.returncode == 0, ran.stderr.decode()
    document = json.loads(ran.stdout)
    assert document["broken"] == []
    assert len(document["figures"]) == 3
    for figure in document["figures"]:
        assert figure["met"] is (figure["value"] <= figure["target"])


def test_the_table_names_the_baseline_beside_the_figure() -> None:
    """The table shows the ratio, the target and the baseline of a journal that grew, on one line."""
    ran = _run("--only", "journal", "--quick")
    assert ran.returncode == 0, ran.stderr.decode()
    (line,) = [line for line in ran.stdout.decode().splitlines() if line.startswith("a run with 2,000 runs stored")]
    assert " x " in line
    assert "target 1.2" in line
    assert "baseline with 100 stored" in line


def test_an_unknown_benchmark_is_refused() -> None:
    """A name that no benchmark has is refused with those that exist, and nothing is measured."""
    ran = _run("--only", "nothing")
    assert ran.returncode == 2
    assert b"imports" in ran.stderr
    assert ran.stdout == b""


@pytest.mark.slow
def test_what_this_machine_is_asked_for_can_be_measured() -> None:
    """The benchmarks of the local provider reach it as it is now, and name every figure of its sandboxes."""
    ran = _run("--only", "local", "--only", "boxes", "--only", "files", "--quick", "--json")
    assert ran.returncode == 0, ran.stderr.decode()
    document = json.loads(ran.stdout)
    assert document["broken"] == []
    assert len(document["figures"]) == 2 + 11 + 4
    assert all(figure["value"] > 0 for figure in document["figures"] if figure["unit"] in ("x", "MiB"))
