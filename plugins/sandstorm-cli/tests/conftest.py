"""A command line of its own for each test: own home, own store, own plugins, real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import attrs
import pytest

TOY = """
from sandstorm.policy import hookimpl
from sandstorm.testing import ReferenceProvider

@hookimpl
def sandstorm_providers():
    return [ReferenceProvider("toy")]
"""
"""A plugin with one account in memory, which runs the toy language of `sandstorm.testing`."""


PLAIN = """
import attrs
from sandstorm.policy import hookimpl
from sandstorm.provider import Offer, Support
from sandstorm.testing import REFERENCE_RATES
from sandstorm_provider_local import LocalProvider

NONE = Support("impossible", "made so for a test")

class Plain:
    def __init__(self):
        self.inner = LocalProvider(name="plain", rates=REFERENCE_RATES, state_dir={state!r})
        self.name, self.traits, self.rates, self.connect = "plain", self.inner.traits, self.inner.rates, self.inner.connect

    def offers(self, spec, facts):
        made = self.inner.offers(spec, facts)
        return [attrs.evolve(each, abilities={{**each.abilities, "Interactive": NONE}}) if isinstance(each, Offer) else each
                for each in made]

@hookimpl
def sandstorm_providers():
    return [Plain()]
"""
"""A plugin with an account on this machine that charges, and whose programs take no input while they run."""

LOCAL_ALONE = """
disable = ["docker"]

[plugins.local]
warn = false
state_dir = {state!r}
"""


@attrs.frozen
class Started:
    """A command under way, with its streams."""

    process: subprocess.Popen[bytes]

    @property
    def stdin(self) -> IO[bytes]:
        """What it reads."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """What it writes."""
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def stderr(self) -> IO[bytes]:
        """What it says."""
        assert self.process.stderr is not None
        return self.process.stderr

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def status(self) -> int:
        """Its exit status, waited for."""
        return self.process.wait(timeout=30)


@attrs.frozen(kw_only=True)
class CommandLine:
    """Runs `sandstorm` in a home of its own.

    Attributes:
        home: Where the settings, the store and the plugins of this test are.
        work: The current directory of the commands.
    """

    home: Path
    work: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of the commands."""
        path = os.pathsep.join([str(self.home / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "PYTHONPATH": path, "LANG": "C.UTF-8"}

    def add(self, name: str, source: str, entry_points: str) -> None:
        """Installs a distribution of one module, as far as its metadata goes."""
        info = self.home / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        (info / "RECORD").write_text(f"{name}.py,,\n")
        (info.parent / f"{name}.py").write_text(source)

    def add_plugin(self, name: str, source: str) -> None:
        """Installs a plugin of one module."""
        self.add(name, source, f"[sandstorm]\n{name} = {name}\n")

    @staticmethod
    def argv(args: Sequence[str]) -> list[str]:
        """What the console script amounts to."""
        return [sys.executable, "-m", "sandstorm_cli", *args]

    def __call__(
        self, *args: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """What came of `sandstorm ARGS`."""
        return subprocess.run(
            self.argv(args),
            input=stdin,
            capture_output=True,
            cwd=self.work,
            env={**self.env, **(env or {})},
            timeout=60,
            check=False,
        )

    @contextlib.contextmanager
    def started(self, *args: str, stdin: int = subprocess.DEVNULL) -> Iterator[Started]:
        """`sandstorm ARGS` under way, killed at the end of the block."""
        process = subprocess.Popen(
            self.argv(args), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.work, env=self.env
        )
        with process:
            try:
                yield Started(process)
            finally:
                process.kill()

    def on_terminal(self, *args: str, stdout: int | None = None, env: dict[str, str] | None = None) -> bytes:
        """What a terminal gets from standard error, and from standard output where that goes nowhere else."""
        main, other = pty.openpty()
        shown = b""
        try:
            process = subprocess.Popen(
                self.argv(args),
                stdin=subprocess.DEVNULL,
                stdout=stdout or other,
                stderr=other,
                cwd=self.work,
                env={**self.env, "TERM": "xterm-256color", **(env or {})},
            )
            os.close(other)
            with process, contextlib.suppress(OSError):  # a terminal that nobody holds any more is an error on Linux
                while data := os.read(main, 1 << 16):
                    shown += data
        finally:
            os.close(main)
        return shown

    @property
    def stored(self) -> list[Path]:
        """The files that the commands left in the home, beside the plugins that the test put there."""
        return [path for path in self.home.rglob("*") if path.is_file() and "site" not in path.relative_to(self.home).parts]


@pytest.fixture
def bare(tmp_path: Path) -> CommandLine:
    """`sandstorm` without plugins of the test's own."""
    home, work = tmp_path / "home", tmp_path / "work"
    (home / "site").mkdir(parents=True)
    work.mkdir()
    return CommandLine(home=home, work=work)


@pytest.fixture
def sandstorm(bare: CommandLine) -> CommandLine:
    """`sandstorm` with one account, `toy`."""
    bare.add_plugin("toy", TOY)
    return bare


def _alone(home: Path, state: Path) -> CommandLine:
    """`sandstorm` with the local provider alone. Skips where that cannot make sandboxes that stay."""
    command = CommandLine(home=home / "home", work=home / "work")
    (command.home / "site").mkdir(parents=True)
    command.work.mkdir()
    (command.home / ".config" / "sandstorm").mkdir(parents=True)
    (command.home / ".config" / "sandstorm" / "sandstorm.toml").write_text(LOCAL_ALONE.format(state=str(state)))
    (status,) = [each for each in json.loads(command("providers", "--json").stdout) if each["name"] == "local"]
    assert status["offers"], status["detail"]
    support = status["offers"][0].get("abilities", {}).get("Detach", {})
    if support.get("level") not in ("full", "partial"):
        pytest.skip(f"this machine makes no sandboxes that stay: {support.get('reason') or status['offers']}")
    return command


@pytest.fixture(scope="session")
def state() -> Iterator[Path]:
    """The state directory of the local provider, which other users of this machine have to get through: none of pytest's."""
    directory = Path(tempfile.mkdtemp(prefix="sandstorm-test-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def local(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """`sandstorm` with the local provider, in one home for all tests; what they leave behind is ended."""
    command = _alone(tmp_path_factory.mktemp("local"), state)
    yield command
    command("sandbox", "rm", "--all", "--yes")


@pytest.fixture(scope="session")
def plain(local: CommandLine, state: Path) -> CommandLine:
    """`sandstorm` with the account `plain` beside the local one."""
    local.add_plugin("plain", PLAIN.format(state=str(state)))
    return local


@pytest.fixture(scope="session")
def box(local: CommandLine) -> str:
    """The id of a sandbox that tests share; each uses files of its own in it."""
    made = local("sandbox", "create", "--quiet")
    assert made.returncode == 0, made.stderr
    return made.stdout.decode().strip()
