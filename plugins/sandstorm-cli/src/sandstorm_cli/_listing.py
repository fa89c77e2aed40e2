"""`sandstorm sandbox ls`: the files of a sandbox."""

from __future__ import annotations

import posixpath
import stat
from typing import TYPE_CHECKING

import click

from sandstorm import InvalidInput, Sandstorm, encode
from sandstorm_cli._escape import one_line
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._ids import SandboxId, opened
from sandstorm_cli._show import when
from sandstorm_cli._terminal import emit_json, emit_table

if TYPE_CHECKING:
    from sandstorm import BlockingBox
    from sandstorm.provider import FileInfo

_TYPES = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK}


@click.command()
@click.argument("place", metavar="ID[:PATH]", type=SandboxId())
@click.option("-l", "long", is_flag=True, help="With permissions, size in bytes and time.")
@click.option("-R", "recursive", is_flag=True, help="With all that is in its directories.")
@settings_option
@json_option
def ls(place: str, long: bool, recursive: bool, settings: str | None, as_json: bool) -> None:
    """List the work area of a sandbox, or what is at PATH in it. Directories end with a slash."""
    name, _, path = place.partition(":")
    with Sandstorm(settings=settings) as client, opened(client, name) as box:
        try:
            top, entries = _entries(box, path or ".", recursive=recursive)
        except FileNotFoundError as exc:
            raise InvalidInput("PATH", "a file or directory in the sandbox", path) from exc
    if as_json:
        emit_json([encode(entry) for entry in entries])
    elif long:
        if entries:
            emit_table(("MODE", "SIZE", "MODIFIED", "NAME"), [_row(entry, top) for entry in entries])
    else:
        for entry in entries:
            click.echo(one_line(_name(entry, top)))


def _entries(box: BlockingBox, path: str, *, recursive: bool) -> tuple[str, list[FileInfo]]:
    """What is in a directory, with the directory; or a file alone, with the directory that it is in."""
    if path != ".":
        info = box.stat(path)
        if info.kind != "directory":
            return posixpath.dirname(info.path) or ".", [info]
    return path, sorted(box.list(path, recursive=recursive), key=lambda entry: entry.path)


def _name(entry: FileInfo, top: str) -> str:
    return posixpath.relpath(entry.path, top) + ("/" if entry.kind == "directory" else "")


def _row(entry: FileInfo, top: str) -> tuple[str, ...]:
    mode = stat.filemode(_TYPES.get(entry.kind, 0) | entry.mode)
    return mode, str(entry.size), when(entry.modified), _name(entry, top)
