"""A supervisor and its box without any router: a small synchronous client of the protocol between them."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sandstorm_provider_local
from sandstorm_provider_local._bundle import INSIDE, agent_argv, publish
from sandstorm_provider_local._cgroup import find_hierarchy
from sandstorm_provider_local._inside._wire import close_all, in_memory, receive, send
from sandstorm_provider_local._owner import own_token
from sandstorm_provider_local._runtimes import find_bwrap
from sandstorm_provider_local._seccomp import seccomp_filter
from sandstorm_provider_local._supervisor._tree import is_gone, tree
from sandstorm_provider_local._survey import max_tasks

PYTHON = "/usr/bin/python3"
MIB = 1 << 20
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8"}


class Refused(Exception):
    """An answer that is an error: its class is `error`."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(f"{error}: {message}")
        self.error = error


class Client:
    """One connection to a supervisor."""

    def __init__(self, sock: socket.socket, directory: Path) -> None:
        self.sock = sock
        self.directory = directory
        sock.settimeout(20)
        self._made = 0
        self.events: list[dict[str, Any]] = []
        self.fds: list[int] = []

    def send(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> int:
        self._made += 1
        send(self.sock, {"op": op, "n": self._made, **fields}, fds)
        return self._made

    def ask(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
        return self.answer(self.send(op, fds, **fields))

    def answer(self, number: int) -> dict[str, Any]:
        while True:
            received = receive(self.sock)
            if received is None:
                raise EOFError(self.events)
            message, fds = received
            self.fds += fds
            if message.get("n") == number:
                if "error" in message:
                    raise Refused(message["error"], message["message"])
                return message
            self.events.append(message)

    def event(self, kind: str, process: str | None = None) -> dict[str, Any]:
        """The next event of a kind."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == kind and (process is None or event["process"] == process):
                    del self.events[index]
                    return event
            received = receive(self.sock)
            if received is None:
                raise EOFError
            self.events.append(received[0])

    def rest(self) -> list[dict[str, Any]]:
        """Every event until the supervisor has gone."""
        try:
            while (received := receive(self.sock)) is not None:
                self.events.append(received[0])
        except ConnectionResetError:
            pass
        return self.events

    def start(self, *argv: str, stdin: bytes | None = None, timeout: float = 20.0, **fields: Any) -> str:
        fds = () if stdin is None else (in_memory(stdin),)
        given = {"output_limit": MIB, "env": {}, "cwd": None, "start_id": "", **fields}
        try:
            process = self.ask("start", fds, argv=list(argv), timeout=timeout, **given)["process"]
        finally:
            close_all(fds)
        assert isinstance(process, str)
        return process

    def send_cell(self, code: str, **fields: Any) -> str:
        fd = in_memory(code.encode())
        try:
            given = {"language": "python", "timeout": 20.0, "output_limit": MIB, "start_id": "", **fields}
            process = self.ask("cell", (fd,), **given)["process"]
        finally:
            os.close(fd)
        assert isinstance(process, str)
        return process

    def cell(self, code: str, **fields: Any) -> tuple[dict[str, Any], bytes, bytes]:
        return self.wait(self.send_cell(code, **fields))

    def output(self, process: str, stream: str = "stdout") -> bytes:
        path = self.directory / "out" / process / stream
        return path.read_bytes() if path.exists() else b""

    def wait(self, process: str) -> tuple[dict[str, Any], bytes, bytes]:
        """The exit event of a program, and its two streams as far as the event says they go."""
        self.ask("follow", process=process)
        event = self.event("exit", process)
        streams = []
        for stream in ("stdout", "stderr"):
            path = self.directory / "out" / process / stream
            streams.append(path.read_bytes() if path.exists() else b"")
            assert len(streams[-1]) == event[stream]
        return event, streams[0], streams[1]

    def run(self, *argv: str, **fields: Any) -> tuple[dict[str, Any], bytes, bytes]:
        return self.wait(self.start(*argv, **fields))

    def wait_output(self, process: str, expected: bytes) -> None:
        until = time.monotonic() + 10
        while expected not in self.output(process):
            assert time.monotonic() < until, self.output(process)
            time.sleep(0.005)

    def close(self) -> None:
        close_all(self.fds)
        self.fds = []
        self.sock.close()


class Workshop:
    """A state directory and what is needed to make boxes in it; `close` ends what is left and says what that was."""

    def __init__(self, state: Path) -> None:
        self.state = state
        for name in ("boxes", "tools"):
            (state / name).mkdir(parents=True, exist_ok=True)
        state.chmod(0o711)
        bwrap = find_bwrap(None, state / "tools")
        assert bwrap is not None
        self.bwrap = bwrap
        (state / "tools").chmod(0o755)
        self.bundle = publish(state, PYTHON)
        self.proc = _proc(bwrap)
        self.hierarchy = find_hierarchy()
        self.agents: set[int] = set()
        self.made = 0
        self.supervisors: list[subprocess.Popen[bytes]] = []
        self.clients: list[Client] = []

    def command(self, disk: int) -> list[str]:
        command = [self.bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1", "--new-session"]
        command += ["--clearenv", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64"):
            command += ["--symlink", f"usr/{name}", f"/{name}"]
        command += ["--ro-bind", self.bundle.etc, "/etc", "--ro-bind", self.bundle.inside, INSIDE, *self.proc]
        command += ["--dev", "/dev", "--perms", "1777", "--size", str(64 * MIB), "--tmpfs", "/tmp"]
        return [*command, "--size", str(disk * MIB), "--tmpfs", "/work", "--remount-ro", "/", "--chdir", "/work"]

    def create(self, **fields: Any) -> Client:
        """The connection to a new box, over which no hello was said yet."""
        self.made += 1
        marker = f"box-{self.made}"
        directory = self.state / "boxes" / marker
        directory.mkdir(mode=0o700)
        limits = {"memory": 128, "cpu": 1.0, "disk": 32, **fields.pop("limits", {})}
        filter_ = seccomp_filter(platform.machine())
        seccomp = in_memory(filter_ or b"")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tasks = fields.pop("max_tasks", None if self.hierarchy else max_tasks())
        argv = [*self.command(limits["disk"]), "--seccomp", str(seccomp), "--", *agent_argv([PYTHON], tasks)]
        config = {
            "marker": marker,
            "directory": str(directory),
            "argv": argv,
            "fds": [seccomp],
            "leash": theirs.fileno(),
            "lease": None,
            "uid": 64990 if os.geteuid() == 0 else None,
            "limits": limits,
            "rlimits": self.rlimits(limits),
            "cgroup": self.hierarchy.to_json() if self.hierarchy else None,
            "lifetime": 120.0,
            "idle_timeout": None,
            "keep": False,
            "env": ENV,
            "record": {"marker": marker, "owner": own_token()},
            "kernel": {"argv": [PYTHON, "-I", f"{INSIDE}/_kernel.py"], "paths": []},
            **fields,
        }
        fd = in_memory(json.dumps(config).encode())
        root = Path(sandstorm_provider_local.__file__).parent.parent
        program = (
            f"import sys; sys.path.insert(0, {str(root)!r}); from sandstorm_provider_local._supervisor import main; main({fd})"
        )
        self.supervisors.append(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program],
                pass_fds=[fd, seccomp, theirs.fileno()],
                start_new_session=True,
                env={},
                stderr=None if os.environ.get("SUPERVISED_STDERR") else subprocess.DEVNULL,
            )
        )
        theirs.close()
        close_all((fd, seccomp))
        self.clients.append(Client(ours, directory))
        return self.clients[-1]

    def box(self, **fields: Any) -> Client:
        """A new box that has come up."""
        client = self.create(**fields)
        self.agents.add(client.ask("hello")["agent_pid"])
        return client

    def rlimits(self, limits: dict[str, Any]) -> list[list[int]]:
        """What a router sets: without groups, memory for each process."""
        found = [[resource.RLIMIT_CORE, 0], [resource.RLIMIT_NOFILE, 1024], [resource.RLIMIT_FSIZE, limits["disk"] * MIB]]
        if self.hierarchy is None:
            found.append([resource.RLIMIT_DATA, limits["memory"] * MIB])
        return found

    def attach(self, client: Client) -> Client:
        """A further connection to the box of another."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = os.open(client.directory, os.O_RDONLY)
        try:
            sock.connect(f"/proc/self/fd/{directory}/sock")
        finally:
            os.close(directory)
        self.clients.append(Client(sock, client.directory))
        self.clients[-1].ask("hello")
        return self.clients[-1]

    def groups(self) -> list[Path]:
        """The control groups of the supervisors that were started here."""
        pids = {supervisor.pid for supervisor in self.supervisors}
        # Unlike rglob, walk does not mind what others remove meanwhile.
        found = (Path(top, name) for top, names, _ in os.walk("/sys/fs/cgroup") for name in names if name.endswith("-box"))
        return [path for path in found if int(path.name.split("-")[2]) in pids]

    def commands(self, client: Client, program: bytes) -> list[int]:
        """The processes in a box that run a program."""
        found = tree(client.ask("hello")["agent_pid"])
        return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(program + b"\0")]

    def processes(self) -> list[int]:
        """Processes whose supervisor was started here: those in their groups, and those of their bubblewraps."""
        # Without groups: what descends from them. If the first process of a sandbox is gone, so is everything in it.
        started = {supervisor.pid for supervisor in self.supervisors}
        found = {pid for root in started | self.agents for pid in tree(root) if not is_gone(pid)} - started
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if str(self.state).encode() in (entry / "cmdline").read_bytes():
                        found.add(int(entry.name))
                except OSError:
                    continue
        for group in self.groups():
            try:
                found |= {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
            except OSError:
                continue  # removed meanwhile
        return sorted(found)

    def remove_directories(self) -> None:
        """What a router does for boxes whose supervisor was killed."""
        for directory in (self.state / "boxes").iterdir():
            shutil.rmtree(directory)

    def close(self) -> list[str]:
        for client in self.clients:
            client.close()
        left = []
        for supervisor in self.supervisors:
            try:
                supervisor.wait(5)
            except subprocess.TimeoutExpired:
                left.append(f"supervisor {supervisor.pid}")
                supervisor.kill()
                supervisor.wait()
        until = time.monotonic() + 2
        while self.processes() and time.monotonic() < until:
            time.sleep(0.01)
        left += [f"process {pid}" for pid in self.processes()]
        left += map(str, self.groups())
        left += [str(path) for path in (self.state / "boxes").iterdir()]
        shutil.rmtree(self.state)
        return left


def _proc(bwrap: str) -> list[str]:
    """Bubblewrap's arguments for `/proc`, as far as it can be mounted here."""
    command = [bwrap, "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    return ["--proc", "/proc"] if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0 else []


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    """A place to make boxes in; nothing of them may be left afterwards."""
    workshop = Workshop(Path(f"/tmp/sandstorm-supervisor-{os.getpid()}"))
    try:
        yield workshop
    finally:
        left = workshop.close()
    assert left == []
