"""The documents say what the code does."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sandstorm._hookspecs

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def environment(tmp_path):
    return {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs_as_a_program(example, tmp_path):
    """Each example exits with 0 and prints something."""
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, timeout=60, cwd=tmp_path, env=environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_the_readme_python_runs(tmp_path):
    """The Python of the README runs as it stands and prints the program's output."""
    (code,) = blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, cwd=tmp_path, env=environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"hello\n 0 local 0")
    assert b"1\n2\n3\n" in done.stdout


def test_the_readme_tour_runs_line_by_line(tmp_path):
    """The command lines of the tour, typed one after another as a newcomer would, each exit with 0 and print something."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "numbers.txt").write_text("3\n1\n2\n")
    tour = [line.removeprefix("$ ") for line in blocks(README, "console")[1].splitlines() if line.startswith("$ ")]
    assert len(tour) > 3
    for line in tour:
        typed = line.replace(".venv/bin/", "")
        done = subprocess.run(
            ["bash", "-c", typed], capture_output=True, timeout=60, cwd=tmp_path, env=environment(tmp_path), check=False
        )
        assert done.returncode == 0, (line, done.stderr.decode())
        assert done.stdout, line


def test_the_readme_tour_is_short():
    """A newcomer reads the tour in one go: at most 40 lines."""
    tour = README.split("## A tour")[1].split("\n## ")[0]
    assert len(tour.strip().splitlines()) <= 40


def hooks():
    members = inspect.getmembers(sandstorm._hookspecs, inspect.isfunction)
    return [(name, function) for name, function in members if name.startswith("sandstorm_")]


@pytest.mark.parametrize(("name", "function"), hooks())
def test_every_hook_is_in_the_design_with_its_arguments(name, function):
    """The table of hooks names each hook with its exact arguments."""
    arguments = ", ".join(inspect.signature(function).parameters)
    assert f"`{name}({arguments})`" in DESIGN or (not arguments and f"`{name}`" in DESIGN)


def test_the_contract_table_has_every_method_and_ability():
    """The mapping onto the platforms names every method of the contract and every ability."""
    import sandstorm.provider as contract

    mapping = DESIGN.split("## The contract on six platforms")[1].split("\n## ")[0]
    methods = {
        name
        for protocol in (contract.Provider, contract.Session, contract.Sandbox, contract.Process)
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    for word in (*methods, *contract.ABILITIES):
        assert re.search(rf"`{word}\b", mapping), word
