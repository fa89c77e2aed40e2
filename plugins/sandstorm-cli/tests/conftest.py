"""A command line of its own for each test: own home, own store, own plugins, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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


PAID = """
from sandstorm.policy import hookimpl
from sandstorm.testing import REFERENCE_RATES
from sandstorm_provider_local._provider import LocalProvider

@hookimpl
def sandstorm_providers():
    return [LocalProvider(name="paid", rates=REFERENCE_RATES)]
"""
"""A plugin with one account that runs on this machine and charges for it."""

WARNED = """
disable = ["docker"]

[plugins.local]
warn = false
"""


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


def _alone(home: Path) -> CommandLine:
    """`sandstorm` with the local provider alone. Skips where that cannot make sandboxes that stay."""
    command = CommandLine(home=home / "home", work=home / "work")
    (command.home / "site").mkdir(parents=True)
    command.work.mkdir()
    (command.home / ".config" / "sandstorm").mkdir(parents=True)
    (command.home / ".config" / "sandstorm" / "sandstorm.toml").write_text(WARNED)
    (status,) = [each for each in json.loads(command("providers", "--json").stdout) if each["name"] == "local"]
    abilities = status["offers"][0].get("abilities", {}) if status["ok"] else {}
    if "Detach" not in abilities:
        pytest.skip(f"this machine makes no sandboxes that stay: {status['offers'] or status['detail']}")
    return command


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """`sandstorm` with the local provider, in one home for all tests; what they leave behind is ended."""
    command = _alone(tmp_path_factory.mktemp("local"))
    yield command
    command("sandbox", "rm", "--all", "--yes")


@pytest.fixture(scope="session")
def box(local: CommandLine) -> str:
    """The id of a sandbox that tests share; each uses files of its own in it."""
    made = local("sandbox", "create", "--quiet")
    assert made.returncode == 0, made.stderr
    return made.stdout.decode().strip()
