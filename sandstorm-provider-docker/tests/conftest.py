"""A podman of the tests' own, with an image that needs no registry, and short ways to ask it for something."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from sandstorm.provider import Command, Exit, Offer, Order, Output, SandboxSpec
from sandstorm_provider_docker import DockerProvider

IMAGE = "localhost/sandstorm-test:latest"
_PROGRAMS = [
    "sh",
    "cat",
    "mkdir",
    "rm",
    "mv",
    "sleep",
    "ls",
    "stat",
    "find",
    "mkfifo",
    "true",
    "false",
    "head",
    "tail",
    "dd",
    "id",
    "tar",
    "env",
    "sort",
    "wc",
    "seq",
    "yes",
    "chmod",
    "ln",
    "stty",
    "bash",
    "grep",
    "setsid",
    "touch",
    "printf",
    "perl",
    "echo",
]
_BRIDGE = Path("/sys/class/net/cni-podman0")
_CONFIG = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def missing() -> str | None:
    """Why the tests cannot run here, or None."""
    if os.geteuid() != 0:
        return "the tests' podman runs as root, for limits on control groups of version 1"
    absent = [name for name in ("podman", "runc", "conmon") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (apt install podman runc)" if absent else None


class Podman:
    """A service below `place`, known by its process id."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._had_bridge = _BRIDGE.exists()
        self.socket = str(place / "podman.sock")
        self._root = str(place / "root")
        (place / "containers.conf").write_text(_CONFIG)
        self._environment = {**os.environ, "CONTAINERS_CONF": str(place / "containers.conf")}
        folders = ("--root", self._root, "--runroot", str(place / "run"), "--tmpdir", str(place / "tmp"))
        self._podman = ("podman", *folders, "--storage-driver", "overlay")
        self.run("import", str(_root_files(place)), IMAGE)
        self._log = (place / "service.log").open("wb")
        self.start()

    def run(self, *arguments: str) -> str:
        """What a podman command on the same storage prints."""
        done = subprocess.run([*self._podman, *arguments], env=self._environment, capture_output=True, timeout=60, check=True)
        return done.stdout.decode()

    def start(self) -> None:
        """Starts the service, and returns when it listens."""
        command = [*self._podman, "system", "service", "--time=0", f"unix://{self.socket}"]
        self._service = subprocess.Popen(command, env=self._environment, stdout=self._log, stderr=self._log)
        until = time.monotonic() + 20
        while not Path(self.socket).exists():
            assert self._service.poll() is None and time.monotonic() < until, "podman does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """Kills the service, as a crash would."""
        self._service.kill()
        self._service.wait()
        Path(self.socket).unlink()

    def stop(self) -> None:
        """Stops the service, and whatever container is left."""
        self.run("rm", "--all", "--force", "--time=0")
        self._service.send_signal(signal.SIGTERM)
        try:
            self._service.wait(10)
        except subprocess.TimeoutExpired:
            self._service.kill()
            self._service.wait()
        self._log.close()
        for monitor in self._monitors():
            with suppress(ProcessLookupError):
                os.kill(monitor, signal.SIGKILL)
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((each for each in mounts if each.startswith(f"{self._place}/")), reverse=True):
            subprocess.run(["umount", mount], check=True)
        shutil.rmtree(self._place)
        # The bridge of its network stays behind, as it does for every podman.
        if not self._had_bridge and _BRIDGE.exists():
            subprocess.run(["ip", "link", "delete", _BRIDGE.name], check=True)

    def _monitors(self) -> list[int]:
        """What podman leaves of each exec for five minutes, so that its exit code can be asked for."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else [b""]
                if words[0].endswith(b"conmon") and self._root.encode() in words:
                    found.append(int(entry.name))
        return found


