"""`sandstorm sandbox cp`: files and directories into a sandbox and out of it."""

from __future__ import annotations

import os
import posixpath
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from sandstorm import InvalidInput, NotSupported, Sandstorm
from sandstorm_cli._escape import one_line
from sandstorm_cli._flags import settings_option
from sandstorm_cli._ids import SandboxId, opened
from sandstorm_cli._progress import moving

if TYPE_CHECKING:
    from sandstorm import BlockingBox
    from sandstorm.provider import FileInfo

_STREAM = "-"
_NAMED = 10
"""Entries that are named when they are left out; more are counted."""


@attrs.frozen
class Side:
    """One side of a copy: a path in a sandbox, or one here where `sandbox` is None."""

    sandbox: str | None
    path: str

    @classmethod
    def of(cls, text: str) -> Side:
        """`ID:PATH`, or a local path: one that begins with a slash or a dot, or that has no colon."""
        name, colon, path = text.partition(":")
        if not colon or not name or "/" in name or name.startswith("."):
            return cls(None, text)
        return cls(name, path)

    @property
    def name(self) -> str:
        """Its last part; empty where the path means the contents of a directory."""
        return "" if self.path.endswith("/.") or self.path in ("", ".") else posixpath.basename(posixpath.normpath(self.path))

    @property
    def is_place(self) -> bool:
        """Whether it can only be a directory."""
        return self.path in ("", ".") or self.path.endswith(("/", "/."))

    def joined(self, name: str) -> str:
        """The path of an entry of this directory; of itself for an empty name."""
        return posixpath.normpath(posixpath.join(self.path or ".", name))


@click.command()
@click.argument("source", metavar="SRC", type=SandboxId())
@click.argument("target", metavar="DST", type=SandboxId())
@settings_option
def cp(source: str, target: str, settings: str | None) -> None:
    """Copy SRC to DST, one of which is ID:PATH, with PATH relative to the work area.

    Directories are copied with all that is in them: into DST where that is a directory, else as DST. SRC/. means what is in SRC.
    A single file may come from - or go to -, standard input and output. A local path with a colon is written ./a:b.
    """
    here, there = Side.of(source), Side.of(target)
    if (here.sandbox is None) == (there.sandbox is None):
        raise InvalidInput("DST", "one of SRC and DST as ID:PATH, and the other one here", f"{source} {target}")
    with Sandstorm(settings=settings) as client, opened(client, here.sandbox or there.sandbox or "") as box:
        if here.sandbox is None:
            _send(box, here, there)
        else:
            _fetch(box, here, there)


# --- into a sandbox ------------------------------------------------------------------------------------------


def _send(box: BlockingBox, source: Side, target: Side) -> None:
    if source.path == _STREAM:
        if target.is_place:
            raise InvalidInput("DST", "the name of a file, since standard input has none", target.path)
        with moving(target.path, None) as on_bytes:
            box.upload(target.path, _standard_input(), on_bytes)
        return
    path = Path(source.path)
    if not path.exists():
        raise InvalidInput("SRC", "a file or directory that is there", source.path)
    into = target.is_place or _kind(box, target.path) == "directory"
    name = path.resolve().name if source.name or not path.is_dir() else ""
    place = target.joined(name if into else "")
    with _local("SRC", source.path), moving(source.path, _size(path)) as on_bytes:
        if not path.is_dir():
            box.upload(place, path, on_bytes)
            return
        box.upload_directory(place, path, on_bytes)
        if place != ".":
            box.make_directory(place)  # which an upload without files does not


def _standard_input() -> bytes | Path:
    """Standard input to be read piece by piece, where opening it anew begins where it stands; else what is in it."""
    descriptor = sys.stdin.fileno()
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or (stat.S_ISREG(mode) and os.lseek(descriptor, 0, os.SEEK_CUR) == 0):
        return Path(f"/dev/fd/{descriptor}")
    return sys.stdin.buffer.read()


def _kind(box: BlockingBox, path: str) -> str | None:
    """The kind of an entry in the sandbox; None where there is none, or where the provider cannot tell."""
    try:
        return box.stat(path).kind
    except (FileNotFoundError, NotSupported):
        return None


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


# --- out of a sandbox ----------------------------------------------------------------------------------------


def _fetch(box: BlockingBox, source: Side, target: Side) -> None:
    info = _found(box, source)
    path = Path(target.path)
    if info is not None and info.kind == "directory":
        if target.path == _STREAM or (path.exists() and not path.is_dir()):
            raise InvalidInput("DST", "a directory, since SRC is one", target.path)
        place = path / source.name if path.is_dir() else path
        top = source.joined("")
        size = sum(entry.size for entry in box.list(top, recursive=True) if entry.kind == "file")
        with _local("DST", target.path), moving(source.path, size) as on_bytes:
            left_out = box.download_directory(top, place, on_bytes)
        _say_left_out(left_out)
        return
    size_of_file = None if info is None else info.size
    if target.path == _STREAM:
        _pour(box, source, size_of_file, sys.stdout.fileno())
        return
    place = path / source.name if path.is_dir() else path
    if not place.parent.is_dir() or (target.path.endswith("/") and not path.is_dir()):
        raise InvalidInput("DST", "a path in a directory that is there", target.path)
    if place.exists() and not place.is_file():  # a device or a pipe is written to, and not replaced by a file
        with _local("DST", target.path), place.open("wb") as device:
            _pour(box, source, size_of_file, device.fileno())
        return
    with _local("DST", target.path), moving(source.path, size_of_file) as on_bytes:
        _download(box, source, place, on_bytes)


def _found(box: BlockingBox, source: Side) -> FileInfo | None:
    """What is there, or None where the provider cannot tell. Raises `InvalidInput` where nothing is."""
    try:
        return box.stat(source.joined(""))
    except FileNotFoundError as exc:
        raise InvalidInput("SRC", "a file or directory in the sandbox", source.path) from exc
    except NotSupported:
        return None


def _pour(box: BlockingBox, source: Side, size: int | None, descriptor: int) -> None:
    """Writes a file to what can be written only once, after all of it has come."""
    with tempfile.TemporaryDirectory(prefix="sandstorm-") as directory:
        whole = Path(directory) / "file"
        with moving(source.path, size) as on_bytes:
            _download(box, source, whole, on_bytes)
        with whole.open("rb") as file, os.fdopen(os.dup(descriptor), "wb") as output:
            shutil.copyfileobj(file, output, 1024 * 1024)


def _download(box: BlockingBox, source: Side, place: Path, on_bytes: Callable[[int], None] | None) -> None:
    try:
        box.download_to(source.joined(""), place, on_bytes)
    except FileNotFoundError as exc:
        raise InvalidInput("SRC", "a file in the sandbox", source.path) from exc


def _say_left_out(entries: Sequence[FileInfo]) -> None:
    for entry in entries[:_NAMED]:
        click.echo(f"sandstorm: left out: {one_line(entry.path)} ({entry.kind})", err=True)
    if len(entries) > _NAMED:
        click.echo(f"sandstorm: left out: {len(entries) - _NAMED} more", err=True)


@contextmanager
def _local(field: str, path: str) -> Iterator[None]:
    """Says of an error of this machine's files that it is the caller's, and where."""
    try:
        yield
    except OSError as exc:
        raise InvalidInput(field, f"a path that can be used here ({exc.strerror or exc})", path) from exc
