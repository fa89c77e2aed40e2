"""How a sandbox uses an image's root file system in place of the host's, and runs the host's Python in it all the same."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import attrs

from sandstorm.provider import ProviderDown

HOST = "/run/sandstorm/host"
"""Where a sandbox has the host's programs beside those of an image."""
_OURS = frozenset({"proc", "dev", "tmp", "work", "run", "sys"})
"""What every sandbox makes for itself; an image's own are left out."""
_INTERPRETER = 3
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)


@attrs.frozen(kw_only=True)
class HostPython:
    """The host's Python as a sandbox with another root runs it: through the host's own loader, with its own libraries.

    Attributes:
        argv: What the interpreter's own arguments follow.
        binds: Host directories and where they have to appear inside, read-only.
    """

    argv: tuple[str, ...]
    binds: tuple[tuple[str, str], ...]


def system_arguments(root: Path) -> tuple[str, ...]:
    """Bubblewrap's arguments that put an unpacked image in the place of the host's system, read-only: for `Confinement.system`.

    A link at the top stays a link, since bubblewrap would follow it on the host.
    """
    arguments: list[str] = []
    for entry in sorted(root.iterdir()):
        mode = entry.lstat().st_mode
        if entry.name in _OURS:
            continue
        if stat.S_ISLNK(mode):
            arguments += ["--symlink", str(entry.readlink()), f"/{entry.name}"]
        elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            arguments += ["--ro-bind", str(entry), f"/{entry.name}"]
    return tuple(arguments)


@cache
def host_python(python: str, extra: Sequence[str] = ()) -> HostPython:
    """How to run the host's `python` in another root; `extra` are directories outside of `/usr` that sandboxes see.

    Raises `ProviderDown` where its loader or libraries lie elsewhere.
    """
    program = Path(python).resolve()
    loader = _loader(program)
    command = [str(loader), "--list", str(program)]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603 - our own arguments
    except (OSError, subprocess.SubprocessError) as exc:
        raise ProviderDown(f"the libraries of {program} cannot be listed: {exc}") from exc
    places = dict.fromkeys(str(Path(found).resolve().parent) for found in (*_LIBRARY.findall(listed), str(loader)))
    shown = ("/usr", *extra)
    for place in (*places, str(program)):
        if not any(Path(place).is_relative_to(top) for top in shown):
            raise ProviderDown(f"{place}, which {program} needs, is outside of what sandboxes see ({', '.join(shown)})")
    libraries = ":".join(f"{HOST}{place}" for place in places)
    return HostPython(
        argv=(f"{HOST}{loader.resolve()}", "--library-path", libraries, f"{HOST}{program}"),
        binds=tuple((top, f"{HOST}{top}") for top in shown),
    )


def _loader(program: Path) -> Path:
    """The dynamic loader that a 64-bit ELF program names in its header (`elf(5)`, PT_INTERP)."""
    with program.open("rb") as file:
        header = file.read(64)
        start, size, count = (int.from_bytes(header[low:high], "little") for low, high in ((32, 40), (54, 56), (56, 58)))
        if header[:6] != b"\x7fELF\x02\x01":
            raise ProviderDown(f"{program} is no 64-bit program")
        for number in range(count):
            file.seek(start + number * size)
            entry = file.read(56)
            if int.from_bytes(entry[:4], "little") == _INTERPRETER:
                file.seek(int.from_bytes(entry[8:16], "little"))
                return Path(os.fsdecode(file.read(int.from_bytes(entry[32:40], "little")).rstrip(b"\0")))
    raise ProviderDown(f"{program} names no loader")
