"""Files between this machine and a sandbox: single ones and whole directories, of any size."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from secrets import token_hex

import trio

from sandstorm._errors import InvalidInput, InvalidSpec
from sandstorm._files import FileInfo
from sandstorm._spec import refuse_escape
from sandstorm.provider import Files, Sandbox

CHUNK = 1024 * 1024
"""Bytes of a file that are in flight at once."""

OnBytes = Callable[[int], None]
"""Is told of each piece that was moved, in bytes."""


async def upload(sandbox: Sandbox, path: str, source: bytes | Path, on_bytes: OnBytes | None = None) -> None:
    """Writes a file in the work area from bytes or from a local file; parents are made. Raises `InvalidInput`."""
    refuse_escape("path", path)
    await sandbox.upload(path, _chunks(source, on_bytes))


async def download(sandbox: Sandbox, path: str) -> bytes:
    """The contents of a file in the work area. Raises `FileNotFoundError`."""
    refuse_escape("path", path)
    async with sandbox.download(path) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def download_to(sandbox: Sandbox, path: str, target: Path, on_bytes: OnBytes | None = None) -> int:
    """Writes a file of the work area to a local file, which appears once it is whole; its size in bytes."""
    refuse_escape("path", path)
    part = target.with_name(f".{target.name[:200]}.{token_hex(6)}.part")
    size = 0
    try:
        async with sandbox.download(path) as chunks, await trio.open_file(part, "wb") as file:
            async for chunk in chunks:
                size += await file.write(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))
        await trio.to_thread.run_sync(part.replace, target)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(partial(part.unlink, missing_ok=True))
    return size


async def upload_directory(sandbox: Sandbox, path: str, source: Path, on_bytes: OnBytes | None = None) -> int:
    """Writes a local directory with all that is in it; how many files that were.

    Raises `InvalidInput` for a link or anything else that is neither file nor directory, before anything is sent.
    """
    entries = await trio.to_thread.run_sync(_local_entries, source)
    if isinstance(sandbox, Files):
        for name, is_file in entries:
            if not is_file:
                await sandbox.make_directory(_joined(path, name))
    files = [name for name, is_file in entries if is_file]
    for name in files:
        await upload(sandbox, _joined(path, name), source / name, on_bytes)
    return len(files)


async def download_directory(
    sandbox: Sandbox, files: Files, path: str, target: Path, on_bytes: OnBytes | None = None
) -> list[FileInfo]:
    """Writes a directory of the work area to a local one; the entries that were left out, since they are no plain files.

    Names come from the sandbox: whatever they are, nothing is written outside of `target`.
    """
    left_out = []
    async with files.list(path, recursive=True) as entries:
        found = [entry async for entry in entries]
    await trio.to_thread.run_sync(partial(target.mkdir, parents=True, exist_ok=True))
    for entry in found:
        place = target / _below(path, entry.path)
        if entry.kind not in ("file", "directory") or await trio.to_thread.run_sync(_leads_out, place, target):
            left_out.append(entry)
        elif entry.kind == "directory":
            await trio.to_thread.run_sync(partial(place.mkdir, parents=True, exist_ok=True))
        else:
            await trio.to_thread.run_sync(partial(place.parent.mkdir, parents=True, exist_ok=True))
            await download_to(sandbox, entry.path, place, on_bytes)
    return left_out


async def _chunks(source: bytes | Path, on_bytes: OnBytes | None) -> AsyncIterator[bytes]:
    if isinstance(source, Path):
        try:
            file = await trio.open_file(source, "rb")
        except OSError as exc:
            raise InvalidInput("source", "a local file that can be read", str(source)) from exc
        async with file:
            while chunk := await file.read(CHUNK):
                yield chunk
                if on_bytes is not None:
                    on_bytes(len(chunk))
        return
    for start in range(0, len(source), CHUNK):
        yield source[start : start + CHUNK]


def _local_entries(source: Path) -> list[tuple[str, bool]]:
    """Names of directories and files below `source`, parents first; with each whether it is a file."""
    if not source.is_dir():
        raise InvalidInput("source", "a local directory", str(source))
    entries = []
    for place in sorted(source.rglob("*")):
        if place.is_symlink() or not (place.is_file() or place.is_dir()):
            raise InvalidInput("source", "files and directories only, and no links", str(place))
        entries.append((place.relative_to(source).as_posix(), place.is_file()))
    return entries


def _joined(path: str, name: str) -> str:
    return name if path in ("", ".") else f"{path.rstrip('/')}/{name}"


def _below(path: str, entry: str) -> str:
    """The entry's path relative to the directory that was listed. Raises `InvalidSpec` for one that is not in it."""
    top = [part for part in path.split("/") if part not in ("", ".")]
    parts = [part for part in entry.split("/") if part not in ("", ".")]
    if parts[: len(top)] != top or len(parts) <= len(top) or ".." in parts or "\0" in entry:
        raise InvalidSpec(f"the sandbox named an entry that is not in {path!r}: {entry!r}")
    return "/".join(parts[len(top) :])


def _leads_out(place: Path, target: Path) -> bool:
    """Whether a link in the local directory leads out of it."""
    return place.is_symlink() or not place.parent.resolve().is_relative_to(target.resolve())
