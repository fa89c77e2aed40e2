"""Messages between the router, the supervisor of a sandbox and the agent inside: one JSON object per packet, with open files.

All three use this module, the agent as the sandbox's own Python runs it (3.9 or later). It leaves out `json` and `socket`,
which take longer to import than all the rest of the agent.
"""
# ruff: noqa: SIM105 - contextlib takes longer to import than this may take to start

from __future__ import annotations

import os
from _json import encode_basestring_ascii, make_scanner
from _socket import MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_TRUNC, SCM_CREDENTIALS, SCM_RIGHTS, SOL_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Sequence
    from typing import Any

PACKET = 65536
"""Bytes of the largest packet; what is longer travels as a file in memory."""
MOST_FDS = 8
_LARGEST = 64 * 1024 * 1024
_SPILLED = "spilled"
_ANCILLARY = 256


def send(sock: socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Sends one message with copies of `fds`. Raises `BlockingIOError` where the socket is not blocking and full."""
    data = encode(message)
    if len(data) <= PACKET:
        _send(sock, data, fds)
        return
    spilled = in_memory(data)
    try:
        _send(sock, encode({_SPILLED: len(data)}), (spilled, *fds))
    finally:
        os.close(spilled)


def _send(sock: socket, data: bytes, fds: Sequence[int]) -> None:
    attached = [(SOL_SOCKET, SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))] if fds else []
    sock.sendmsg([data], attached)


def receive(sock: socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its open files, which are the caller's to close; None at the end.

    Raises `ValueError` where it is malformed, and `BlockingIOError` where there is none yet.
    """
    received = receive_from(sock, trusted=True)
    return None if received is None else received[:2]


def receive_from(sock: socket, *, trusted: bool) -> tuple[dict[str, Any], list[int], int] | None:
    """As `receive`, with the process id of the sender where the socket passes credentials, else 0."""
    data, ancillary, flags, _ = sock.recvmsg(PACKET, _ANCILLARY, MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    pid = 0
    for level, kind, attached in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fds += [int.from_bytes(attached[at : at + 4], "little") for at in range(0, len(attached) - 3, 4)]
        elif level == SOL_SOCKET and kind == SCM_CREDENTIALS:
            pid = int.from_bytes(attached[:4], "little")
    try:
        if flags & (MSG_TRUNC | MSG_CTRUNC) or len(fds) > MOST_FDS:
            raise ValueError("a message is too long")
        if not data:
            close_all(fds)
            return None
        message = decode(data)
        if trusted and _SPILLED in message:
            message = _spilled(fds)
        return message, fds, pid
    except BaseException:
        close_all(fds)
        raise


def _spilled(fds: list[int]) -> dict[str, Any]:
    if not fds:
        raise ValueError("a long message came without its file")
    fd = fds.pop(0)
    try:
        return decode(read_all(fd, _LARGEST))
    finally:
        os.close(fd)


def in_memory(data: bytes) -> int:
    """An open file in memory with `data`, at its beginning."""
    fd = os.memfd_create("sandstorm", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_all(fd: int, most: int) -> bytes:
    """All of a file, wherever it is positioned. Raises `ValueError` where it is longer than `most` bytes."""
    parts: list[bytes] = []
    length = 0
    while data := os.pread(fd, 1 << 20, length):
        parts.append(data)
        length += len(data)
        if length > most:
            raise ValueError("a file is too long")
    return b"".join(parts)


def close_all(fds: Sequence[int]) -> None:
    """Closes every one of them, if it is open."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


# --- JSON -----------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """The value as JSON, in ASCII. Raises `TypeError` and `ValueError` for what JSON has no word for."""
    return _text(value).encode("ascii")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):  # noqa: PLR0124 - this is what a NaN is
            raise ValueError("JSON has no infinity")
        return float.__repr__(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_basestring_ascii(key)}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    raise TypeError(f"no JSON for {type(value).__name__}")


class _Context:
    """What the interpreter's own scanner asks of `json.JSONDecoder`."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}  # noqa: RUF012 - never filled

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")


_scan = make_scanner(_Context())  # type: ignore[arg-type]


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object. Raises `ValueError` where it is none."""
    text = data.decode().strip()
    try:
        value, end = _scan(text, 0)
    except (StopIteration, RecursionError):
        raise ValueError("a message is not JSON") from None
    if end != len(text) or not isinstance(value, dict):
        raise ValueError("a message is not a JSON object")
    return value
