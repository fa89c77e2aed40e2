"""The toy language of the reference provider, interpreted line by line on the vendor's clock.

A program is a timeline: each line has the time at which it is due, so that nothing runs in the background and yet
everything happens when it should, whether anyone listens or not.
"""

from __future__ import annotations

import ast
import math
import posixpath
from collections.abc import Mapping

import trio

from sandstorm._errors import InvalidInput
from sandstorm._result import Exit
from sandstorm._spec import refuse_escape
from sandstorm.provider import Command, Output

CHUNK = 64 * 1024
"""Bytes that one `Output` or one chunk of a download holds at most."""

NEVER = math.inf


def file_path(cwd: str | None, path: str) -> str:
    """The key of a file in the work area. Raises `InvalidInput` where the path leaves it."""
    joined = posixpath.normpath(posixpath.join(cwd or "", path))
    refuse_escape("path", joined)
    return joined


def lines_of(command: Command, files: Mapping[str, bytes]) -> list[str]:
    """The program that a command means: the file that its second word names, else the words as one line."""
    if len(command.argv) > 1:
        try:
            code = files.get(file_path(command.cwd, command.argv[1]))
        except InvalidInput:
            code = None
        if code is not None:
            return code.decode(errors="surrogateescape").split("\n")
    return [" ".join(command.argv)]


class Program:
    """A started program: what it has written so far, and how it ended once it has.

    `due_at` is the vendor's time of its next step, `NEVER` once it has ended. `exit` is how it ended; `lost` is
    why it will have no exit.
    """

    __slots__ = (
        "_at",
        "_changed",
        "_deadline",
        "_files",
        "_lines",
        "_next_at",
        "_offsets",
        "_stdin",
        "_variables",
        "chunks",
        "command",
        "exit",
        "id",
        "lost",
    )

    def __init__(
        self, *, process_id: str, command: Command, started_at: float, files: dict[str, bytes], variables: Mapping[str, str]
    ) -> None:
        self.id = process_id
        self.command = command
        self.chunks: list[Output] = []
        self.exit: Exit | None = None
        self.lost: str | None = None
        self._files = files
        self._variables = variables
        self._lines = lines_of(command, files)
        self._at = 0
        self._next_at = started_at
        self._deadline = started_at + command.timeout
        self._stdin = command.stdin
        self._offsets = {"stdout": 0, "stderr": 0}
        self._changed: trio.Event | None = None

    @property
    def running(self) -> bool:
        """Whether it has neither ended nor been lost."""
        return self.exit is None and self.lost is None

    @property
    def due_at(self) -> float:
        """The vendor's time of its next step, in seconds; `NEVER` once it has ended."""
        return min(self._next_at, self._deadline) if self.running else NEVER

    @property
    def changed(self) -> trio.Event:
        """Set once it has ended or is lost."""
        if self._changed is None:
            self._changed = trio.Event()
            if not self.running:
                self._changed.set()
        return self._changed

    def step(self) -> None:
        """Does what is due next: one line, the end of the program, or its deadline."""
        if self._next_at >= self._deadline:
            self.end(Exit(kind="deadline", signal=9))
        elif self._at == len(self._lines):
            self.end(Exit(code=0))
        else:
            self._at += 1
            self._run(self._lines[self._at - 1])

    def end(self, how: Exit) -> None:
        """Ends it, unless it has ended."""
        if self.running:
            self.exit = how
            self._wake()

    def lose(self, reason: str) -> None:
        """Takes its sandbox away: there will be no exit."""
        if self.running:
            self.lost = reason
            self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    def _run(self, line: str) -> None:
        if not line.strip() or line.startswith("#"):
            return
        word, _, rest = line.partition(" ")
        match word:
            case "out":
                self._write("stdout", _encoded(rest + "\n"))
            case "err":
                self._write("stderr", _encoded(rest + "\n"))
            case "sleep":
                self._sleep(rest)
            case "cat":
                data, self._stdin = self._stdin, b""
                self._write("stdout", data)
            case "write":
                self._write_file(rest)
            case "read":
                self._read_file(rest)
            case "env":
                self._env(rest)
            case "exit":
                self._exit(rest)
            case "signal":
                self._signal(rest)
            case "hog":
                self.end(Exit(kind="out-of-memory", signal=9))
            case "flood":
                self._flood(rest)
            case _:
                self._print(line)

    def _write(self, stream: str, data: bytes) -> None:
        room = self.command.output_limit - sum(self._offsets.values())
        for start in range(0, min(len(data), room), CHUNK):
            chunk = data[start : min(start + CHUNK, room)]
            self.chunks.append(Output(stream, chunk, self._offsets[stream]))
            self._offsets[stream] += len(chunk)
        if len(data) > room:
            self.end(Exit(kind="output-limit", signal=9))

    def _fail(self, code: int, reason: str) -> None:
        self._write("stderr", _encoded(f"line {self._at}: {reason}\n"))
        self.end(Exit(code=code))

    def _print(self, line: str) -> None:
        text = _printed(line)
        if text is None:
            self._fail(127, f"unknown instruction {line.partition(' ')[0]!r}")
        else:
            self._write("stdout", _encoded(text + "\n"))

    def _sleep(self, rest: str) -> None:
        try:
            seconds = float(rest)
        except ValueError:
            seconds = -1.0
        if math.isfinite(seconds) and seconds >= 0:
            self._next_at += seconds
        else:
            self._fail(2, "sleep needs a number of seconds")

    def _write_file(self, rest: str) -> None:
        path, _, text = rest.partition(" ")
        try:
            self._files[file_path(self.command.cwd, path)] = _encoded(text)
        except InvalidInput as exc:
            self._fail(1, str(exc))

    def _read_file(self, rest: str) -> None:
        try:
            data = self._files.get(file_path(self.command.cwd, rest))
        except InvalidInput as exc:
            self._fail(1, str(exc))
            return
        if data is None:
            self._fail(1, f"no file {rest!r}")
        else:
            self._write("stdout", data)

    def _env(self, rest: str) -> None:
        value = self.command.env.get(rest, self._variables.get(rest))
        if value is None:
            self._fail(1, f"no variable {rest!r}")
        else:
            self._write("stdout", _encoded(value + "\n"))

    def _exit(self, rest: str) -> None:
        if (code := _whole(rest, 255)) is None:
            self._fail(2, "exit needs a number from 0 to 255")
        else:
            self.end(Exit(code=code))

    def _signal(self, rest: str) -> None:
        if not (number := _whole(rest, 64)):
            self._fail(2, "signal needs a number from 1 to 64")
        else:
            self.end(Exit(kind="signal", signal=number))

    def _flood(self, rest: str) -> None:
        if (count := _whole(rest, 2**63)) is None:
            self._fail(2, "flood needs a number of bytes")
        else:
            self._write("stdout", b"x" * min(count, self.command.output_limit + 1))


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _whole(text: str, highest: int) -> int | None:
    if text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= highest:
        return int(text)
    return None


def _printed(line: str) -> str | None:
    """What a Python `print` of literals would write, without the newline; None for any other line."""
    if not line.startswith("print("):
        return None
    try:
        call = ast.parse(line, mode="eval").body
        if isinstance(call, ast.Call) and not call.keywords:
            return " ".join(str(ast.literal_eval(argument)) for argument in call.args)
    except (SyntaxError, ValueError):
        pass
    return None
