"""The supervisor's side of the agent: what runs inside, and what becomes of it.

The agent has the user id of untrusted code. It is believed what concerns its own box only, and nothing that it sends can
take more than a packet and the files with it.
"""
# ruff: noqa: SIM105 - contextlib takes longer to import than this may take to start

from __future__ import annotations

import os

from sandstorm_provider_local._inside._wire import close_all, receive_from, send
from sandstorm_provider_local._supervisor._loop import READ, Loop
from sandstorm_provider_local._supervisor._tree import children, kill_tree, session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    class Started(Protocol):
        """Who started a program and hears how it goes."""

        def started(self) -> None:
            """It runs, or was at least tried."""

        def terminal(self, fd: int) -> None:
            """The outer end of its terminal, which is the receiver's now."""

        def kill(self, reason: str) -> None:
            """It has to end, with all that descends from it."""

        def ended(self, told: dict[str, int] | None) -> None:
            """It ended with a `code` or by a `signal`, or nobody knows how. Called once."""


_OOM_FIRST = b"1000"


class Keeper:
    """One program with the process inside that looks after it."""

    def __init__(self, owner: Started) -> None:
        self.owner = owner
        self.pid = 0
        """The process id of the keeper on the host, once it has begun."""
        self.pidfd = -1
        self.program = 0
        """The process id of the program inside, once it has been executed."""
        self.early: dict[int, None] = {}
        """Signals that came before that."""
        self.ended = False


class Agent:
    """Sends orders to the agent, and hands out what comes back."""

    def __init__(self, loop: Loop, control: socket, ready: Callable[[int], None], lost: Callable[[], None]) -> None:
        self._loop = loop
        self._control = control
        self._ready = ready
        self._lost = lost
        self.pid = 0
        """Its process id on the host, once it has said hello."""
        self.keepers: dict[str, Keeper] = {}
        self.on_start: Callable[[], None] = lambda: None
        self._sockets: dict[int, Callable[[int], None]] = {}
        self._asked = 0
        self._stopped: Callable[[], None] | None = None
        loop.watch(control.fileno(), self._receive)

    def start(self, name: str, order: dict[str, Any], fds: Sequence[int], owner: Started) -> None:
        """Starts a program that `owner` hears of. Raises `OSError` where the agent takes no more orders."""
        send(self._control, {"op": "start", "id": name, **order}, fds)
        self.keepers[name] = Keeper(owner)
        self.on_start()

    def signal(self, name: str, number: int) -> None:
        """Sends a signal to a program, as soon as it has been executed; harmless where it has ended."""
        keeper = self.keepers.get(name)
        if keeper is None or keeper.ended:
            return
        if keeper.program:
            send(self._control, {"op": "signal", "pid": keeper.program, "number": number})
        else:
            keeper.early[number] = None

    def new_socket(self, use: Callable[[int], None]) -> None:
        """Calls `use` with a TCP socket of the sandbox's network."""
        self._asked += 1
        self._sockets[self._asked] = use
        send(self._control, {"op": "socket", "id": self._asked})

    def stop_all(self, then: Callable[[], None]) -> None:
        """Stops every program, and calls `then`."""
        self._stopped = then
        send(self._control, {"op": "stop_all"})

    def continue_all(self) -> None:
        """Lets them go on."""
        send(self._control, {"op": "continue_all"})

    def kill(self, name: str) -> list[int]:
        """Kills a program with all that descends from it; the process ids on the host."""
        keeper = self.keepers.get(name)
        if keeper is None:
            return []
        if keeper.pid:
            return kill_tree([keeper.pid])
        try:
            send(self._control, {"op": "give_up", "id": name})
        except OSError:
            pass  # the agent is gone, and everything with it
        return []

    # --- what it says -------------------------------------------------------------------------------------

    def _receive(self, _: int) -> None:
        for _turn in range(64):
            try:
                received = receive_from(self._control, trusted=False)
            except BlockingIOError:
                return
            except (ValueError, OSError):
                continue
            if received is None:
                self._loop.forget(self._control.fileno())
                self._lost()
                return
            message, fds, pid = received
            try:
                self._heed(message, fds, pid)
            finally:
                close_all(fds)

    def _heed(self, message: dict[str, Any], fds: list[int], pid: int) -> None:
        event, name = message.get("event"), message.get("id")
        if event == "keeper":
            _kill_first(pid)
        elif event == "hello" and not self.pid and fds:
            self.pid = pid
            self._ready(fds.pop(0))
        elif event == "stopped" and self._stopped is not None:
            then, self._stopped = self._stopped, None
            then()
        elif event == "socket" and isinstance(name, int) and fds:
            use = self._sockets.pop(name, None)
            if use is not None:
                use(fds.pop(0))
        elif isinstance(name, str) and name in self.keepers:
            self._heed_keeper(self.keepers[name], message, fds, pid)

    def _heed_keeper(self, keeper: Keeper, message: dict[str, Any], fds: list[int], pid: int) -> None:
        event = message.get("event")
        if event == "started" and not keeper.pid:
            try:
                keeper.pidfd = os.pidfd_open(pid)
            except OSError:
                self._gone(str(message["id"]), keeper)
                return
            keeper.pid = pid
            self._loop.watch(keeper.pidfd, lambda _: self._gone(str(message["id"]), keeper))
            keeper.owner.started()
        elif event == "running" and isinstance(message.get("pid"), int):
            keeper.program = message["pid"]
            for number in keeper.early:
                self.signal(str(message["id"]), number)
            keeper.early = {}
        elif event == "gone" and not keeper.pid:
            self._gone(str(message["id"]), keeper)  # somebody inside killed it before it began
        elif event == "terminal" and fds and os.isatty(fds[0]):
            keeper.owner.terminal(fds.pop(0))
        elif event == "exit":
            told = {key: message[key] for key in ("code", "signal") if isinstance(message.get(key), int)}
            self._ended(keeper, told or None)
        elif event == "failed" and not keeper.pid:
            del self.keepers[str(message["id"])]
            self._ended(keeper, {"code": 126})

    def _ended(self, keeper: Keeper, told: dict[str, int] | None) -> None:
        if not keeper.ended:
            keeper.ended = True
            keeper.owner.ended(told)

    def _gone(self, name: str, keeper: Keeper) -> None:
        """The keeper has ended: after its last descendant, or because somebody killed it."""
        if keeper.pidfd >= 0:
            self._loop.forget(keeper.pidfd)
            os.close(keeper.pidfd)
            keeper.pidfd = -1
        if not keeper.ended:
            self._receive(READ)  # it may have told its end right before
        self.keepers.pop(name, None)
        if not keeper.ended:
            # Its descendants are the agent's children now, and nobody would find them any more. Keepers are of the
            # agent's session and every program of another.
            own = session(self.pid)
            kill_tree([pid for pid in children(self.pid) if session(pid) != own])
            self._ended(keeper, None)


def _kill_first(pid: int) -> None:
    """Has the kernel kill a keeper's programs before the agent where memory runs out, with which the box would end."""
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # only root may
    try:
        os.write(fd, _OOM_FIRST)
    except OSError:
        pass
    finally:
        os.close(fd)
