"""A container as a sandbox."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import attrs
import trio

from sandstorm.provider import (
    CapacityError,
    Command,
    Conflict,
    FileInfo,
    InvalidSpec,
    NotSupported,
    SandboxGone,
    SandboxLost,
    refuse_escape,
)
from sandstorm_provider_docker._agent import Agent, Answer
from sandstorm_provider_docker._container import USER
from sandstorm_provider_docker._daemon import Daemon
from sandstorm_provider_docker._errors import map_docker_errors
from sandstorm_provider_docker._files import Tools, entries
from sandstorm_provider_docker._process import Controls, DockerProcess
from sandstorm_provider_docker._scripts import LIST, MAKE_DIRECTORY, REMOVE, RUN, SERVE, STAT, WATCHDOG
from sandstorm_provider_docker._stream import Reader

_CLEANUP = 30.0
_BEGIN = 30.0
"""Seconds in which a program says that it begins."""
_SETTLE = 5.0
_FIRST_GROUP = 20_000
_GROUPS = 40_000
"""Groups of programs: above those of images, and below 65536, which is what a rootless daemon has."""


@attrs.frozen
class DockerHandle:
    """What `Sandbox.native` is here.

    Attributes:
        socket: The path of the daemon's socket.
        container: The container's id.
    """

    socket: str
    container: str


class DockerSandbox:
    """A container and its programs."""

    def __init__(
        self, daemon: Daemon, container: str, agent: Agent | None, nursery: trio.Nursery, forget: Callable[[str], None]
    ) -> None:
        self.id = container
        self.native: object = DockerHandle(daemon.path, container)
        self._daemon = daemon
        self._agent = agent
        self._nursery = nursery
        self._forget = forget
        self._gone = False
        self._greeting: dict[str, str] = {}
        self._ooms = 0
        self._group = secrets.randbelow(_GROUPS)
        self._processes: list[DockerProcess] = []
        self._calling = trio.Lock()
        self._tools = Tools(self._script, self._exit_code)

    # --- programs -----------------------------------------------------------------------------------------

    async def start(self, command: Command) -> DockerProcess:
        """Starts a program, once for a start id. Raises `Conflict` for a start that was made before."""
        self._refuse_gone()
        await self._called_agent()
        group = self._next_group()
        gate = hashlib.sha256(command.start_id.encode()).hexdigest()[:32] if command.start_id else ""
        columns, rows = (str(number) for number in command.terminal) if command.terminal else ("", "")
        argv = ["/bin/sh", "-c", RUN, "sandstorm", gate, command.cwd or ".", columns, rows, *command.argv]
        terminal = command.terminal is not None
        exec_id, reader = await self._exec(argv, f"{USER}:{group}", env=command.env, terminal=terminal)
        try:
            pid = await self._begun(reader, command, "stdout" if terminal else "stderr")
        except BaseException:
            await reader.stream.close()
            raise
        controls = Controls(
            sweep=self._sweep, signal=self._signal, inspect=self._inspect, resize=self._resize, count_ooms=self._count_ooms
        )
        process = DockerProcess(exec_id, reader, command, group, pid, controls)
        self._processes = [other for other in self._processes if not other.closed] + [process]
        self._nursery.start_soon(process.feed)
        self._nursery.start_soon(process.watch)
        if command.detached:
            await self._set_watchdog(group, command.timeout)
        return process

    async def _begun(self, reader: Reader, command: Command, name: str) -> int:
        with trio.move_on_after(_BEGIN):
            word, _, pid = (await reader.first_line(name) or "").partition(" ")
            if word == "started":
                return int(pid)
            if word == "repeated":
                raise Conflict(f"the start {command.start_id} was made before: a program starts once")
            if word == "no-directory":
                raise InvalidSpec(f"there is no directory {command.cwd!r} in the work area")
            if word == "full":
                raise CapacityError("the start could not be noted in the container")
            raise SandboxLost("the container ended while the program was started")
        raise SandboxLost("the container did not start the program in time")

    async def _set_watchdog(self, group: int, timeout: float) -> None:
        argv = ["/bin/sh", "-c", WATCHDOG, "sandstorm", str(group), str(max(1, int(timeout + 0.999)))]
        made = await self._daemon.call("POST", f"/containers/{self.id}/exec", {"Cmd": argv, "User": "0:0", "WorkingDir": "/"})
        await self._daemon.call("POST", f"/exec/{made['Id']}/start", {"Detach": True, "Tty": False})

    # --- files --------------------------------------------------------------------------------------------

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file, parents included; exact bytes. It appears once it is whole."""
        refuse_escape("path", path)
        await self._tools.upload(path, chunks)

    async def unpack(self, files: Mapping[str, bytes]) -> None:
        """Writes several files at once."""
        await self._tools.unpack(files)

    async def keep(self, script: str, data: bytes) -> None:
        """Gives a script of ours what it keeps."""
        exec_id, reader = await self._script(script)
        try:
            with map_docker_errors():
                await reader.stream.send(data)
                await reader.stream.send_end()
            if await reader.first_line("stderr") != "done":
                raise SandboxLost("the container did not take its secrets")
            await self._exit_code(exec_id)
        finally:
            await reader.stream.close()

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Reads a file. Raises `FileNotFoundError`, and `InvalidSpec` where it is not a plain file."""
        refuse_escape("path", path)
        return self._tools.download(path)

    def list(self, path: str, *, recursive: bool = False) -> AbstractAsyncContextManager[AsyncIterator[FileInfo]]:
        """What is in a directory, itself excluded. Raises `FileNotFoundError`, and `InvalidSpec` where it is none."""
        _refuse_path(path)
        return self._list(path, "" if recursive else "1")

    @asynccontextmanager
    async def _list(self, path: str, depth: str) -> AsyncIterator[AsyncIterator[FileInfo]]:
        found = entries(await self._tools.tell(LIST, path, depth))

        async def each() -> AsyncIterator[FileInfo]:
            for info in found:
                await trio.lowlevel.checkpoint()
                yield info

        yield each()

    async def stat(self, path: str) -> FileInfo:
        """One entry; a link is not followed. Raises `FileNotFoundError`."""
        _refuse_path(path)
        found = entries(await self._tools.tell(STAT, path))
        if not found:
            raise FileNotFoundError(path)
        return found[0]

    async def make_directory(self, path: str) -> None:
        """Makes a directory, parents included. Succeeds if it is there."""
        _refuse_path(path)
        await self._tools.tell(MAKE_DIRECTORY, path)

    async def remove(self, path: str) -> None:
        """Removes a file, a link, or a directory with all that is in it. Raises `FileNotFoundError`."""
        refuse_escape("path", path)
        await self._tools.tell(REMOVE, path)

    # --- the container ------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Freezes every process of it. Succeeds if it is paused."""
        if (await self._state())["Status"] != "paused":
            await self._daemon.call("POST", f"/containers/{self.id}/pause")

    async def resume(self) -> None:
        """Continues it. Succeeds if it is not paused."""
        if (await self._state())["Status"] == "paused":
            await self._daemon.call("POST", f"/containers/{self.id}/unpause")

    async def url(self, port: int) -> str:
        """The address on this machine at which a port of the spec can be reached. Raises `NotSupported` for another port."""
        found = await self._daemon.call("GET", f"/containers/{self.id}/json")
        bound = (found["NetworkSettings"].get("Ports") or {}).get(f"{port}/tcp")
        if not bound:
            raise NotSupported(f"port {port} was not published: name it in the ports of the spec")
        return f"http://127.0.0.1:{bound[0]['HostPort']}"

    async def destroy(self) -> None:
        """Ends the container and its programs. Idempotent; bounded, and not to be cancelled."""
        with trio.CancelScope(shield=True), trio.fail_after(_CLEANUP):
            self._gone = True
            try:
                await remove_container(self._daemon, self.id)
            except BaseException:
                self._gone = False
                raise
            await self.leave()
            self._forget(self.id)

    async def leave(self) -> None:
        """Closes its connections; a leashed container ends with that."""
        for process in self._processes:
            await process.close()
        if self._agent is not None:
            await self._agent.close()

    # --- its parts ----------------------------------------------------------------------------------------

    async def _exec(
        self, argv: Sequence[str], user: str, *, env: Mapping[str, str] | None = None, terminal: bool = False
    ) -> tuple[str, Reader]:
        self._refuse_gone()
        body: dict[str, Any] = {
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "Tty": terminal,
            "Cmd": [*argv],
            "Env": [f"{name}={value}" for name, value in (env or {}).items()],
            "User": user,
            "WorkingDir": "/work",
        }
        made = await self._daemon.call("POST", f"/containers/{self.id}/exec", body)
        start = {"Detach": False, "Tty": terminal}
        stream = await self._daemon.upgraded(f"/exec/{made['Id']}/start", start, terminal=terminal)
        return made["Id"], Reader(stream)

    async def _script(self, script: str, *arguments: str) -> tuple[str, Reader]:
        return await self._exec(["/bin/sh", "-c", script, "sandstorm", *arguments], f"{USER}:{USER}")

    async def _exit_code(self, exec_id: str) -> int:
        with trio.move_on_after(_SETTLE):
            while (found := await self._inspect(exec_id)).get("Running"):  # noqa: ASYNC110 - the daemon has to be asked
                await trio.sleep(0.01)
            return int(found["ExitCode"])
        return -1

    async def _called_agent(self) -> Agent:
        """The agent; where it is not the first process, each router has one of its own."""
        async with self._calling:
            if self._agent is None:
                _, reader = await self._exec(["/bin/sh", "-c", SERVE], "0:0")
                agent = Agent(reader.stream)
                self._greeting = await agent.greeting()
                self._agent = agent
            return self._agent

    async def greet(self) -> dict[str, str]:
        """What the agent found of its confinement, by name."""
        agent = await self._called_agent()
        if not self._greeting:
            self._greeting = await agent.greeting()
        return self._greeting

    async def _sweep(self, group: int) -> Answer:
        return await (await self._called_agent()).sweep(group)

    async def _signal(self, group: int, pid: int, number: int) -> Answer:
        return await (await self._called_agent()).signal(group, pid, number)

    async def _inspect(self, exec_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self._daemon.call("GET", f"/exec/{exec_id}/json")
        return found

    async def _resize(self, exec_id: str, columns: int, rows: int) -> None:
        await self._daemon.call("POST", f"/exec/{exec_id}/resize", None, h=rows, w=columns)

    async def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self._daemon.call("GET", f"/containers/{self.id}/json"))["State"]
        return found

    def _count_ooms(self, ooms: int) -> bool:
        grown, self._ooms = ooms > self._ooms, max(ooms, self._ooms)
        return grown

    def _next_group(self) -> int:
        self._group = (self._group + 1) % _GROUPS
        return _FIRST_GROUP + self._group

    def _refuse_gone(self) -> None:
        if self._gone:
            raise SandboxGone(f"the sandbox {self.id} is gone")


async def remove_container(daemon: Daemon, container: str) -> None:
    """Removes a container by its id or name with all that is in it. Succeeds if it is gone, or on its way."""
    for _ in range(100):
        try:
            await daemon.call("DELETE", f"/containers/{container}", None, force="true", v="true")
        except SandboxGone:
            return
        except Conflict:
            # It is being removed already, since it has ended; it is gone when the daemon does not know it any more.
            await trio.sleep(0.05)


def _refuse_path(path: str) -> None:
    if path != ".":
        refuse_escape("path", path)
