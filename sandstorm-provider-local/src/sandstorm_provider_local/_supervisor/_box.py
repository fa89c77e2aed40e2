"""A box: its life from the first hello to the last file."""
# ruff: noqa: PTH104, PTH108, PTH118, SIM105 - pathlib and contextlib take longer to import than this may take to start

from __future__ import annotations

import os
import select
import time
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_SEQPACKET, socket

from sandstorm_provider_local._inside._wire import encode
from sandstorm_provider_local._supervisor._agent import Agent
from sandstorm_provider_local._supervisor._cells import Interpreter
from sandstorm_provider_local._supervisor._connection import Connection
from sandstorm_provider_local._supervisor._loop import Loop
from sandstorm_provider_local._supervisor._ports import Ports
from sandstorm_provider_local._supervisor._programs import Programs, remove_tree
from sandstorm_provider_local._supervisor._requests import Requests
from sandstorm_provider_local._supervisor._tree import send_signal, tree
from sandstorm_provider_local._supervisor._watch import MemoryWatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from sandstorm_provider_local._supervisor._spawn import Sandbox

SIGKILL = 9
_COMING_UP = 30.0
"""Seconds that a sandbox gets to come up; it needs a fraction of one."""
_TAKING_DOWN = 5.0
_COMPLAINT = 2000


