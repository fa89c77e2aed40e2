"""The interpreter of a box: a kernel that starts with the first cell, and the cells that it runs one after the other.

The kernel is in the hands of the code in its cells: of what it sends, nothing is believed but that its own cell is over.
"""
# ruff: noqa: PTH103, PTH118, PTH119 - pathlib takes longer to import than this may take to start

from __future__ import annotations

import os
import stat
from _socket import AF_UNIX, SOCK_SEQPACKET, socket, socketpair

from sandstorm_provider_local._inside._wire import close_all, receive_from, send
from sandstorm_provider_local._supervisor._agent import Agent
from sandstorm_provider_local._supervisor._connection import Connection, Refused
from sandstorm_provider_local._supervisor._loop import Loop
from sandstorm_provider_local._supervisor._program import Program
from sandstorm_provider_local._supervisor._programs import Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST_ARTIFACTS = 100
_MOST_BYTES = 64 * 1024 * 1024
_MOST_TEXT = 200
_TURN = 64
_DEAF = 0.5
"""Seconds after which a kernel without its socket is killed."""
_PASSED_AS = "3"
"""The number under which the kernel finds its socket."""


class Interpreter:
    """Runs cells. Whatever ends the kernel ends its state; the next cell begins anew."""

    def __init__(self, loop: Loop, agent: Agent, programs: Programs, kernel: dict[str, Any] | None) -> None:
        self._loop = loop
        self._agent = agent
        self._programs = programs
        self._kernel = kernel
        self._made = 0
        self._name = ""
        self._link: socket | None = None
        self._waiting: list[_Cell] = []
        self._cell: _Cell | None = None

    def run(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> Program:
        """The program that is one cell. Raises `Refused` where this box has no kernel."""
        if self._kernel is None or message.get("language") != "python":
            raise Refused("NotSupported", f"there is no interpreter for {message.get('language')!r} in this box")
        known = self._programs.known(message.get("start_id"))
        if known is not None:
            return known
        timeout = float(message["timeout"])
        cell = _Cell(self._programs.new(connection, message, self), fds.pop(0), timeout)
        self._waiting.append(cell)
        self._advance()
        return cell.program

    # --- one cell after the other -------------------------------------------------------------------------

    def _advance(self) -> None:
        while self._cell is None and self._waiting:
            cell = self._cell = self._waiting.pop(0)
            pipes: list[int] = []
            try:
                if self._link is None:
                    self._begin()
                pipes = [cell.program.spool("stdout"), cell.program.spool("stderr")]
                assert self._link is not None
                send(self._link, {"op": "cell", "id": cell.program.id}, (cell.code, *pipes))
            except OSError:
                self._end_cell(None)
                continue
            finally:
                close_all((*pipes, cell.code))
            cell.program.begin(cell.timeout)

    def _begin(self) -> None:
        assert self._kernel is not None
        self._made += 1
        self._name = f"k{self._made}"
        link, inside = socketpair(AF_UNIX, SOCK_SEQPACKET)
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        argv = [*self._kernel["argv"], _PASSED_AS, *self._kernel["paths"]]
        order = {"argv": argv, "env": self._programs.env, "cwd": ""}
        try:
            self._agent.start(self._name, order, (nowhere, nowhere, nowhere, inside.fileno()), _Kernel(self, self._name))
        finally:
            os.close(nowhere)
            inside.close()
        link.setblocking(False)
        self._link = link
        self._loop.watch(link.fileno(), lambda _: self._receive())

    def _receive(self) -> None:
        for _ in range(_TURN):
            if self._link is None:
                return
            try:
                received = receive_from(self._link, trusted=False)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                continue
            if received is None:
                self._loop.forget(self._link.fileno())
                self._give_up(self._name)
                return
            message, fds, _pid = received
            try:
                self._heed(message, fds)
            finally:
                close_all(fds)

    def _give_up(self, name: str) -> None:
        # Without its socket a kernel can run no cell. Most often it just ends, of which its keeper tells at once.
        self._loop.after(_DEAF, lambda: self._agent.kill(name))

    def _heed(self, message: dict[str, Any], fds: list[int]) -> None:
        cell = self._cell
        if cell is None or message.get("id") != cell.program.id:
            return
        if message.get("event") == "artifact" and fds:
            cell.keep(message.get("mime"), message.get("name"), fds[0])
        elif message.get("event") == "done" and isinstance(message.get("code"), int):
            self._end_cell({"code": message["code"] & 255})

    def _end_cell(self, told: dict[str, int] | None) -> None:
        cell, self._cell = self._cell, None
        if cell is not None:
            cell.program.ended(told)
        self._loop.after(0.0, self._advance)

    # --- how it ends --------------------------------------------------------------------------------------

    def kill(self, name: str) -> list[int]:
        """Ends a cell: with the kernel where it runs in it, else before it does. The process ids on the host."""
        if self._cell is not None and self._cell.program.id == name:
            return self._agent.kill(self._name)
        for cell in self._waiting:
            if cell.program.id == name:
                self._waiting.remove(cell)
                os.close(cell.code)
                cell.program.ended(None)
                break
        return []

    def signal(self, name: str, number: int) -> None:
        """Sends a signal to the kernel while it runs this cell."""
        if self._cell is not None and self._cell.program.id == name:
            self._agent.signal(self._name, number)

    def end(self, reason: str) -> None:
        """Ends the kernel, and with the `reason` its cell."""
        if self._cell is not None:
            self._cell.program.kill(reason)
        self._agent.kill(self._name)

    def started(self, name: str) -> None:
        """The kernel runs, or was at least tried; a cell that was to be killed before can be now."""
        if name == self._name and self._cell is not None and self._cell.program.reason is not None:
            self._agent.kill(name)

    def lost(self, name: str, told: dict[str, int] | None) -> None:
        """A kernel has ended, and its cell with it."""
        if name == self._name and self._link is not None:
            self._receive()
            self._loop.forget(self._link.fileno())
            self._link.close()
            self._link = None
            self._end_cell(told)


class _Kernel:
    """Hears what becomes of one kernel process."""

    def __init__(self, interpreter: Interpreter, name: str) -> None:
        self._interpreter = interpreter
        self._name = name

    def started(self) -> None:
        self._interpreter.started(self._name)

    def terminal(self, fd: int) -> None:
        os.close(fd)

    def ended(self, told: dict[str, int] | None) -> None:
        self._interpreter.lost(self._name, told)

    def kill(self, reason: str) -> None:
        self._interpreter.end(reason)


class _Cell:
    """A cell: its code, its limits, and what it shows."""

    def __init__(self, program: Program, code: int, timeout: float) -> None:
        self.program = program
        self.code = code
        self.timeout = timeout
        self._left = _MOST_BYTES

    def keep(self, mime: object, name: object, fd: int) -> None:
        """Copies an artifact to the files of the program, where it is one."""
        artifacts = self.program.artifacts
        found = os.fstat(fd)
        if not (isinstance(mime, str) and isinstance(name, str) and stat.S_ISREG(found.st_mode)):
            return
        if len(artifacts) >= _MOST_ARTIFACTS or found.st_size > self._left or max(len(mime), len(name)) > _MOST_TEXT:
            return
        directory = os.path.join(self.program.directory, "artifacts")
        if not artifacts:
            os.makedirs(directory, 0o700)
        path = os.path.join(directory, str(len(artifacts)))
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        size = 0
        try:
            while size < found.st_size and (moved := os.sendfile(file, fd, size, found.st_size - size)):
                size += moved
        finally:
            os.close(file)
        self._left -= size
        artifacts.append({"mime": mime, "name": os.path.basename(name), "size": size})
