"""One program from its start to what is left of it: spools of its output, and its exit."""
# ruff: noqa: PTH118 - pathlib takes longer to import than this may take to start

from __future__ import annotations

import os
import time

from sandstorm_provider_local._supervisor._input import Input
from sandstorm_provider_local._supervisor._loop import Loop
from sandstorm_provider_local._supervisor._spool import Allowance, Spool, TerminalSpool
from sandstorm_provider_local._supervisor._tree import is_gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from sandstorm_provider_local._supervisor._connection import Connection

    class Control(Protocol):
        """Who can reach what runs inside, by the name of a program."""

        def kill(self, name: str) -> list[int]:
            """Kills it with all that descends from it; the process ids on the host."""

        def signal(self, name: str, number: int) -> None:
            """Sends a signal to it."""


SIGKILL, _SIGXFSZ = 9, 25
_LOOK = 0.002
"""Seconds between two looks at whether what was killed is gone, at first; what is frozen dies later."""
_SELDOM = 0.25
_TERMINAL_GRACE = 0.2
"""Seconds for what the kernel still has of a terminal's output, where a daemon keeps the terminal open."""
_TREE_GRACE = 2.0
"""Seconds for what was killed to be gone before its end is told; it needs milliseconds, and many on a loaded machine."""


class Program:
    """A program, or a cell of an interpreter.

    Attributes:
        id: Its name in this box.
        directory: Where its output is, once it has written anything.
        owner: The connection with which it ends, or None where it is detached.
        followers: Who is told what becomes of it.
        exit: How it ended, or None while it runs.
        artifacts: What an interpreter showed.
        reason: Why it was killed, or None.
        wants_terminal: Whether it gets a terminal, which comes as it starts.
    """

    # A box keeps a thousand of them that have ended.
    __slots__ = (
        "_allowance",
        "_changed",
        "_control",
        "_deadline",
        "_doomed",
        "_gone",
        "_is_crowded",
        "_left",
        "_loop",
        "_moment",
        "_oom_before",
        "_oom_kills",
        "_size",
        "_spools",
        "_totals",
        "artifacts",
        "directory",
        "exit",
        "followers",
        "id",
        "input",
        "owner",
        "reason",
        "terminal_fd",
        "wants_terminal",
    )

    def __init__(
        self,
        loop: Loop,
        name: str,
        directory: str,
        control: Control,
        oom_kills: Callable[[], int],
        is_crowded: Callable[[], bool],
        changed: Callable[[Program], None],
    ) -> None:
        self.id = name
        self.directory = directory
        self.owner: Connection | None = None
        self.followers: set[Connection] = set()
        self.exit: dict[str, Any] | None = None
        self.artifacts: list[dict[str, Any]] = []
        self.reason: str | None = None
        self.input: Input | None = None
        self.terminal_fd = -1
        self.wants_terminal = False
        self._size: bytes | None = None
        self._control = control
        self._oom_kills = oom_kills
        self._is_crowded = is_crowded
        self._oom_before = 0
        self._loop = loop
        self._changed = changed
        self._allowance = Allowance(0, self._flood)
        self._totals: dict[str, int] = {}
        self._spools: dict[str, Spool] = {}
        self._moment: int | None = None
        self._deadline = 0.0
        self._left = 0.0
        self._doomed: dict[int, None] = {}
        self._gone: list[Callable[[], None]] = []

    # --- its start ----------------------------------------------------------------------------------------

    def allow(self, size: int) -> None:
        """Lets it write so many bytes, and kills it when it has written more."""
        self._allowance.left = size

    def _flood(self) -> None:
        self.kill("output-limit")

    def spool(self, stream: str) -> int:
        """The writing end of a pipe whose contents become a stream."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self._spools[stream] = Spool(self._loop, reading, self._path(stream), self._allowance, self._grow)
        return writing

    def begin(self, seconds: float) -> None:
        """Kills it after so many seconds, and counts what is killed for want of memory from now on."""
        self._oom_before = self._oom_kills()
        self._run_for(seconds)

    def _run_for(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._moment = self._loop.at(self._deadline, lambda: self.kill("deadline"))

    def pause(self) -> None:
        """Stops its clock."""
        if self._moment is not None:
            self._left = self._deadline - time.monotonic()
            self._loop.cancel(self._moment)

    def resume(self) -> None:
        """Goes on with what was left of its time."""
        if self._moment is not None and self.exit is None:
            self._run_for(self._left)

    def started(self) -> None:
        """It runs: a kill that came before had nothing to kill yet."""
        if self.reason is not None:
            self._kill_now()

    def terminal(self, fd: int) -> None:
        """The outer end of its terminal has come."""
        if self.exit is not None or self.terminal_fd >= 0:
            os.close(fd)
            return
        self.terminal_fd = fd
        self._spools["stdout"] = TerminalSpool(self._loop, fd, self._path("stdout"), self._allowance, self._grow)
        if self._size is not None:
            self._set_size(self._size)
        if self.input is not None:
            self.input.connect(fd)

    def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal, as soon as that has come; harmless where it is gone."""
        self._size = rows.to_bytes(2, "little") + columns.to_bytes(2, "little") + bytes(4)
        if self.terminal_fd >= 0:
            self._set_size(self._size)

    def _set_size(self, size: bytes) -> None:
        import fcntl
        import termios

        fcntl.ioctl(self.terminal_fd, termios.TIOCSWINSZ, size)

    # --- its output ---------------------------------------------------------------------------------------

    @property
    def totals(self) -> dict[str, int]:
        """Bytes in each spool."""
        return self._totals or {
            stream: self._spools[stream].total if stream in self._spools else 0 for stream in ("stdout", "stderr")
        }

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.totals.values()) + sum(int(artifact["size"]) for artifact in self.artifacts)

    def events(self) -> dict[str, Any]:
        """What a follower is told now."""
        if self.exit is None:
            return {"event": "output", "process": self.id, **self.totals}
        return {"event": "exit", "process": self.id, "exit": self.exit, **self.totals, "artifacts": self.artifacts}

    def _path(self, stream: str) -> str:
        return os.path.join(self.directory, stream)

    def _grow(self) -> None:
        self._changed(self)

    # --- its end ------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Sends a signal to it, while it runs."""
        if self.exit is None:
            self._control.signal(self.id, number)

    def kill(self, reason: str, then: Callable[[], None] | None = None) -> None:
        """Kills it with all that descends from it, and calls `then` when everything is gone. The first reason counts."""
        if self.exit is None:
            self.reason = self.reason or reason
        if then is not None:
            self._gone.append(then)
        self._kill_now()

    def _kill_now(self) -> None:
        self._doomed |= dict.fromkeys(self._control.kill(self.id))
        self._look(_LOOK)

    def _look(self, pause: float) -> None:
        self._doomed = dict.fromkeys(pid for pid in self._doomed if not is_gone(pid))
        if self._doomed:
            self._loop.after(pause, lambda: self._look(min(pause * 2, _SELDOM)))
        elif self.exit is not None:
            gone, self._gone = self._gone, []
            for call in gone:
                call()

    def ended(self, told: dict[str, int] | None) -> None:
        """It ended with a `code` or by a `signal`; None where its keeper was killed, so that nobody knows."""
        self._loop.cancel(self._moment)
        now = time.monotonic()
        self._await_end(told, now + _TERMINAL_GRACE, now + _TREE_GRACE)

    def _await_end(self, told: dict[str, int] | None, terminal_until: float, tree_until: float) -> None:
        """Waits for what belongs to its end, so that nothing is told before it is so."""
        now = time.monotonic()
        # The kernel hands the output of a terminal on in its own time, and ends it when the last program has closed it.
        talking = self.terminal_fd >= 0 and self._spools["stdout"].open and now < terminal_until
        # Who hears that it was ended at its deadline may count on its daemons having ended, too.
        dying = now < tree_until and any(not is_gone(pid) for pid in self._doomed)
        # And the kernel takes whatever comes next for the memory that it has not got back yet.
        starved = self.reason == "out-of-memory" or self._oom_kills() > self._oom_before
        if talking or dying or (starved and now < tree_until and self._is_crowded()):
            self._loop.after(_LOOK, lambda: self._await_end(told, terminal_until, tree_until))
        else:
            self._finish(told)

    def _finish(self, told: dict[str, int] | None) -> None:
        for spool in self._spools.values():
            spool.drain()
        self._totals = self.totals
        self._spools = {}
        if self.input is not None:
            self.input.close()
            self.input = None
        self.terminal_fd = -1
        self.exit = self._judge(told or {"signal": SIGKILL})
        self._changed(self)
        if self._gone:
            self._look(_LOOK)

    def _judge(self, told: dict[str, int]) -> dict[str, Any]:
        if self.reason in ("deadline", "output-limit", "out-of-memory"):
            return {"kind": self.reason, "code": None, "signal": SIGKILL}
        number = told.get("signal")
        if number == SIGKILL and self.reason is None and self._oom_kills() > self._oom_before:
            return {"kind": "out-of-memory", "code": None, "signal": SIGKILL}
        if number == _SIGXFSZ:
            return {"kind": "disk-limit", "code": None, "signal": number}
        if number is not None:
            return {"kind": "signal", "code": None, "signal": number}
        return {"kind": "exited", "code": told.get("code", 0), "signal": None}