class Box:
    """One box and everything that belongs to it."""

    def __init__(self, sandbox: Sandbox) -> None:
        config = sandbox.config
        self.sandbox = sandbox
        self.marker: str = config["marker"]
        self.directory: str = config["directory"]
        self.group = sandbox.group
        self.record: dict[str, Any] = {**config["record"], "owner": sandbox.token, "pid": os.getpid()}
        self.loop = Loop()
        self.agent = Agent(self.loop, sandbox.control, self._came_up, self._lost)
        env = dict(config["env"])
        self.work = -1
        self.paused = False
        self._ready: list[Callable[[], None]] = []
        self._complaint = b""
        self._keep: bool = config["keep"]
        self._idle_timeout: float | None = config["idle_timeout"]
        self._active_at = time.monotonic()
        self._expiry: int | None = None
        self.extend(config["lifetime"])
        self._bwrap = os.pidfd_open(sandbox.pid)
        self.programs = Programs(
            self.loop, self.agent, os.path.join(self.directory, "out"), env, self._oom_kills, self._is_crowded, self.touch
        )
        self.interpreter = Interpreter(self.loop, self.agent, self.programs, config["kernel"])
        self.ports = Ports(self.loop, self.agent, self.touch)
        self._requests = Requests(self)
        self._listener = self._listen()
        self._connections = [self._connect(sandbox.leash)]
        self._leash = self._connections[0]
        self.loop.watch(sandbox.complaints, lambda _: self._hear())
        self.loop.watch(self._bwrap, lambda _: self._lost())
        self._coming_up = self.loop.after(_COMING_UP, self._lost)
        self.agent.on_start = MemoryWatch(self).begin

    def run(self) -> NoReturn:
        """Serves until the box has ended, and the process with it."""
        try:
            self.loop.run(self.programs.tell)
        except Exception as error:
            self._complaint = f"the supervisor failed: {type(error).__name__}: {error}".encode()
            self.end("lost")

    # --- its beginning ------------------------------------------------------------------------------------

    def _write(self, record: dict[str, Any]) -> None:
        path = os.path.join(self.directory, "record.json")
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, encode(record))
        finally:
            os.close(fd)
        os.rename(path + ".new", path)

    def _listen(self) -> socket:
        listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK)
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The address of a socket has at most 107 bytes, and the directory may have a longer path.
            listener.bind(f"/proc/self/fd/{directory}/sock")
        finally:
            os.close(directory)
        listener.listen(64)
        self.loop.watch(listener.fileno(), lambda _: self._accept())
        return listener

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - the accept of a bare socket
        except OSError:
            return
        os.set_inheritable(fd, False)
        self._connections.append(self._connect(socket(fileno=fd)))

    def _connect(self, sock: socket) -> Connection:
        return Connection(self.loop, sock, self._requests.handle, self._disconnected)

    def _came_up(self, work: int) -> None:
        self.work = work
        self.loop.cancel(self._coming_up)
        ready, self._ready = self._ready, []
        for call in ready:
            call()
        if self._idle_timeout is not None:
            self._look_for_idleness()

    def when_ready(self, call: Callable[[], None]) -> None:
        """Calls `call` once the sandbox has come up."""
        if self.work >= 0:
            call()
        else:
            self._ready.append(call)

    def _hear(self) -> None:
        try:
            data = os.read(self.sandbox.complaints, _COMPLAINT)
        except BlockingIOError:
            return
        if not data:
            self.loop.forget(self.sandbox.complaints)
        self._complaint = (self._complaint + data)[-_COMPLAINT:]

    # --- its life -----------------------------------------------------------------------------------------

    def _oom_kills(self) -> int:
        return self.group.oom_kills if self.group is not None else 0

    def _is_crowded(self) -> bool:
        """Whether the programs, those that are being taken down included, have more memory than the box."""
        return self.group is not None and self.group.programs_memory > self.sandbox.config["limits"]["memory"] << 20

    def extend(self, lifetime: float) -> None:
        """Lets it live for so many seconds from now. Raises `OSError`, with nothing changed, where it cannot be recorded."""
        record = {**self.record, "expires_at": time.time() + lifetime}
        self._write(record)
        self.record = record
        self.loop.cancel(self._expiry)
        self._expiry = self.loop.after(lifetime, lambda: self.end("lifetime"))

    def touch(self) -> None:
        """It is in use."""
        self._active_at = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since it was last in use; a program that runs, a connection to a port and a pause are uses."""
        if self.paused or self.programs.running or self.ports.connections:
            return 0.0
        return time.monotonic() - self._active_at

    def resume(self) -> None:
        """Ends a pause, if there is one; the clocks of programs go on."""
        if self.paused and self.group is not None:
            self.group.thaw()
            self.paused = False
            for program in self.programs.running:
                program.resume()

    def _look_for_idleness(self) -> None:
        left = (self._idle_timeout or 0.0) - self.idle
        if left <= 0:
            self.end("idle")
        self.loop.after(left + 0.001, self._look_for_idleness)

    def _disconnected(self, connection: Connection) -> None:
        self._connections.remove(connection)
        if connection is self._leash and not self._keep:
            self.end("leash")
        self.programs.leave(connection)

    # --- its end ------------------------------------------------------------------------------------------

    def _lost(self) -> None:
        """Bubblewrap or the agent has ended, which was not asked for."""
        self._hear()
        self.end("lost")

    def end(self, reason: str, then: Callable[[], None] | None = None) -> NoReturn:
        """Takes everything down, tells everybody and leaves."""
        try:
            os.unlink(os.path.join(self.directory, "sock"))
        except OSError:
            pass
        self._take_down()
        try:
            remove_tree(self.directory)
        except OSError:
            pass  # the next session of any router removes it
        if then is not None:
            then()
        said = self._complaint.decode(errors="replace").strip()
        if reason == "lost" and self.work < 0:
            last = {"event": "failed", "error": f"the sandbox did not come up: {said or 'no word of why'}"}
        else:
            last = {"event": "ended", "reason": reason, "message": said}
        for connection in self._connections:
            connection.farewell(last)
        os._exit(0)

    def _take_down(self) -> None:
        until = time.monotonic() + _TAKING_DOWN
        if self.paused and self.group is not None:
            self.group.thaw()
        while True:
            if self.agent.pid:
                send_signal(self.agent.pid, SIGKILL)
            else:
                for pid in tree(self.sandbox.pid):
                    send_signal(pid, SIGKILL)
            # Bubblewrap ends with its first process, which ends after all others of its namespace.
            poll = select.poll()
            poll.register(self._bwrap, select.POLLIN)
            if poll.poll(50) or time.monotonic() > until:
                break
        send_signal(self.sandbox.pid, SIGKILL)
        try:
            os.waitpid(self.sandbox.pid, 0)
        except ChildProcessError:
            pass
        if self.group is not None:
            while not self.group.empty and time.monotonic() < until:
                self.group.kill()
                time.sleep(0.001)
            self.group.close()
