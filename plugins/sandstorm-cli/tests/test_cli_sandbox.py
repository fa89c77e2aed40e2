"""`sandstorm sandbox`: sandboxes that stay, over several processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from sandstorm import InvalidInput
from sandstorm_cli._exit_codes import status_of
from sandstorm_cli._failure import message
from sandstorm_cli._sandbox import sandbox

if TYPE_CHECKING:
    from conftest import CommandLine


def listed(command: CommandLine) -> dict[str, Any]:
    """The sandboxes that are there, by id."""
    return {each["id"]: each for each in json.loads(command("sandbox", "list", "--json").stdout)}


def test_create_prints_the_id_alone(sandstorm: CommandLine) -> None:
    """Standard output is the id, and the rest is said on standard error, the most that it can cost included."""
    made = sandstorm("sandbox", "create", "--lifetime", "10m", "--cpu", "2")
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(rb"\S+\n", made.stdout)
    said = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in made.stderr.decode().splitlines())
    assert said["runs on"] == "toy"
    assert re.fullmatch(r"at most \$0\.0\d+", said["cost"])
    assert said["isolation"] == "microvm"
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", said["until"])


def test_create_that_cannot_tell_the_id_leaves_nothing(local: CommandLine) -> None:
    """Where the id cannot be written, the sandbox is ended: nobody would know of it."""
    argv = local.argv(["sandbox", "create", "-q", "--label", "for=nobody"])
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, cwd=local.work, env=local.env, check=False)
    assert ran.returncode == 125
    assert not [each for each in listed(local).values() if each["labels"] == {"for": "nobody"}]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["create", "--lifetime", "soon"], "lifetime"),
        (["create", "--lifetime", "0s"], "lifetime"),
        (["create", "--gpu", "H100:x"], "gpu"),
        (["rm"], "ID"),
        (["rm", "--all", "x"], "ID"),
        (["exec", "x"], "COMMAND"),
        (["exec", "x", "-e", "NAME", "--", "true"], "env"),
        (["exec", "x", "--timeout", "1y", "--", "true"], "timeout"),
        (["exec", "-t", "x", "--", "true"], "terminal"),
        (["shell", "x"], "terminal"),
        (["cp", "a", "b"], "DST"),
        (["cp", "x:a", "y:b"], "DST"),
        (["extend", "x", "long"], "lifetime"),
        (["snapshot", "x", "--retention", "-1d"], "retention"),
        (["url", "x", "http"], "http"),
    ],
)
def test_bad_input(args: list[str], said: str) -> None:
    """Every bad value is refused with 120 and a message that names it, before anything is opened."""
    with pytest.raises((InvalidInput, click.UsageError)) as caught:
        sandbox.main(args, standalone_mode=False)
    assert status_of(caught.value) == 120
    assert said in message(caught.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["create", "--snapshot", "nameless"], "snapshot"),
        (["ls", "no-\x1bsuch"], "no-\\x1bsuch"),
        (["exec", "no-such", "--", "true"], "sandbox"),
    ],
)
def test_bad_input_is_one_line(sandstorm: CommandLine, args: list[str], said: str) -> None:
    """So is what only the journal can tell: in one line without control characters."""
    ran = sandstorm("sandbox", *args)
    assert ran.returncode == 120
    (line,) = ran.stderr.decode().splitlines()
    assert said in line


def test_list_has_a_hint_where_there_is_none(sandstorm: CommandLine) -> None:
    """An empty list says how a sandbox is made, on standard error; as JSON it is an empty list."""
    ran = sandstorm("sandbox", "list")
    assert (ran.returncode, ran.stdout) == (0, b"")
    assert b"sandbox create" in ran.stderr


def test_list_with_cost_and_idle(plain: CommandLine) -> None:
    """What it has cost, what it can cost and its idle time are columns of their own; a label is in the JSON document."""
    made = plain("sandbox", "create", "-q", "--pin", "plain", "--lifetime", "10m", "--label", "for=test")
    name = made.stdout.decode().strip()
    header, *rows = plain("sandbox", "list", "--cost", "--idle").stdout.decode().splitlines()
    assert header.split("  ")[0] == "ID"
    assert all(word in header for word in ("PROVIDER", "STATE", "AGE", "ENDS IN", "COST", "AT MOST", "IDLE"))
    (row,) = [row for row in rows if row.startswith(name)]
    cells = re.split(r"\s{2,}", row)
    assert (cells[2], cells[3]) == ("plain", "running")
    cost, most = (float(cell.removeprefix("$")) for cell in cells[6:8])
    assert 0 <= cost < most
    assert listed(plain)[name]["labels"] == {"for": "test"}
    assert plain("sandbox", "rm", name).returncode == 0


def test_beginnings_of_ids(local: CommandLine, box: str) -> None:
    """An unambiguous beginning of an id will do, and so will that of its run."""
    run = listed(local)[box]["run"]
    assert local("sandbox", "ls", box[:-1]).returncode == 0
    assert local("sandbox", "ls", run[:-1]).returncode == 0


def test_shell_completes_ids(local: CommandLine, box: str) -> None:
    """A shell that asks what an id may be is told the sandboxes that are there, and no error."""
    asked = {"_SANDSTORM_COMPLETE": "bash_complete", "COMP_WORDS": f"sandstorm sandbox pause {box[:4]}", "COMP_CWORD": "3"}
    ran = local(env=asked)
    assert f"plain,{box}" in ran.stdout.decode().splitlines()
    assert ran.stderr == b""


def test_pause_and_resume(local: CommandLine, box: str) -> None:
    """A paused sandbox says so in the list, and refuses programs until it is resumed."""
    paused = local("sandbox", "pause", box)
    if b"freezer" in paused.stderr:
        pytest.skip("no freezer control group can be used here")
    try:
        assert paused.stdout == b"paused\n"
        assert listed(local)[box]["state"] == "paused"
        refused = local("sandbox", "exec", box, "--", "true")
        assert refused.returncode == 120
        assert b"resume" in refused.stderr
    finally:
        assert local("sandbox", "resume", box).stdout == b"running\n"


def test_extend_moves_the_end(local: CommandLine, box: str) -> None:
    """The new end is printed, and is that of the list."""
    before = listed(local)[box]["expires_at"]
    ran = local("sandbox", "extend", box, "5h", "--json")
    assert json.loads(ran.stdout)["expires_at"] == listed(local)[box]["expires_at"] > before + 3600


def test_snapshot_names_a_copy(local: CommandLine, box: str) -> None:
    """A sandbox made from a snapshot has the files, and goes on by itself."""
    local("sandbox", "cp", "-", f"{box}:kept/file", stdin=b"kept")
    name = local("sandbox", "snapshot", box, "--retention", "10m").stdout.decode().strip()
    made = local("sandbox", "create", "-q", "--snapshot", name).stdout.decode().strip()
    assert local("sandbox", "cp", f"{made}:kept/file", "-").stdout == b"kept"
    assert local("sandbox", "rm", made).returncode == 0


def test_url_reaches_a_port(local: CommandLine, box: str) -> None:
    """The address goes on working after the command that printed it."""
    argv = ("--", "python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "8123")
    with local.started("sandbox", "exec", box, *argv) as server:
        assert b"Serving" in server.stdout.readline()
        address = local("sandbox", "url", box, "8123").stdout.decode().strip()
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert b"Directory listing" in answer.read()
        server.send(signal.SIGTERM)
        assert server.status() == 130


def test_rm_reports_each(local: CommandLine, box: str) -> None:
    """Each id is reported; one that is unknown or fits several hinders no other, and the status tells of it."""
    made = [local("sandbox", "create", "-q").stdout.decode().strip() for _ in range(2)]
    ran = local("sandbox", "rm", "ss-", made[0], "no-\x1bsuch", made[1])
    assert ran.returncode == 120
    several, first, unknown, second = ran.stderr.decode().splitlines()
    assert all(name in several for name in (box, *made))
    assert (first, second) == (f"{made[0]}: ended", f"{made[1]}: ended")
    assert unknown.startswith("no-\\x1bsuch: sandbox")
    assert not listed(local).keys() & set(made)


def test_rm_all_asks_first(local: CommandLine, box: str) -> None:
    """Where nobody can be asked, --all needs --yes, and ends nothing without it."""
    ran = local("sandbox", "rm", "--all")
    assert ran.returncode == 120
    assert b"--yes" in ran.stderr
    assert box in listed(local)


def test_every_command_explains_itself(sandstorm: CommandLine) -> None:
    """The group lists each command, in words."""
    shown = sandstorm("sandbox", "--help").stdout.decode()
    for name in ("create", "list", "exec", "shell", "cp", "ls", "url", "pause", "resume", "snapshot", "extend", "rm"):
        assert re.search(rf"^  {name}  +\S", shown, re.MULTILINE)


def test_readme_tour(local: CommandLine) -> None:
    """The tour of the README works as it stands, line after line."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    tour = readme.partition("## Sandboxes that stay")[2].partition("```console\n")[2].partition("```")[0]
    (local.work / "hello.py").write_text("print('hello')")
    script = f'sandstorm() {{ "{sys.executable}" -m sandstorm_cli "$@"; }}\n' + tour.replace("$ ", "", 1).replace("\n$ ", "\n")
    ran = subprocess.run(["sh", "-e"], input=script.encode(), cwd=local.work, env=local.env, capture_output=True, check=False)
    (local.work / "hello.py").unlink()
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.decode().splitlines()
    assert (lines[0], lines[-1]) == ("42", "hello")
    assert b"ended" in ran.stderr
