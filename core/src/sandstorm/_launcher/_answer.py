"""Reads what the launcher's script answers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import attrs

from sandstorm._result import Exit

STATES = ("absent", "unstaged", "locked", "started", "done", "lost", "burned")


class CutAnswerError(Exception):
    """An answer that is not whole: the exec lost some of it. Asking again is harmless."""


@attrs.frozen(kw_only=True)
class ImageTools:
    """What the image lets the launcher do.

    Attributes:
        file: Where the script is kept in the sandbox.
        hash: `sha256` or `cksum`, with which a payload is checked.
        encoding: `base64` or `od`, in which output travels.
        tree: `full` where daemons are found by their environment, `descendants` where there is no /proc.
        session: `own` where programs get a session of their own, else `shared`.
        naps: `short` where `sleep` takes fractions of a second, else `long`.
        missing: The tools without which it cannot work; empty where it can.
    """

    file: str
    hash: str
    encoding: str
    tree: str
    session: str
    naps: str
    missing: str


@attrs.frozen(kw_only=True)
class StartState:
    """How far a start has come.

    Attributes:
        state: `absent` (nobody has asked), `unstaged` (its payload is not whole), `locked` (being decided), `started`,
            `done`, `lost` (its supervisor died without a status) or `burned` (it never started and never will).
        digest: Which payload was started, by which name it was burned, or `-`.
        output_limit: Bytes of both streams together; 0 where it has not started.
        next_input: The number of the next piece of input; 0 where it takes none.
        code: The status as the shell has it, or None before the end.
        why: `exited`, `killed`, `deadline`, `output-limit` or `disk-limit`.
        totals: Bytes that each stream had at the end.
    """

    state: str
    digest: str = "-"
    output_limit: int = 0
    next_input: int = 0
    code: int | None = None
    why: str = "exited"
    totals: Mapping[str, int] = attrs.field(factory=dict)

    def exit(self) -> Exit:
        """How the program ended. A shell cannot tell exit code 128 + n from signal n; it is taken for the signal."""
        code = self.code or 0
        if self.why == "killed":
            return Exit(kind="signal", signal=9)
        if self.why != "exited":
            return Exit(kind=self.why)
        return Exit(kind="signal", signal=code - 128) if 128 < code <= 192 else Exit(code=code)


@attrs.frozen
class Answer:
    """A state, and a piece of each stream that was asked for."""

    state: StartState
    pieces: Mapping[str, bytes]


def body(stdout: bytes) -> list[str]:
    """The lines of the answer, without what a login shell wrote around it. Raises `CutAnswerError`."""
    lines = stdout.decode(errors="replace").replace("\r", "").split("\n")
    try:
        first = len(lines) - 1 - lines[::-1].index("sandstorm-launcher")
        return lines[first + 1 : lines.index("end", first)]
    except ValueError:
        raise CutAnswerError from None


def read_image(lines: list[str]) -> ImageTools:
    """The answer to `install`."""
    fields = dict(line.partition(" ")[::2] for line in lines)
    try:
        return ImageTools(**fields)
    except TypeError:
        raise CutAnswerError from None


def read_answer(lines: list[str], encoding: str) -> Answer:
    """The answer to every other verb."""
    try:
        _, state, digest, limit, following, code, why, out, err = lines[0].split(" ")
        ended = state == "done"
        found = StartState(
            state=state,
            digest=digest,
            output_limit=int(limit),
            next_input=int(following),
            code=int(code) if ended else None,
            why=why if ended else "exited",
            totals={"stdout": int(out), "stderr": int(err)} if ended else {},
        )
        return Answer(found, _pieces(lines[1:], encoding))
    except (ValueError, IndexError):
        raise CutAnswerError from None


def _pieces(lines: list[str], encoding: str) -> dict[str, bytes]:
    pieces: dict[str, bytes] = {}
    while lines:
        name, _, size = lines.pop(0).split(" ")
        text: list[str] = []
        while lines and not lines[0].startswith(("stdout ", "stderr ")):
            text.append(lines.pop(0))
        if len("\n".join(text)) != int(size):
            raise CutAnswerError
        pieces[name] = _decode("".join(text), encoding)
    return pieces


def _decode(text: str, encoding: str) -> bytes:
    if encoding == "od":
        return bytes.fromhex(text)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise CutAnswerError from None
