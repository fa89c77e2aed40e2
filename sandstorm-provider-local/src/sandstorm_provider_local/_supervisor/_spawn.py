"""How a supervisor becomes one, and starts its sandbox."""
# ruff: noqa: SIM105 - contextlib takes longer to import than this may take to start

from __future__ import annotations

import os
import resource
from _socket import AF_UNIX, SO_PASSCRED, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair

from sandstorm_provider_local._cgroup import PREFIX, Cgroup, Hierarchy, Limits
from sandstorm_provider_local._inside._wire import decode, read_all, send
from sandstorm_provider_local._owner import own_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_LARGEST = 16 * 1024 * 1024
_BESIDE = 128
"""MiB of files in memory beside the work area: `/tmp` and `/dev/shm`."""


class Sandbox:
    """A bubblewrap that was just started, and what it was started with.

    Attributes:
        config: What the router wrote down.
        leash: The connection of the router that made it.
        control: The socket to the agent inside.
        complaints: The reading end of the pipe that is the standard error of bubblewrap and the agent.
        pid: The process id of bubblewrap.
        group: Its control group, or None where there are none.
    """

    def __init__(self, config: dict[str, Any], leash: socket) -> None:
        self.config = config
        self.leash = leash
        self.token = own_token()
        hierarchy, limits = config["cgroup"], config["limits"]
        self.group: Cgroup | None = None
        if hierarchy is not None:
            room = Limits(limits["memory"], limits["cpu"], limits["disk"] + _BESIDE)
            self.group = Cgroup(Hierarchy(**hierarchy), f"{PREFIX}{self.token}-box", room, freezer=True)
        try:
            self.control, inside = socketpair(AF_UNIX, SOCK_SEQPACKET)
            self.control.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
            self.control.setblocking(False)
            self.complaints, write_complaints = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.complaints, False)
            self.pid = os.fork()
            if self.pid == 0:
                self._descend(inside.fileno(), write_complaints)
        except BaseException:
            if self.group is not None:
                self.group.close()
            raise
        inside.close()
        for fd in (write_complaints, *config["fds"], *(self.group.join_fds if self.group else ())):
            os.close(fd)
        if self.group is not None:
            self.group.join_fds = []

    @classmethod
    def from_file(cls, fd: int) -> Sandbox:
        """The sandbox that a file describes. What goes wrong is told to the router, and raised."""
        config = decode(read_all(fd, _LARGEST))
        os.close(fd)
        _detach(config)
        leash = socket(fileno=config["leash"])
        leash.setblocking(False)
        try:
            return cls(config, leash)
        except BaseException as error:
            _fail(leash, error)
            raise

    def abandon(self, error: BaseException) -> None:
        """Ends what was begun, and tells the router why."""
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        if self.group is not None:
            self.group.kill()
            self.group.close()
        _fail(self.leash, error)

    def _descend(self, inside: int, complaints: int) -> NoReturn:
        """What the child does: it gives up all rights and becomes bubblewrap."""
        config = self.config
        try:
            os.dup2(complaints, 2)
            os.set_inheritable(inside, True)
            for fd in self.group.join_fds if self.group else ():
                os.write(fd, b"0")
            for kind, amount in config["rlimits"]:
                hard = resource.getrlimit(kind)[1]
                allowed = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
                resource.setrlimit(kind, (allowed, allowed))
            uid = config["uid"]
            if uid is not None:
                os.setgroups(())
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.execve(config["argv"][0], [*config["argv"], str(inside)], {})  # noqa: S606 - running code is the point
        except BaseException as error:
            os.write(2, f"bubblewrap was not started: {type(error).__name__}: {error}\n".encode(errors="replace"))
        finally:
            os._exit(127)


def _fail(leash: socket, error: BaseException) -> None:
    try:
        send(leash, {"event": "failed", "error": f"{type(error).__name__}: {error}"})
    except OSError:
        pass  # the router is gone


def _detach(config: dict[str, Any]) -> None:
    """Leaves the router's session, its files and its output behind."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    os.umask(0o077)
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    own = [fd for fd in (config["leash"], config["lease"]) if fd is not None]
    for fd in own:
        os.set_inheritable(fd, False)
    for fd in config["fds"]:
        os.set_inheritable(fd, True)
    last = 2
    for fd in sorted({*own, *config["fds"]}):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, 1 << 16)
