"""How a box comes into being: what its supervisor is told, and the process that it is."""

from __future__ import annotations

import array
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs

from sandstorm.provider import Order
from sandstorm_provider_local._bundle import INSIDE, agent_argv
from sandstorm_provider_local._confinement import MIB, WORKDIR, Confinement, process_limits
from sandstorm_provider_local._environments import Prepared
from sandstorm_provider_local._inside._wire import encode, in_memory
from sandstorm_provider_local._rootfs import host_python, system_arguments
from sandstorm_provider_local._selftest import Level
from sandstorm_provider_local._state import Record, UidLease
from sandstorm_provider_local._survey import Ground

_SOURCE = str(Path(__file__).parent.parent)
_MAIN = (
    f"import sys; sys.path.insert(0, {_SOURCE!r}); from sandstorm_provider_local._supervisor import main; main(int(sys.argv[1]))"
)
_RESET = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
"""Signals that Python ignores or catches, and that its children are not to."""


@attrs.frozen(kw_only=True)
class Scene:
    """What a sandbox finds inside, beside its own files.

    Attributes:
        confinement: What confines it.
        python: What starts Python inside.
        binds: Host directories and where they appear, read-only.
        env: Variables of every program, beneath those of its spec.
        packages: Directories of Python packages.
        leases: Open files that keep the environment from being removed.
    """

    confinement: Level
    python: tuple[str, ...]
    binds: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = attrs.field(factory=dict)
    packages: tuple[str, ...] = ()
    leases: tuple[int, ...] = ()


def scene(ground: Ground, prepared: Prepared | None) -> Scene:
    """The inside of a sandbox with this environment, or with the host's programs alone."""
    if prepared is None:
        path = {"PATH": ground.confinement.path}
        return Scene(confinement=ground.confinement, python=(ground.python,), env=path)
    bubblewrap = ground.bubblewrap
    env = {"PATH": ":".join((*prepared.paths, bubblewrap.path)), **prepared.env}
    leases = (prepared.lease.fd,)
    if prepared.root is None:
        packages = tuple(prepared.env["PYTHONPATH"].split(":")) if "PYTHONPATH" in prepared.env else ()
        return Scene(
            confinement=ground.confinement,
            python=(ground.python,),
            binds=prepared.binds,
            env=env,
            packages=packages,
            leases=leases,
        )
    python = host_python(ground.python, tuple(ground.runtimes.extra))
    confinement = attrs.evolve(bubblewrap, system=system_arguments(Path(prepared.root)))
    return Scene(confinement=confinement, python=python.argv, binds=(*prepared.binds, *python.binds), env=env, leases=leases)


@attrs.frozen(kw_only=True)
class Birth:
    """What is needed to make one box.

    Attributes:
        order: What was asked for.
        record: What is written down of it.
        directory: Its directory, which exists.
        ground: What sandboxes are made with.
        scene: What it finds inside.
        lease: Its user id.
    """

    order: Order
    record: Record
    directory: Path
    ground: Ground
    scene: Scene
    lease: UidLease

    def start(self) -> tuple[int, socket.socket]:
        """The process id of the supervisor, and the connection with whose end a box that is not kept ends. Raises `OSError`."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with far, ExitStack() as given_away:
                arguments, handed = self._bubblewrap(given_away)
                lease = given_away.enter_context(_bag([fd for fd in (self.lease.fd, *self.scene.leases) if fd is not None]))
                config = in_memory(encode(self._config(arguments, handed, far.fileno(), lease)))
                given_away.callback(os.close, config)
                return _spawn([config, far.fileno(), lease, *handed], str(config)), near
        except BaseException:
            near.close()
            raise

    def _bubblewrap(self, given_away: ExitStack) -> tuple[list[str], list[int]]:
        """The command, and the open files that it reads."""
        handed: list[int] = []

        def hand_over(data: bytes) -> str:
            fd = in_memory(data)
            given_away.callback(os.close, fd)
            handed.append(fd)
            return str(fd)

        confinement = self.scene.confinement
        if not isinstance(confinement, Confinement):
            raise TypeError("a box with a supervisor needs bubblewrap")
        arguments = ["--as-pid-1", "--size", str(self.record.disk * MIB), "--tmpfs", WORKDIR]
        # One by one, since an environment may have its place beside them, and nothing can be mounted into what is read-only.
        ours = [(entry.path, f"{INSIDE}/{entry.name}") for entry in os.scandir(self.ground.bundle.inside)]
        for host, inside in (*self.scene.binds, *ours):
            arguments += ["--ro-bind", host, inside]
        arguments += ["--remount-ro", "/", "--chdir", WORKDIR]
        if confinement.seccomp is not None:
            arguments += ["--seccomp", hand_over(confinement.seccomp)]
        tasks = None if self.ground.pool else self.ground.max_tasks
        listed = hand_over(b"".join(os.fsencode(argument) + b"\0" for argument in arguments))
        return [*confinement.prefix, "--args", listed, "--", *agent_argv(self.scene.python, tasks)], handed

    def _config(self, argv: Sequence[str], fds: Sequence[int], leash: int, lease: int) -> dict[str, Any]:
        order, record, pool = self.order, self.record, self.ground.pool
        given = {**order.spec.env, **order.secrets}
        return {
            "marker": record.marker,
            "directory": str(self.directory),
            "argv": list(argv),
            "fds": list(fds),
            "leash": leash,
            "lease": lease,
            "uid": record.uid,
            "limits": {"memory": record.memory, "cpu": record.cpu, "disk": record.disk},
            "rlimits": self._rlimits(),
            "cgroup": pool.hierarchy.to_json() if pool else None,
            "lifetime": order.lifetime,
            "idle_timeout": order.spec.idle_timeout,
            "keep": order.keep,
            "env": {"HOME": WORKDIR, "LANG": "C.UTF-8", **self.scene.env, **given},
            "record": attrs.asdict(record),
            "kernel": {"argv": [*self.scene.python, "-I", f"{INSIDE}/_kernel.py"], "paths": list(self.scene.packages)},
        }

    def _rlimits(self) -> list[tuple[int, int]]:
        return process_limits(self.record.disk, self.record.memory if self.ground.pool is None else None, None)


def _spawn(fds: Sequence[int], argument: str) -> int:
    """A supervisor in a session of its own, which inherits `fds` and nothing else."""
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, 0, stream) for stream in (1, 2)]
    # Onto itself: that is how a descriptor stays open in this child and in no other that is started meanwhile.
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds]
    command = [sys.executable, "-I", "-S", "-c", _MAIN, argument]
    return os.posix_spawn(sys.executable, command, {}, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_RESET)


@contextmanager
def _bag(fds: Sequence[int]) -> Iterator[int]:
    """One descriptor that keeps several open files open, wherever it is inherited: they wait in a socket to be received."""
    inner, outer = socket.socketpair()
    with inner, outer:
        if fds:
            inner.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        yield outer.fileno()
