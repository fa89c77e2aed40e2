"""The programs of a box: who follows them, and how long what they wrote is kept."""
# ruff: noqa: PTH102, PTH106, PTH108, PTH112, PTH118 - pathlib takes longer to import than this may take to start

from __future__ import annotations

import os

from sandstorm_provider_local._supervisor._agent import Agent
from sandstorm_provider_local._supervisor._connection import Connection, Refused
from sandstorm_provider_local._supervisor._input import Input
from sandstorm_provider_local._supervisor._loop import Loop
from sandstorm_provider_local._supervisor._program import Program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandstorm_provider_local._supervisor._program import Control

_MOST_KEPT = 1000
_MOST_BYTES = 256 * 1024 * 1024


class Programs:
    """Starts programs, tells their followers, and forgets the oldest of those that have ended; `ended` is called for each."""

    def __init__(
        self,
        loop: Loop,
        agent: Agent,
        directory: str,
        env: dict[str, str],
        oom_kills: Callable[[], int],
        is_crowded: Callable[[], bool],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._agent = agent
        self._directory = directory
        self.env = env
        self._oom_kills = oom_kills
        self._is_crowded = is_crowded
        self._ended = ended
        self._by_id: dict[str, Program] = {}
        self._by_start: dict[str, str] = {}
        self._finished: dict[str, int] = {}
        self._changed: dict[str, None] = {}
        self._made = 0
        os.mkdir(directory, 0o700)

    # --- finding ------------------------------------------------------------------------------------------

    def get(self, name: object) -> Program:
        """The program with this id. Raises `Refused`."""
        program = self._by_id.get(name) if isinstance(name, str) else None
        if program is None:
            raise Refused("FileNotFound", f"there is no program {name!r} in this box, or its output was dropped")
        return program

    @property
    def running(self) -> list[Program]:
        """Those that have not ended."""
        return [program for program in self._by_id.values() if program.exit is None]

    @property
    def finished(self) -> list[str]:
        """The ids of those that have ended, oldest first."""
        return list(self._finished)

    def known(self, start_id: object) -> Program | None:
        """The program that an earlier request with this name has started."""
        return self._by_id.get(self._by_start.get(str(start_id), "")) if start_id else None

    # --- starting -----------------------------------------------------------------------------------------

    def new(self, connection: Connection, message: dict[str, Any], control: Control) -> Program:
        """A program that is not started yet, with the limits and the owner that the request names."""
        limit = int(message["output_limit"])
        self._made += 1
        name = f"p{self._made}"
        program = Program(
            self._loop, name, os.path.join(self._directory, name), control, self._oom_kills, self._is_crowded, self._note
        )
        program.allow(limit)
        program.owner = None if message.get("detached") else connection
        self._by_id[name] = program
        if message.get("start_id"):
            self._by_start[str(message["start_id"])] = name
        return program

    def start(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> Program:
        """Starts what the request describes, once for each start id."""
        known = self.known(message.get("start_id"))
        if known is not None:
            return known
        order: dict[str, Any] = {
            "argv": _words(message["argv"]),
            "env": {**self.env, **_environment(message)},
            "cwd": str(message.get("cwd") or ""),
        }
        timeout = float(message["timeout"])
        program = self.new(connection, message, self._agent)
        given: list[int] = []
        try:
            if message.get("terminal"):
                columns, rows = message["terminal"]
                order |= {"terminal": [int(columns), int(rows)]}
                order["env"].setdefault("TERM", "xterm-256color")
                program.wants_terminal = True
                program.input = Input(self._loop)
                if fds:
                    program.input.write(fds.pop(0), lambda _: None)
            else:
                given.append(self._stdin(program, fds, interactive=bool(message.get("interactive"))))
                given += [program.spool("stdout"), program.spool("stderr")]
            self._agent.start(program.id, order, given, program)
        except BaseException:
            program.ended(None)
            self._forget(program.id)
            raise
        finally:
            for fd in given:
                os.close(fd)
        program.begin(timeout)
        return program

    def _stdin(self, program: Program, fds: list[int], *, interactive: bool) -> int:
        if not interactive:
            return fds.pop(0) if fds else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        program.input = Input(self._loop, writing)
        if fds:
            program.input.write(fds.pop(0), lambda _: None)
        return reading

    # --- telling ------------------------------------------------------------------------------------------

    def follow(self, connection: Connection, program: Program) -> None:
        """Tells a router what the program has written, and all that comes."""
        program.followers.add(connection)
        self._note(program)

    def _note(self, program: Program) -> None:
        self._changed[program.id] = None

    def tell(self) -> None:
        """Tells the followers of what has changed; a router that does not read is told the sum of it later."""
        for name in list(self._changed):
            program = self._by_id.get(name)
            if program is None:
                del self._changed[name]
                continue
            if program.exit is None and any(follower.busy for follower in program.followers):
                continue
            del self._changed[name]
            event = program.events()
            for follower in program.followers:
                follower.tell(event)
            if program.exit is not None:
                program.followers = set()
                if name not in self._finished:
                    self._ended()
                    self._finished[name] = program.size
                    self._forget_oldest()

    def leave(self, connection: Connection) -> None:
        """Ends the programs that were started over a connection, which has closed."""
        for program in self._by_id.values():
            program.followers.discard(connection)
            if program.owner is connection:
                program.owner = None
                if program.exit is None:
                    program.kill("killed")

    def _forget_oldest(self) -> None:
        while len(self._finished) > 1 and (len(self._finished) > _MOST_KEPT or sum(self._finished.values()) > _MOST_BYTES):
            self._forget(next(iter(self._finished)))

    def _forget(self, name: str) -> None:
        self._finished.pop(name, None)
        directory = self._by_id.pop(name).directory
        if os.path.isdir(directory):  # what wrote nothing has none
            remove_tree(directory)
        self._by_start = {start: known for start, known in self._by_start.items() if known != name}


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and "\0" not in word for word in value):
        raise ValueError("argv has to be a list of texts without NUL")
    return value


def _environment(message: dict[str, Any]) -> dict[str, str]:
    env = message.get("env") or {}
    if not all(isinstance(value, str) and "\0" not in key + value and key and "=" not in key for key, value in env.items()):
        raise ValueError("env has to be a table of texts without NUL")
    return dict(env)


def remove_tree(top: str) -> None:
    """Removes a directory of this box with all that is in it."""
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(top)
