"""A process that ends what a killed router had only half begun, since the kernel does not.

Bubblewrap ends with its router, but the first process of a sandbox ends with bubblewrap only once it is set up. Where a
router is killed in those milliseconds, the program would start all the same, and nobody would ever end it. It runs as
`sys.executable -I -S -c …`, waits for the end of its router and imports nothing that takes long.
"""
# ruff: noqa: PTH123, PTH208 - pathlib and contextlib take longer to import than this may take to start

from __future__ import annotations

import json
import os
import sys
import time

from sandstorm_provider_local._cgroup import Hierarchy, sweep
from sandstorm_provider_local._owner import own_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
_MAIN = f"import sys; sys.path.insert(0, {_SOURCE!r}); from sandstorm_provider_local._warden import main; main(sys.argv[1:])"
_SIGKILL = 9
_WATCHED = 1.0
"""Seconds after the end of the router in which what it had begun may still appear; it takes milliseconds."""


def title() -> str:
    """What this router's bubblewraps, and the first processes of their sandboxes, are called in the list of processes."""
    return f"sandstorm-{own_token()}"


class Warden:
    """The warden of one session. It starts at once, and its router ends it when nothing is left to look after."""

    def __init__(self, hierarchy: Hierarchy | None) -> None:
        reading, self._leash = os.pipe2(os.O_CLOEXEC)
        settings = json.dumps(hierarchy.to_json() if hierarchy else None)
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, reading, 0)]
        actions += [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
        command = [sys.executable, "-I", "-S", "-c", _MAIN, title(), settings]
        try:
            self._pid = os.posix_spawn(sys.executable, command, {}, file_actions=actions, setsid=True, setsigmask=())
        except BaseException:
            os.close(self._leash)
            raise
        finally:
            os.close(reading)

    def close(self) -> None:
        """Ends it."""
        if self._leash >= 0:
            os.kill(self._pid, _SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._leash)
            self._leash = -1


def main(arguments: list[str]) -> None:
    """Waits for the end of the router that holds the other end of the standard input, and ends what bears its title."""
    name, settings = arguments[0].encode(), json.loads(arguments[1])
    while os.read(0, 1):
        pass
    until, pause = time.monotonic() + _WATCHED, 0.005
    while time.monotonic() < until:
        end_all(name)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    if settings is not None:
        sweep(Hierarchy(**settings))


def end_all(name: bytes) -> None:
    """Kills whatever is called so."""
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as command:
                    found = command.read(len(name) + 1) == name + b"\0"
                if found:
                    os.kill(int(pid), _SIGKILL)
            except OSError:
                continue
