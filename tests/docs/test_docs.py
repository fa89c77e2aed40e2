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


def test_the_readme_python_runs(tmp_path, packages):
    """The Python of the README runs as it stands: a run, files, a picture of a plot, and a port that answers."""
    (code,) = blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=120,
        cwd=tmp_path,
        env={**environment(tmp_path), **packages},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"hello\n 0 local 0")
    assert b"1\n2\n3\n ['numbers.txt']" in done.stdout
    assert done.stdout.endswith(b"b'3\\n1\\n2\\n'\n")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def packages():
    """Where the tour's packages come from: what `make` put there, so that no test asks a registry."""
    wheels = Path(sys.prefix) / "wheels"
    assert any(wheels.glob("matplotlib-*.whl")), "`make test` downloads them"
    return {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheels)}


@pytest.mark.parametrize("section", ["A tour", "A sandbox that stays"])
def test_the_readme_commands_run_line_by_line(section, tmp_path):
    """The command lines, typed one after another as a newcomer would, each exit with 0, and those that show something do."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "numbers.txt").write_text("3\n1\n2\n")
    text = blocks(README.split(f"## {section}")[1].split("\n## ")[0], "console")[0]
    typed = [line.removeprefix("$ ").replace(".venv/bin/", "") for line in text.splitlines() if line.startswith("$ ")]
    assert len(typed) > 3
    script = "".join(f"{line}\nprintf '\\0%s\\0' $?\n" for line in typed)
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, timeout=120, cwd=tmp_path, env=environment(tmp_path), check=False
    )
    told = done.stdout.decode().split("\0")[:-1]
    for line, shown, status in zip(typed, told[::2], told[1::2], strict=True):
        assert status == "0", (line, done.stderr.decode())
        assert shown or "=$(" in line or " cp " in line or " rm " in line, line


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
