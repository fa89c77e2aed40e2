"""The first process of a sandbox: it starts programs for the supervisor outside, and reaps what they leave.

Each program gets a *keeper*, a copy of this process that starts it, adopts its descendants and tells how it ended. One
spare keeper always waits, so that a start costs no copy. Whoever ends this process ends the sandbox; it ends itself when
the supervisor is gone. It is run by the sandbox's own Python (3.9 or later) and imports as little as can be.
"""
# ruff: noqa: PTH118, SIM105 - pathlib and contextlib take longer to import than this may take to start

from __future__ import annotations

import gc
import os
import select
from _ctypes import FUNCFLAG_CDECL, CFuncPtr, _SimpleCData, dlopen, dlsym
from _signal import SIG_IGN, signal  # type: ignore[import-not-found]
from _socket import AF_INET, AF_UNIX, MSG_DONTWAIT, SOCK_CLOEXEC, SOCK_SEQPACKET, SOCK_STREAM, socket, socketpair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from sandstorm_provider_local._inside._wire import close_all, receive, send
else:
    from _wire import close_all, receive, send  # they lie side by side in the sandbox, and are no package there

WORK = "/work"
_KILL, _STOP, _CONTINUE, _CHILD = 9, 19, 18, 17
_CATCHABLE = [number for number in range(1, 32) if number not in (_KILL, _STOP)]
_IGNORED = [number for number in _CATCHABLE if number not in (_CHILD, _CONTINUE, 4, 5, 7, 8, 11, 31)]
"""Signals that programs, which are the same user, may send to a keeper; not those that name a fault of its own."""
_SET_DUMPABLE, _SET_CHILD_SUBREAPER = 4, 36
_TIOCSWINSZ = 0x5414
_TRIES = 5
"""Keepers that may end before they take an order, until it is given up."""


