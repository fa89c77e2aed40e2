"""What the launcher is to start, as bytes that a POSIX shell reads back exactly."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from typing import TYPE_CHECKING

import attrs

from sandstorm._errors import InvalidInput

if TYPE_CHECKING:
    from sandstorm.provider import Command

_EXPORTABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAKEN = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "OPTIND", "PPID", "SHELLOPTS", "UID", "SANDSTORM_START"})
"""Names that some shell does not let be set, and our own."""


@attrs.frozen(kw_only=True)
class Payload:
    """A staged start.

    Attributes:
        data: A head of shell text (it may hold secrets), and stdin after it.
        head: Bytes of the head.
        input: `none`, `given` (all of stdin is here) or `open` (more may come).
    """

    data: bytes = attrs.field(repr=False)
    head: int
    input: str


def payload(command: Command, workdir: str) -> Payload:
    """The payload of a command. Raises `InvalidInput` for what no POSIX shell could pass on."""
    source = "open" if command.interactive else "given" if command.stdin else "none"
    # The limits are part of the text, so that the same id with other limits is another payload.
    lines = [b"# %r %d %s" % (command.timeout, command.output_limit, source.encode())]
    lines.append(b"enter " + _quoted("cwd", _directory(workdir, command.cwd)))
    for name, value in command.env.items():
        if not _EXPORTABLE.fullmatch(name) or name in _TAKEN:
            raise InvalidInput("env", "names that a shell can export", name)
        lines.append(b"export " + name.encode() + b"=" + _quoted(f"env.{name}", value))
    lines.append(b"become " + b" ".join(_quoted("argv", word) for word in command.argv))
    head = b"\n".join(lines) + b"\n"
    return Payload(data=head + command.stdin, head=len(head), input=source)


def digest(data: bytes, tool: str) -> str:
    """What `sha256sum` or `cksum` print for these bytes."""
    return hashlib.sha256(data).hexdigest() if tool == "sha256" else str(_cksum(data))


def _directory(workdir: str, cwd: str | None) -> str:
    path = os.path.join(workdir, cwd or "")  # noqa: PTH118 - a path of the sandbox
    return path if path.startswith("/") else f"./{path}"


def _quoted(field: str, word: str) -> bytes:
    if "\0" in word:
        raise InvalidInput(field, "text without NUL", word)
    return b"'" + os.fsencode(word).replace(b"'", b"'\\''") + b"'"


@cache
def _table() -> tuple[int, ...]:
    rows = []
    for index in range(256):
        value = index << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        rows.append(value & 0xFFFFFFFF)
    return tuple(rows)


def _cksum(data: bytes) -> int:
    """The CRC of POSIX `cksum` (IEEE Std 1003.1, `cksum`): the bytes, then their number, low byte first."""
    size = len(data)
    crc, table = 0, _table()
    for byte in data + size.to_bytes((size.bit_length() + 7) // 8, "little"):
        crc = ((crc << 8) & 0xFFFFFFFF) ^ table[(crc >> 24) ^ byte]
    return crc ^ 0xFFFFFFFF
