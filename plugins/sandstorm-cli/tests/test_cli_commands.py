"""The other commands, and those that other distributions add."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sandstorm_cli
from sandstorm import InvalidInput, OutcomeUnknown, PluginError, PreparationFailed, ProviderDown, SandboxGone
from sandstorm_cli._exit_codes import MEANINGS, Status, clamp, status_of

if TYPE_CHECKING:
    from conftest import CommandLine

GREETING = """
import click

@click.command()
def greet():
    "Greets."
    click.echo("good day")
"""


def test_version_is_light(sandstorm: CommandLine) -> None:
    """--version loads neither the core nor rich."""
    argv = sandstorm.argv(["--version"])
    ran = subprocess.run([argv[0], "-X", "importtime", *argv[1:]], capture_output=True, env=sandstorm.env, check=True)
    assert ran.stdout.startswith(b"sandstorm ")
    loaded = {line.rpartition("|")[2].strip() for line in ran.stderr.decode().splitlines()}
    assert "click" in loaded
    assert not loaded & {"sandstorm", "rich", "trio", "cattrs", "pluggy", "attr"}


@pytest.mark.parametrize(
    "command", ["run", "plan", "attach", "sandbox", "prepare", "runs", "providers", "plugins", "doctor", "completion"]
)
def test_help(sandstorm: CommandLine, command: str) -> None:
    """Every command explains itself."""
    assert sandstorm(command, "--help").returncode == 0
    assert f"  {command} ".encode() in sandstorm("--help").stdout


def test_exit_codes_are_documented(sandstorm: CommandLine) -> None:
    """`run --help` shows the whole table."""
    shown = sandstorm("run", "--help").stdout.decode()
    for status, meaning in MEANINGS.items():
        assert f"{int(status)}  {meaning}" in shown


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("x", "y"), Status.BAD_INPUT),
        (SandboxGone(), Status.BAD_INPUT),
        (PluginError("p", "load", "no"), Status.BROKEN),
        (ProviderDown(), Status.ALL_FAILED),
        (PreparationFailed("no", fault="caller"), Status.BAD_INPUT),
        (OutcomeUnknown.__new__(OutcomeUnknown), Status.UNKNOWN),
        (KeyboardInterrupt(), Status.INTERRUPTED),
        (RuntimeError(), Status.BROKEN),
    ],
)
def test_status_of_each_error(error: BaseException, status: Status) -> None:
    """The nearest class in the table decides, and what is not in it is Sandstorm's own failure."""
    assert status_of(error) is status


def test_readme_documents_the_exit_codes() -> None:
    """The table of the README is the table of the code."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for status, meaning in MEANINGS.items():
        assert f"| {int(status)} | {meaning} |" in readme


def test_only_public_namespaces_are_imported() -> None:
    """Nothing of the core with an underscore is imported."""
    for path in Path(sandstorm_cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("sandstorm._")], path


def test_failure_never_looks_like_success() -> None:
    """A status that the shell would cut to 0 is shown as 255."""
    assert [clamp(status) for status in (0, 3, 255, 256, -1)] == [0, 3, 255, 255, 255]


def test_runs(sandstorm: CommandLine) -> None:
    """A run is listed and shown by the beginning of its ID, with its attempt and its money."""
    assert sandstorm("run", "-q", "--tenant", "acme", "-c", "out hello").returncode == 0
    (row,) = json.loads(sandstorm("runs", "list", "--json").stdout)
    assert (row["tenant"], row["provider"], row["exit"]) == ("acme", "toy", 0)
    assert row["id"].encode() in sandstorm("runs", "list").stdout
    shown = sandstorm("runs", "show", row["id"]).stdout.decode()
    assert "strategy" not in shown
    why = sandstorm("runs", "show", "--why", row["id"]).stdout.decode()
    assert "strategy" in why
    assert "1." in why
    assert "attempt 1" in shown
    assert "--- stdout\nhello\n" in shown
    record = json.loads(sandstorm("runs", "show", "--json", row["id"]).stdout)
    assert record["run"]["result"]["stdout"] == "hello\n"
    assert len(record["attempts"]) == 1


def test_stored_output_cannot_reach_the_terminal(sandstorm: CommandLine) -> None:
    """Control characters of a program are shown as escapes when its stored output is shown."""
    sandstorm("run", "-q", "-c", "out \x1b[2Jgone\x9b\u202e")
    (row,) = json.loads(sandstorm("runs", "list", "--json").stdout)
    shown = sandstorm("runs", "show", row["id"]).stdout
    assert b"\x1b" not in shown
    assert "\u202e".encode() not in shown
    assert b"\\x1b[2Jgone\\x9b\\u202e" in shown


def test_unknown_run(sandstorm: CommandLine) -> None:
    """An ID that does not exist is bad input."""
    assert sandstorm("runs", "show", "nope").returncode == 120
    assert sandstorm("runs", "list", "--limit", "0").returncode == 120


def test_providers(sandstorm: CommandLine) -> None:
    """Each account is shown with its isolation and what it charges."""
    shown = sandstorm("providers").stdout.decode()
    assert "toy" in shown
    assert "microvm" in shown
    assert "made up for tests" in shown
    (toy,) = [each for each in json.loads(sandstorm("providers", "--json").stdout) if each["name"] == "toy"]
    assert toy["ok"] is True


def test_plugins(sandstorm: CommandLine) -> None:
    """Loaded plugins, those set aside and added commands are listed with where they come from."""
    sandstorm.add_plugin("broken", "raise RuntimeError('no luck')")
    sandstorm.add("greeting", GREETING, "[sandstorm.commands]\ngreet = greeting:greet\n")
    rows = {line.split()[0]: line for line in sandstorm("plugins").stdout.decode().splitlines()}
    assert "loaded" in rows["toy"]
    assert "SET ASIDE" in rows["broken"]
    assert "no luck" in rows["broken"]
    assert "greeting" in rows["greet"]
    report = json.loads(sandstorm("plugins", "--json").stdout)
    assert {"loaded", "set_aside", "commands"} <= report.keys()


def test_warnings_are_one_escaped_line(sandstorm: CommandLine) -> None:
    """A plugin that is set aside is named on stderr; its words cannot reach the terminal as controls."""
    sandstorm.add_plugin("broken", "raise RuntimeError('no\\nluck \\x1b[2J')")
    ran = sandstorm("run", "-q", "-c", "out hello")
    assert ran.stdout == b"hello\n"
    (line,) = ran.stderr.splitlines()
    assert line.startswith(b"sandstorm: warning: ")
    assert b"broken" in line
    assert b"\x1b" not in line


def test_added_command(sandstorm: CommandLine) -> None:
    """Another distribution's command is listed and called."""
    sandstorm.add("greeting", GREETING, "[sandstorm.commands]\ngreet = greeting:greet\n")
    assert b"Greets." in sandstorm("--help").stdout
    assert sandstorm("greet").stdout == b"good day\n"