class _Int(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL
    _restype_ = _Int


def main(fd: int, max_tasks: int) -> None:
    """Serves the supervisor at the other end of the socket `fd` until it is gone; `max_tasks` limits processes, unless it is 0."""
    if max_tasks:
        _limit_tasks(max_tasks)
    control = socket(fileno=fd)
    control.setblocking(True)
    os.umask(0o022)
    os.set_inheritable(fd, False)
    prctl = _Function(dlsym(dlopen(None, 0), "prctl"))  # type: ignore[arg-type]
    prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    for number in _IGNORED:
        signal(number, SIG_IGN)
    work = os.open(WORK, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    send(control, {"event": "hello"}, (work,))
    os.close(work)
    gc.disable()
    gc.freeze()
    try:
        Agent(control, prctl).run()
    except OSError:
        pass  # the supervisor is gone
    os._exit(0)


def _limit_tasks(most: int) -> None:
    """Not before the sandbox has its user namespace: the kernel (5.14 and later) counts those of each namespace for themselves.

    Set before, other sandboxes of the same user would count, and enough of them leave none for this one.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (allowed, allowed))


class Agent:
    """Takes the supervisor's orders one by one."""

    def __init__(self, control: socket, prctl: Any) -> None:
        self._control = control
        self._prctl = prctl
        self._poll = select.poll()
        self._poll.register(control.fileno(), select.POLLIN)
        self._links: dict[int, socket] = {}
        self._names: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        self._untaken: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self._spare: socket | None = None
        self._wants_spare = True

    def run(self) -> None:
        """Returns when the supervisor is gone."""
        while True:
            if self._wants_spare and not self._untaken:
                self._make_spare()
            ready = [fd for fd, _ in self._poll.poll()]
            for fd in ready:
                if fd != self._control.fileno():
                    self._hear(fd)
            if self._control.fileno() in ready and not self._obey():
                return
            _reap()

    def _obey(self) -> bool:
        try:
            received = receive(self._control)
        except ValueError:
            return True
        if received is None:
            return False
        order, fds = received
        try:
            self._carry_out(order, fds)
        finally:
            close_all(fds)
        return True

    def _carry_out(self, order: dict[str, Any], fds: Sequence[int]) -> None:
        operation = order["op"]
        if operation == "start":
            self._start(order, fds)
        elif operation == "signal":
            try:
                os.kill(order["pid"], order["number"])
            except OSError:
                pass
        elif operation == "give_up":
            self._give_up(order["id"])
        elif operation == "socket":
            made = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC)
            send(self._control, {"event": "socket", "id": order["id"]}, (made.fileno(),))
            made.close()
        elif operation == "stop_all":
            self._drop_spare()
            _signal_all(_STOP)
            send(self._control, {"event": "stopped"})
        elif operation == "continue_all":
            _signal_all(_CONTINUE)

    # --- keepers ------------------------------------------------------------------------------------------

    def _start(self, order: dict[str, Any], fds: Sequence[int]) -> None:
        try:
            keeper = self._spare or self._new_keeper(fds)
            self._spare = None
            try:
                # A program may have stopped it while it waited.
                os.kill(self._pids[keeper.fileno()], _CONTINUE)
                send(keeper, order, fds)
            except OSError:  # a program has killed the spare one
                keeper = self._new_keeper(fds)
                send(keeper, order, fds)
        except OSError as error:
            _complain(fds, f"{order['argv'][0]}: no room for one more process: {error.strerror}\n")
            send(self._control, {"event": "failed", "id": order["id"]})
            return
        self._names[keeper.fileno()] = order["id"]
        self._untaken[keeper.fileno()] = order, [os.dup(fd) for fd in fds]
        self._wants_spare = order.get("spare", True)

    def _hear(self, fd: int) -> None:
        """A keeper has taken its order, or it has ended: before it took one, another keeper gets the order."""
        try:
            taken = self._links[fd].recv(1, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            taken = b""
        order, fds = self._untaken.pop(fd, ({}, []))
        again = bool(order) and not taken and order.get("tries", 0) < _TRIES
        if again:
            # Most often for want of memory, which the last program has not given back yet. It has started nothing.
            del self._names[fd]
        if not taken:
            self._forget(fd)
        try:
            if again:
                self._start({**order, "tries": order.get("tries", 0) + 1}, fds)
        finally:
            close_all(fds)

    def _give_up(self, name: str) -> None:
        """Kills a keeper that may not have begun, since a program has stopped it."""
        for fd, known in self._names.items():
            if known == name:
                close_all(self._untaken.pop(fd, ({}, []))[1])
                os.kill(self._pids[fd], _KILL)

    def _make_spare(self) -> None:
        # Only now that the files of the last order are closed: a copy of this process would hold them for ever.
        self._wants_spare = False
        try:
            self._spare = self._new_keeper()
        except OSError:
            pass  # no room for one more process now: the next start tries again

    def _new_keeper(self, open_fds: Sequence[int] = ()) -> socket:
        """The link to a new keeper, which is to have no copies of `open_fds`."""
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                for link in (ours, *self._links.values()):
                    link.close()
                close_all([*open_fds, *(fd for _, fds in self._untaken.values() for fd in fds)])
                self._prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                keep(self._control, theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._links[ours.fileno()] = ours
        self._pids[ours.fileno()] = pid
        self._poll.register(ours.fileno(), select.POLLIN)
        return ours

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        link = self._links.pop(fd)
        del self._pids[fd]
        if link is self._spare:
            self._spare = None
        link.close()
        name = self._names.pop(fd, None)
        if name is not None:
            send(self._control, {"event": "gone", "id": name})

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._forget(self._spare.fileno())


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _signal_all(number: int) -> None:
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


# --- a keeper -----------------------------------------------------------------------------------------------------


def keep(control: socket, link: socket) -> None:
    """Waits for an order to start a program, does it, tells how it ended and stays until its last descendant has."""
    send(control, {"event": "keeper"})
    received = receive(link)
    if received is None:
        return
    order, fds = received
    name = order["id"]
    link.send(b"t")
    # Before there is a program that could kill or stop this process: from here on the supervisor finds all of it.
    send(control, {"event": "started", "id": name})
    try:
        pid = _spawn(control, order, fds)
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126
        _complain(fds, f"{order['argv'][0]}: {error.strerror}\n")
        close_all(fds)
        send(control, {"event": "exit", "id": name, "code": code})
        return
    close_all(fds)
    send(control, {"event": "running", "id": name, "pid": pid})
    try:
        while True:
            ended, status = os.wait()
            if ended == pid:
                send(control, {"event": "exit", "id": name, **_told(status)})
    except ChildProcessError:
        pass


def _spawn(control: socket, order: dict[str, Any], fds: list[int]) -> int:
    """Starts the program. Of `fds`, the first three become its own, and one more its fd 3; with a terminal there are none."""
    os.chdir(os.path.join(WORK, order["cwd"]))
    actions: list[tuple[Any, ...]] = []
    if order.get("terminal"):
        slave = _open_terminal(control, order)
        fds += [slave] * 3
        # Opened by name, since the first terminal that the leader of a session opens becomes its own.
        actions.append((os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0))
        actions += [(os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
    else:
        actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
    os.environ["PATH"] = order["env"].get("PATH", os.defpath)
    return os.posix_spawnp(
        order["argv"][0], order["argv"], order["env"], file_actions=actions, setsid=True, setsigdef=_CATCHABLE, setsigmask=()
    )


def _open_terminal(control: socket, order: dict[str, Any]) -> int:
    """A new terminal of the size that is ordered; its other end goes to the supervisor."""
    import fcntl

    columns, rows = order["terminal"]
    master, slave = os.openpty()
    fcntl.ioctl(slave, _TIOCSWINSZ, rows.to_bytes(2, "little") + columns.to_bytes(2, "little") + bytes(4))
    send(control, {"event": "terminal", "id": order["id"]}, (master,))
    os.close(master)
    return slave


def _complain(fds: Sequence[int], text: str) -> None:
    if len(fds) > 2:
        os.write(fds[2], text.encode(errors="surrogateescape"))


def _told(status: int) -> dict[str, int]:
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"code": os.WEXITSTATUS(status)}
