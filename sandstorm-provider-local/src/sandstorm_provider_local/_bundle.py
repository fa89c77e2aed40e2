"""What sandboxes see of Sandstorm: the modules of `_inside`, compiled for their Python, and what stands in for `/etc`.

A bundle is named by its content, made once and never changed, so that every box of this user shares one, and those that
outlive their router keep theirs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import attrs

from sandstorm.provider import ProviderDown
from sandstorm_provider_local import _runtimes
from sandstorm_provider_local._owner import is_dead, own_token

INSIDE = "/run/sandstorm"
"""Where sandboxes have the modules."""
_MODULES = ("_wire.py", "_agent.py", "_kernel.py")
_MAIN = f"import sys; sys.path.insert(0, {INSIDE!r}); from _agent import main; main(int(sys.argv[2]), int(sys.argv[1]))"
_COMPILE = (
    "import compileall, py_compile, sys; "
    "sys.exit(not compileall.compile_dir(sys.argv[1], quiet=1, stripdir=sys.argv[1], prependdir=sys.argv[2],"
    " invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH))"
)
_SECONDS = 30.0


@attrs.frozen
class Bundle:
    """The host directories to bind: `inside` at `INSIDE`, and `etc` at `/etc`."""

    inside: str
    etc: str


def agent_argv(python: Sequence[str], max_tasks: int | None = None) -> tuple[str, ...]:
    """The command of a box's first process, where `python` starts the sandbox's Python; the supervisor adds its argument.

    `max_tasks` is how many processes and threads there may be, where no control group says so.
    """
    return (*python, "-I", "-S", "-c", _MAIN, str(max_tasks or 0))


def publish(state: Path, python: str) -> Bundle:
    """The bundle for the host's `python`, made where it is missing. Raises `ProviderDown` where it cannot be made."""
    bundles = state / "bundles"
    try:
        bundles.mkdir(mode=0o755, exist_ok=True)
        place = bundles / _digest(python)
        if not place.is_dir():
            _remove_abandoned(bundles)
            _make(bundles, place, python)
    except (OSError, subprocess.SubprocessError) as exc:
        raise ProviderDown(f"what sandboxes need cannot be written to {bundles}: {exc}") from exc
    return Bundle(str(place / "inside"), str(place / "etc"))


def _digest(python: str) -> str:
    """A name for all that goes into a bundle."""
    digest = hashlib.sha256()
    for name in _MODULES:
        digest.update(_source(name))
    digest.update(Path(_runtimes.__file__).read_bytes())
    for path in (Path(python), Path("/etc/ld.so.cache"), Path("/etc/localtime")):
        if path.exists():
            found = path.stat()
            digest.update(f"{path.resolve()} {found.st_mtime_ns} {found.st_size}\n".encode())
    return digest.hexdigest()[:32]


def _source(name: str) -> bytes:
    return files("sandstorm_provider_local").joinpath("_inside", name).read_bytes()


def _make(bundles: Path, place: Path, python: str) -> None:
    staging = bundles / f"{own_token()}-{time.monotonic_ns():x}"
    inside = staging / "inside"
    try:
        inside.mkdir(parents=True)
        for name in _MODULES:
            (inside / name).write_bytes(_source(name))
        subprocess.run(  # noqa: S603 - our own modules and the Python that sandboxes get
            [python, "-I", "-S", "-c", _COMPILE, str(inside), INSIDE], check=True, timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
        _runtimes.make_etc(staging)
        for entry in (staging, *staging.rglob("*")):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        try:
            os.rename(staging, place)  # noqa: PTH104 - Path.rename would say no more
        except OSError:
            if not place.is_dir():  # another router was faster otherwise, with the same content
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(bundles: Path) -> None:
    for entry in bundles.iterdir():
        if is_dead(entry.name.rpartition("-")[0]):
            shutil.rmtree(entry, ignore_errors=True)
