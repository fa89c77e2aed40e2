"""The work area as a tar file, out of the box and into it; made and read inside, so that the host parses nothing of it."""

from __future__ import annotations

import os

from sandstorm_provider_local._supervisor._loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandstorm_provider_local._supervisor._agent import Agent

_CHUNK = 1 << 16
_COMPLAINT = 500
_TAR = "/usr/bin/tar"
_PACK = (_TAR, "--create", "--file=-", "--numeric-owner", "--directory=/work", ".")
_UNPACK = (_TAR, "--extract", "--file=-", "--no-same-owner", "--directory=/work")


class Tar:
    """One run of tar in a box; `done` is called with bytes, and with what went wrong or an empty text."""

    def __init__(self, loop: Loop, agent: Agent, name: str, done: Callable[[int, str], None]) -> None:
        self._loop = loop
        self._agent = agent
        self._name = name
        self._done = done
        self._size = 0
        self._most = 0
        self._target = -1
        self._pipes: dict[int, Callable[[bytes], None]] = {}
        self._said = b""
        self._problem = ""

    def pack(self, target: int, most: int, env: dict[str, str]) -> None:
        """Writes the archive to `target`, which is the receiver's now; at most so many bytes."""
        self._target = target
        self._most = most
        self._start(_PACK, env, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), self._pipe(self._store))

    def unpack(self, source: int, env: dict[str, str]) -> None:
        """Reads an archive from `source`, which is the receiver's now."""
        self._start(_UNPACK, env, source, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))

    def _start(self, argv: tuple[str, ...], env: dict[str, str], stdin: int, stdout: int) -> None:
        given = (stdin, stdout, self._pipe(self._note))
        try:
            # The spare keeper is stopped with everything else, and was given up.
            self._agent.start(self._name, {"argv": list(argv), "env": env, "cwd": "", "spare": False}, given, self)
        finally:
            for fd in given:
                os.close(fd)

    def _pipe(self, take: Callable[[bytes], None]) -> int:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        self._pipes[reading] = take
        self._loop.watch(reading, lambda _: self._take(reading))
        return writing

    def _take(self, fd: int) -> None:
        self._read(fd)

    def _read(self, fd: int) -> bool:
        """Takes what is there, and says whether there was something."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._loop.forget(fd)
            return False
        self._pipes[fd](data)
        return True

    def _store(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._most:
            self._fail(f"the archive has more than {self._most} bytes")
            return
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._target, view) :]
        except OSError as error:
            self._fail(f"it cannot be written: {error.strerror}")

    def _fail(self, problem: str) -> None:
        self._problem = self._problem or problem
        self._agent.kill(self._name)

    def _note(self, data: bytes) -> None:
        self._said = (self._said + data)[-_COMPLAINT:]

    # --- what the agent tells -----------------------------------------------------------------------------

    def started(self) -> None:
        """Nothing is to be done then."""

    def terminal(self, fd: int) -> None:
        """It has none."""
        os.close(fd)

    def kill(self, reason: str) -> None:
        """Ends it, where memory runs out."""
        self._fail(reason)

    def ended(self, told: dict[str, int] | None) -> None:
        """It is over."""
        for fd in self._pipes:
            while self._read(fd):
                pass
            self._loop.forget(fd)
            os.close(fd)
        if self._target >= 0:
            os.close(self._target)
        if told != {"code": 0}:
            self._problem = self._problem or self._said.decode(errors="replace").strip() or f"tar ended with {told}"
        self._done(self._size, self._problem)
