"""`sandstorm run --detach`, `attach` and `prepare`."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import CommandLine

SLOW = """
from contextlib import asynccontextmanager
from sandstorm.policy import hookimpl
from sandstorm.testing import ReferenceProvider
import trio

class Slow(ReferenceProvider):
    @asynccontextmanager
    async def connect(self):
        async with super().connect() as session:
            prepare = session.prepare
            async def slowly(environment, marker):
                await trio.sleep(0.7)
                return await prepare(environment, marker)
            session.prepare = slowly
            yield session

@hookimpl
def sandstorm_providers():
    return [Slow("toy")]
"""


def test_detached_run(local: CommandLine, tmp_path: Path) -> None:
    """`run --detach` prints the id alone and ends at once; Ctrl-C on `attach` leaves the run going; later its output comes from
    the beginning, its files are brought back, and its status is that of `attach`.
    """
    code = "import time, pathlib\nprint('up', flush=True)\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\nopen('o.txt', 'w').write('made')\nraise SystemExit(5)"
    begun = local("run", "--detach", "--output", "o.txt", "-c", code)
    assert begun.returncode == 0, begun.stderr
    run = begun.stdout.decode().strip()
    assert f"sandstorm attach {run}" in begun.stderr.decode()
    with local.started("attach", run) as attached:
        assert attached.stdout.readline() == b"up\n"
        attached.send(signal.SIGINT)
        assert attached.status() == 130
        assert b"the run goes on" in attached.stderr.read()
    (kept,) = [each for each in json.loads(local("sandbox", "list", "--json").stdout) if each["run"] == run]
    assert kept["title"] == "python"
    assert local("sandbox", "cp", "-", f"{run}:go", stdin=b"").returncode == 0
    ended = local("attach", run[:-2], "--output-dir", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (5, b"up\n")
    assert b"exit code 5" in ended.stderr
    assert (tmp_path / "o.txt").read_text() == "made"
    again = local("attach", "--json", run, "--output-dir", str(tmp_path))
    assert again.returncode == 5
    assert json.loads(again.stdout)["stdout"] == "up\n"


def test_attach_needs_a_detached_run(sandstorm: CommandLine) -> None:
    """A run that is not known is bad input, in one line."""
    ran = sandstorm("attach", "no-such-run")
    assert ran.returncode == 120
    (line,) = ran.stderr.decode().splitlines()
    assert "run" in line


def test_detach_in_json(sandstorm: CommandLine) -> None:
    """With --json the id is in a document, with where it runs and until when."""
    answer = json.loads(sandstorm("run", "--detach", "--json", "-c", "out hello").stdout)
    assert answer.keys() == {"run", "provider", "sandbox", "expires_at"}
    assert answer["provider"] == "toy"


def test_prepare(sandstorm: CommandLine) -> None:
    """Provider, name and seconds are printed; without anything to prepare it is bad input."""
    ran = sandstorm("prepare", "--requirement", "numpy==2.1", "--language", "python")
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.decode().splitlines()] == ["provider", "name", "took"]
    answer = json.loads(sandstorm("prepare", "--json", "--requirement", "numpy==2.1").stdout)
    assert answer.keys() == {"provider", "name", "seconds"}
    assert sandstorm("prepare", "--language", "python").returncode == 120


def test_progress_of_preparing(bare: CommandLine) -> None:
    """On a terminal the line says what is prepared and where; a package's name cannot control the terminal."""
    bare.add_plugin("toy", SLOW)
    shown = bare.on_terminal("prepare", "--requirement", "num\x1b[31mpy==2.1", "--requirement", "b")
    assert b"preparing num\\x1b[31mpy==2.1, b on toy" in shown
