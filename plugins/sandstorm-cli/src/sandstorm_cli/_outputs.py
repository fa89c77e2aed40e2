"""Writes fetched outputs beneath one directory, and never outside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sandstorm import InvalidInput


def check_directory(path: str) -> Path:
    """The directory for outputs, resolved. Raises `InvalidInput` unless it is one that can be written."""
    directory = Path(path).resolve()
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise InvalidInput("output_dir", "a directory that can be written", path)
    return directory


def write_outputs(outputs: Mapping[str, bytes], directory: Path) -> None:
    """Writes each output to its path beneath `directory`; a link that leads out of it is refused with `InvalidInput`."""
    for path, data in outputs.items():
        target = directory / path
        parent = target.parent.resolve()
        if ".." in Path(path).parts or not parent.is_relative_to(directory) or not target.name:
            raise InvalidInput("outputs", f"a path that stays in {directory}", path)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _replace(parent / target.name, data)
        except OSError as exc:
            raise InvalidInput("outputs", f"a path that can be written ({exc.strerror})", path) from exc


def _replace(target: Path, data: bytes) -> None:
    """Writes beside the target and renames, so that a link in its place is replaced and not followed."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".sandstorm-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink()
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
