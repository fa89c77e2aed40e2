"""What a router may ask for."""

from __future__ import annotations

import os

from sandstorm_provider_local._supervisor._archive import Tar
from sandstorm_provider_local._supervisor._connection import Connection, Refused
from sandstorm_provider_local._supervisor._ports import LOOPBACK
from sandstorm_provider_local._supervisor._tree import cpu_seconds, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandstorm_provider_local._supervisor._box import Box

    Request = Callable[[Connection, dict[str, Any], list[int]], dict[str, Any] | None]

_PROGRAMS = ("start", "follow", "unfollow", "write", "close_stdin", "signal", "resize", "kill", "cell")
_BOX = ("hello", "look", "url", "pause", "resume", "archive", "restore", "extend", "touch", "usage", "destroy")
_WHILE_PAUSED = ("hello", "look", "follow", "unfollow", "resume", "kill", "destroy", "extend", "touch", "usage")
_NO_USE = ("look",)
"""What does not count as activity."""
_NOT_WHILE_ARCHIVING = ("start", "cell", "pause", "archive", "restore")


class Requests:
    """Answers requests: each method is one, named by its `op`. What they return is the answer; None where it comes later."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._known: dict[str, Request] = {name: getattr(self, f"_{name}") for name in (*_PROGRAMS, *_BOX)}
        self._archiving = False
        self._archives = 0
        self._postponed: list[tuple[Connection, dict[str, Any], list[int]]] = []

    def handle(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any] | None:
        """The answer to a request, or None where it comes later. Raises `Refused`."""
        name = message.get("op")
        request = self._known.get(name) if isinstance(name, str) else None
        if request is None:
            raise Refused("NotSupported", f"there is no request {name!r}")
        if self._box.paused and name not in _WHILE_PAUSED:
            raise Refused("Conflict", "the box is paused; resume it first")
        if name not in _NO_USE:
            self._box.touch()
        if self._archiving and name in _NOT_WHILE_ARCHIVING:
            self._postponed.append((connection, message, fds[:]))
            fds.clear()
            return None
        return request(connection, message, fds)

    def _hello(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        box = self._box

        def answer() -> None:
            told = {
                "marker": box.marker,
                "owner": box.sandbox.token,
                "record": box.record,
                "processes": [program.id for program in box.programs.running],
                "finished": box.programs.finished,
                "abilities": {"pause": box.group is not None and box.group.freezes},
                "agent_pid": box.agent.pid,
            }
            connection.answer(message["n"], told, (box.work,))

        box.when_ready(answer)

    def _look(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"paused": self._box.paused, "idle": self._box.idle}

    # --- programs -----------------------------------------------------------------------------------------

    def _start(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"process": self._box.programs.start(connection, message, fds).id}

    def _follow(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._box.programs.follow(connection, self._box.programs.get(message["process"]))
        return {}

    def _unfollow(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._box.programs.get(message["process"]).followers.discard(connection)
        return {}

    def _write(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        program = self._box.programs.get(message["process"])
        refused = Refused("Conflict", f"the input of {program.id} is closed, or was never open")
        if program.input is None or not program.input.open:
            raise refused

        def done(written: bool) -> None:
            if written:
                connection.answer(message["n"], {})
            else:
                connection.refuse(message["n"], refused)

        program.input.write(fds.pop(0), done)

    def _close_stdin(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        program = self._box.programs.get(message["process"])
        if program.input is not None and program.input.open:
            program.input.end()
        return {}

    def _signal(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        number = int(message["number"])
        if not 0 < number < 65:
            raise ValueError(f"{number} is no signal")
        self._box.programs.get(message["process"]).signal(number)
        return {}

    def _resize(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        program = self._box.programs.get(message["process"])
        if not program.wants_terminal or program.exit is not None:
            raise Refused("Conflict", f"{program.id} has no terminal")
        try:
            program.resize(int(message["columns"]), int(message["rows"]))
        except OverflowError as error:
            raise ValueError("the size of a terminal is two numbers below 65536") from error
        return {}

    def _kill(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        program = self._box.programs.get(message["process"])
        # What is frozen does not die: a kill ends the pause.
        self._box.resume()
        program.kill("killed", lambda: connection.answer(message["n"], {}))

    def _cell(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"process": self._box.interpreter.run(connection, message, fds).id}

    # --- its files ----------------------------------------------------------------------------------------

    def _archive(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        disk: int = self._box.sandbox.config["limits"]["disk"]
        self._with_tar(connection, message, fds, lambda tar, fd, env: tar.pack(fd, (2 * disk + 64) << 20, env))

    def _restore(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        self._with_tar(connection, message, fds, lambda tar, fd, env: tar.unpack(fd, env))

    def _with_tar(
        self,
        connection: Connection,
        message: dict[str, Any],
        fds: list[int],
        begin: Callable[[Tar, int, dict[str, str]], None],
    ) -> None:
        """Runs tar while everything else in the box is stopped, so that the files belong together."""
        box = self._box
        fd = fds.pop(0)
        self._archiving = True
        self._archives += 1

        def done(size: int, problem: str) -> None:
            self._archiving = False
            box.agent.continue_all()
            postponed, self._postponed = self._postponed, []
            for request in postponed:
                request[0].take(*request[1:])
            if problem:
                connection.refuse(message["n"], Refused("CapacityError", f"the files could not be moved: {problem}"))
            else:
                connection.answer(message["n"], {"size": size})

        tar = Tar(box.loop, box.agent, f"a{self._archives}", done)
        box.agent.stop_all(lambda: begin(tar, fd, box.programs.env))

    # --- the box ------------------------------------------------------------------------------------------

    def _url(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"address": LOOPBACK, "port": self._box.ports.open(int(message["port"]))}

    def _pause(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        group = self._box.group
        if group is None or not group.freezes:
            raise Refused("NotSupported", "this machine has no freezer for control groups")
        group.freeze()
        self._box.paused = True
        for program in self._box.programs.running:
            program.pause()
        return {}

    def _resume(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._box.resume()
        return {}

    def _extend(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._box.extend(float(message["lifetime"]))
        return {}

    def _touch(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {}

    def _usage(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        group = self._box.group
        # A group does not list those that have ended and still hold the time of their children.
        pids = tree(self._box.sandbox.pid)
        files = os.fstatvfs(self._box.work)
        return {
            "memory": group.memory_used if group is not None else 0,
            "cpu_seconds": cpu_seconds(pids),
            "disk": (files.f_blocks - files.f_bfree) * files.f_frsize,
            "pids": group.tasks if group is not None else len(pids),
        }

    def _destroy(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        self._box.end("destroyed", lambda: connection.answer(message["n"], {}))