def test_broken_added_command(sandstorm: CommandLine) -> None:
    """One that does not load is named with its distribution, and hinders nothing else."""
    sandstorm.add("greeting", "raise RuntimeError('no luck')", "[sandstorm.commands]\ngreet = greeting:greet\n")
    ran = sandstorm("greet", "--loudly")
    assert ran.returncode == 125
    (line,) = ran.stderr.decode().splitlines()
    assert "greeting" in line
    assert "no luck" in line
    assert sandstorm("--help").returncode == 0
    assert sandstorm("run", "-q", "-c", "out hello").stdout == b"hello\n"


def test_added_command_that_two_claim(sandstorm: CommandLine) -> None:
    """Two distributions with one name are both named, and neither is called."""
    for name in ("one", "two"):
        sandstorm.add(name, GREETING, f"[sandstorm.commands]\ngreet = {name}:greet\n")
    ran = sandstorm("greet")
    assert ran.returncode == 125
    assert b"one and two" in ran.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(sandstorm: CommandLine, shell: str) -> None:
    """Each shell gets its script, which asks `sandstorm` through the right variable."""
    assert b"_SANDSTORM_COMPLETE" in sandstorm("completion", shell).stdout


def test_completion_completes(sandstorm: CommandLine) -> None:
    """What the script asks for is answered."""
    env = {"_SANDSTORM_COMPLETE": "bash_complete", "COMP_WORDS": "sandstorm pl", "COMP_CWORD": "1"}
    assert b"plan" in sandstorm(env=env).stdout


def test_doctor_finds_nothing_wrong(sandstorm: CommandLine) -> None:
    """Each check is a line, and a sound installation gives 0."""
    ran = sandstorm("doctor", "--json")
    answer = json.loads(ran.stdout)
    named = {check["name"]: check for check in answer["checks"]}
    assert {"python", "core", "import name", "settings", "store", "plugins", "provider toy"} <= named.keys()
    assert named["provider toy"]["state"] == "ok"
    assert ran.returncode == 0, answer
    lines = sandstorm("doctor").stdout.decode().splitlines()
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)


def test_doctor_names_the_shared_kernel(bare: CommandLine) -> None:
    """A provider that shares the host's kernel is said to do so plainly."""
    source = """
from sandstorm.policy import hookimpl
from sandstorm.testing import ReferenceProvider

@hookimpl
def sandstorm_providers():
    return [ReferenceProvider("shared", isolation="namespaces")]
"""
    bare.add_plugin("shared", source)
    (line,) = [line for line in bare("doctor").stdout.decode().splitlines() if "provider shared" in line]
    assert "SHARED HOST KERNEL" in line


def test_doctor_finds_a_foreign_owner_of_the_import_name(sandstorm: CommandLine) -> None:
    """A distribution that brings its own `sandstorm` is named with the remedy."""
    sandstorm.add("sandstorm_other", "", "")
    info = sandstorm.home / "site" / "sandstorm_other-1.0.dist-info"
    (info / "RECORD").write_text("sandstorm/__init__.py,,\n")
    ran = sandstorm("doctor")
    assert ran.returncode == 1
    assert b"sandstorm-other 1.0" in ran.stdout
    assert b"pip uninstall sandstorm-other" in ran.stdout


def test_doctor_survives_a_foreign_module(bare: CommandLine) -> None:
    """Where the import gives something else, doctor still runs and says so, and `run` points to it."""
    (bare.home / "site" / "sandstorm").mkdir()
    (bare.home / "site" / "sandstorm" / "__init__.py").write_text("")
    ran = bare("doctor")
    assert ran.returncode == 1
    assert b"fail  import name" in ran.stdout
    wrong = bare("run", "-c", "1")
    assert wrong.returncode == 125
    assert b"sandstorm doctor" in wrong.stderr


@pytest.mark.parametrize(
    "text", ["strategy = 3", "nonsense", "[plugins.nobody]\nx = 1", 'store = "/proc/x"', 'store = "sqlite:////proc/no/x.db"']
)
def test_doctor_on_bad_settings(sandstorm: CommandLine, text: str) -> None:
    """Settings that cannot be used, or name a store that cannot be written, are a failed check in one line."""
    (sandstorm.work / "sandstorm.toml").write_text(text)
    ran = sandstorm("doctor")
    assert ran.returncode == 1
    assert any(line.startswith("fail") for line in ran.stdout.decode().splitlines())
    assert b"Traceback" not in ran.stderr
    assert sandstorm("run", "-c", "out hello").returncode in (120, 125)