def _root_files(place: Path) -> Path:
    """A root file system in a tar, made of a few of this machine's own programs and their libraries."""
    files = set()
    for name in _PROGRAMS:
        program = shutil.which(name, path="/usr/bin:/bin")
        assert program is not None, name
        files.add(program)
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        files.update(re.findall(r"(/\S+) \(0x", linked))
    archive = place / "root.tar"
    with tarfile.open(archive, "w") as tar:
        for folder in ("usr", "usr/bin", "usr/lib", "usr/lib64", "etc", "tmp", "work", "proc", "dev", "sys", "run"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for folder in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(folder)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{folder}"
            tar.addfile(link)
        for file in sorted(files):
            inside = file if file.startswith("/usr/") else f"/usr{file}"
            tar.add(os.path.realpath(file), arcname=inside.lstrip("/"))
        for folder in Path("/usr/lib").glob("*/perl-base"):
            tar.add(folder, arcname=str(folder).lstrip("/"))
    return archive


@attrs.frozen(kw_only=True)
class Ran:
    """What came of a program."""

    stdout: bytes
    stderr: bytes
    exit: Exit


@attrs.define
class Machine:
    """A session and what a test needs around it."""

    podman: Podman
    provider: DockerProvider
    session: Any
    facts: Any

    def order(self, *, keep: bool = False, lifetime: float = 60.0, secrets: Any = None, **fields: Any) -> Order:
        """An order for a spec of these fields, with a marker of its own."""
        spec = SandboxSpec(**{"memory": 128, "disk": 32, **fields})
        offer = self.provider.offers(spec, self.facts)[0]
        assert isinstance(offer, Offer), offer
        return Order(
            spec=spec,
            offer=offer,
            marker=f"test-{os.urandom(6).hex()}",
            dispatch_by=trio.current_time() + 60,
            lifetime=lifetime,
            keep=keep,
            secrets=secrets or {},
        )

    async def box(self, **fields: Any) -> Any:
        """A sandbox; it is removed at the end."""
        return await self.session.create(self.order(**fields))

    async def run(self, box: Any, *argv: str, timeout: float = 20.0, limit: int = 1 << 20, **fields: Any) -> Ran:
        """What came of a program."""
        command = Command(argv=argv, timeout=timeout, output_limit=limit, **fields)
        return await self.collect(await box.start(command))

    async def collect(self, process: Any) -> Ran:
        """All that a program wrote, with its offsets checked, and its exit."""
        streams = {"stdout": b"", "stderr": b""}
        async with process.events() as events:
            async for event in events:
                if isinstance(event, Output):
                    assert event.offset == len(streams[event.stream])
                    streams[event.stream] += event.data
                else:
                    return Ran(stdout=streams["stdout"], stderr=streams["stderr"], exit=event)
        raise AssertionError("no exit")

    async def containers(self) -> list[str]:
        """The markers of all that there are."""
        async with self.session.find() as found:
            return [info.marker async for info in found]

    async def wait_gone(self, marker: str, seconds: float) -> None:
        """Returns once there is no container with this marker."""
        with trio.fail_after(seconds):
            while marker in await self.containers():  # noqa: ASYNC110 - a daemon has to be asked
                await trio.sleep(0.05)

    @asynccontextmanager
    async def again(self) -> AsyncIterator[Machine]:
        """The same with a session of its own, as another router has it."""
        async with self.provider.connect() as session:
            yield Machine(self.podman, self.provider, session, await session.refresh())


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """One service for all tests."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    service = Podman(Path(tempfile.mkdtemp(prefix="sandstorm-podman-")))
    yield service
    service.stop()


@pytest.fixture
async def machine(podman: Podman) -> AsyncIterator[Machine]:
    """A session; nothing may be left of it afterwards."""
    provider = DockerProvider(socket=podman.socket, images={"bash": IMAGE})
    async with provider.connect() as session:
        yield Machine(podman, provider, session, await session.refresh())
    with trio.fail_after(10):
        while podman.run("ps", "--all", "--quiet"):  # noqa: ASYNC110 - a daemon has to be asked
            await trio.sleep(0.1)
