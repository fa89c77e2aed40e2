"""A program that runs in its own bubblewrap, or under its own shim, as events.

Bubblewrap and gVisor report a program that a signal ended as exit code 128 + n, and so does a shell: the two cannot be told
apart from outside. A code from 129 to 159 is therefore named a signal; `Exit.status` is the same number either way. A shim
tells them apart where it can.
"""

from __future__ import annotations

import json
import os
import pathlib
import select
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress

import attrs
import trio

from sandstorm.provider import Artifact, Exit, Output, ProviderDown, SandboxLost
from sandstorm_provider_local._confinement import Spawned

_CHUNK = 64 * 1024
_TEARDOWN = 5.0
"""Seconds that the kernel gets to take a namespace down; it needs milliseconds."""
_LAST_SIGNAL = 31
_STOP = 0.05
"""Seconds to wait for bubblewrap to stop; it takes a fraction of a millisecond unless it makes namespaces just then."""


@attrs.frozen(kw_only=True)
class Bounds:
    """What ends a program early: trio time, and bytes of output."""

    deadline: float
    output_limit: int


class LocalProcess:
    """A started program. Its id is the process id of its bubblewrap or shim, which means the same to every router here."""

    def __init__(self, spawned: Spawned, bounds: Bounds, oom_kills: Callable[[], int]) -> None:
        self.id = str(spawned.popen.pid)
        self._popen = spawned.popen
        self._pipes = {spawned.stdout: "stdout", spawned.stderr: "stderr"}
        self._status_fd = spawned.status
        self._leash = spawned.leash
        self._shimmed = spawned.leash is not None
        self._status = b""
        self._bounds = bounds
        self._oom_kills = oom_kills
        self._oom_before = oom_kills()
        self._pidfd = os.pidfd_open(spawned.popen.pid)
        self._init_pidfd: int | None = None
        self._reason: str | None = None
        self._exit: Exit | None = None
        self._last_error = b""
        self._closed = False

    # --- what the contract asks for -----------------------------------------------------------------------

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What the program writes, exactly, and its `Exit` last. To be entered once.

        Raises `ProviderDown` if the sandbox could not be set up (the program did not start), and `SandboxLost` if
        somebody else killed it.
        """
        return self._events()

    @asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[Output | Artifact | Exit]]:
        async with aclosing(self._pump()) as events:
            yield events

    async def kill(self) -> None:
        """Ends the whole process tree: with bubblewrap its namespace ends, and a shim ends all that it started."""
        self.end("killed")
        await self.wait_gone()

    # --- how it ends --------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """Kills it, if it still runs; the first reason is the one that its exit names."""
        if self._popen.poll() is None:
            self._reason = self._reason or reason
            if self._shimmed:
                self._let_go()
                return
            self._find_init()
            if self._init_pidfd is None:
                self._catch_init()
            # Its first process is killed as well: right after its birth it does not end with bubblewrap yet.
            if self._init_pidfd is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
            self._popen.kill()

    def _let_go(self) -> None:
        if self._leash is not None:
            os.close(self._leash)
            self._leash = None

    @property
    def child_pid(self) -> int | None:
        """The process id of the program under its shim or of the first process in its namespace; None if not yet reported."""
        return self._report("child-pid")

    async def watch(self, period: float | None = None, over: Callable[[], bool] | None = None) -> None:
        """Returns when the program has ended, and ends it at its deadline or once `over()` says so, asked each `period`."""
        fd = os.dup(self._pidfd)
        try:
            while trio.current_time() < self._bounds.deadline:
                pause = trio.current_time() + period if period else self._bounds.deadline
                with trio.move_on_at(min(pause, self._bounds.deadline)):
                    await trio.lowlevel.wait_readable(fd)
                    return
                if over is not None and await trio.to_thread.run_sync(over):
                    self.end("disk-limit")
                    return
            self.end("deadline")
        finally:
            os.close(fd)

    async def wait_gone(self) -> None:
        """Returns when bubblewrap and everything in its namespace, or the shim and all that it started, are gone."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _TEARDOWN):
            for fd in (self._pidfd, self._init_pidfd):
                if fd is not None and not self._closed:
                    await _wait_end(fd)
        if self._popen.poll() is None and self._shimmed:
            self._popen.kill()  # a shim that was stopped; its program goes with it, if not what that left behind

    def close(self) -> None:
        """Gives back what it holds; once it is gone."""
        if self._closed:
            return
        self._closed = True
        self._let_go()
        for fd in (*self._pipes, self._status_fd, self._pidfd, self._init_pidfd):
            if fd is not None:
                os.close(fd)

    # --- its output ---------------------------------------------------------------------------------------

    async def _pump(self) -> AsyncGenerator[Output | Artifact | Exit]:
        offsets = {"stdout": 0, "stderr": 0}
        left = self._bounds.output_limit
        with select.epoll() as poll:
            for fd in (*self._pipes, self._status_fd, self._pidfd):
                poll.register(fd, select.EPOLLIN)
            ended = False
            while not ended:
                await trio.lowlevel.wait_readable(poll.fileno())
                ready = {fd for fd, _ in poll.poll(0)}
                ended = self._pidfd in ready
                if self._status_fd in ready:
                    poll.unregister(self._status_fd)
                    self._find_init()
                # What was written before the end is in the pipes now; a daemon that holds them has been killed.
                for fd in self._pipes if ended else ready & self._pipes.keys():
                    while data := self._read(fd, poll, ended):
                        stream = self._pipes[fd]
                        kept = data[:left]
                        if kept:
                            yield Output(stream, kept, offsets[stream])
                        offsets[stream] += len(kept)
                        left -= len(kept)
                        self._note_error(stream, kept)
                        if len(kept) < len(data):
                            self._reason = self._reason or "output-limit"
                            self.end("output-limit")
                        if not ended:
                            break
        yield self._finish()

    def _read(self, fd: int, poll: select.epoll, ended: bool) -> bytes:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return b""
        if not data and not ended:
            poll.unregister(fd)
        return data

    def _note_error(self, stream: str, data: bytes) -> None:
        if stream == "stderr":
            self._last_error = (self._last_error + data)[-500:]

    # --- its exit -----------------------------------------------------------------------------------------

    def _find_init(self) -> None:
        """Reads what bubblewrap has reported, and takes hold of the first process of the namespace."""
        with suppress(BlockingIOError):
            while data := os.read(self._status_fd, _CHUNK):
                self._status += data
        pid = self._report("child-pid")
        if pid is not None and self._init_pidfd is None and not self._shimmed:
            with suppress(ProcessLookupError):
                self._init_pidfd = os.pidfd_open(pid)

    def _catch_init(self) -> None:
        """Takes hold of the first process before bubblewrap has reported it: stops bubblewrap and looks at its children."""
        pid = self._popen.pid
        self._popen.send_signal(signal.SIGSTOP)
        until = time.monotonic() + _STOP
        with suppress(OSError, IndexError):
            while not _stopped(pid) and time.monotonic() < until:
                time.sleep(0.0002)
            with pathlib.Path(f"/proc/{pid}/task/{pid}/children").open() as children:
                self._init_pidfd = os.pidfd_open(int(children.read().split()[0]))

    def _report(self, key: str) -> int | None:
        for line in self._status.splitlines():
            with suppress(ValueError):
                value = json.loads(line).get(key)
                if isinstance(value, int):
                    return value
        return None

    def _finish(self) -> Exit:
        if self._exit is None:
            self._find_init()
            self._exit = self._told(self._popen.wait(), self._report("exit-code"))
        return self._exit

    def _told(self, returned: int, code: int | None) -> Exit:
        by_signal = self._report("signal")
        killed = returned == -signal.SIGKILL or code == 128 + signal.SIGKILL or by_signal == signal.SIGKILL
        if self._reason in ("deadline", "output-limit", "disk-limit"):
            return Exit(kind=self._reason, signal=signal.SIGKILL)
        if killed and self._oom_kills() > self._oom_before:
            return Exit(kind="out-of-memory", signal=signal.SIGKILL)
        if self._reason == "killed":
            return Exit(kind="signal", signal=signal.SIGKILL)
        if by_signal is not None:
            return Exit(kind="disk-limit" if by_signal == signal.SIGXFSZ else "signal", signal=by_signal)
        if (exited := self._report("exited")) is not None:
            return Exit(code=exited)
        if code is None:
            return self._not_run(returned)
        if code == 128 + signal.SIGXFSZ:
            return Exit(kind="disk-limit", signal=signal.SIGXFSZ)
        if 128 < code <= 128 + _LAST_SIGNAL:
            return Exit(kind="signal", signal=code - 128)
        return Exit(code=code)

    def _not_run(self, returned: int) -> Exit:
        """The exit of a program that bubblewrap could not execute, in the shell's convention."""
        said = self._last_error.decode(errors="replace").strip()
        if returned < 0:
            raise SandboxLost(f"what held the sandbox was ended by signal {-returned} from outside")
        if "bwrap: execvp" in said:
            return Exit(code=127 if said.endswith("No such file or directory") else 126)
        failed = self._status.decode(errors="replace").partition('{"failed": "')[2].partition('"')[0]
        raise ProviderDown(f"the sandbox could not be set up: {failed or said or f'what makes it ended with {returned}'}")


def _stopped(pid: int) -> bool:
    with pathlib.Path(f"/proc/{pid}/stat").open() as stat:
        return stat.read().rpartition(")")[2].split()[0] in ("T", "Z", "X")


async def _wait_end(pidfd: int) -> None:
    # A copy, since the task that reads the events may wait for the original.
    fd = os.dup(pidfd)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
