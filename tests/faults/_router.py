"""A router that is going to be killed: it does a random mix of everything until its input ends.

Run as `python _router.py CONFIG` with a JSON object of `state`, `store`, `seed` and `mark`. Each line that it prints is a JSON
object: `{"step": …}` before a step begins, `{"error": …}` where one raised, `{"kept": …, "until": …}` for a box that has to be
there until that moment, and `{"port": …}` for a listener of the host.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from sandstorm import AsyncSandstorm, SandboxSpec

ATTACHED_DISK, KEPT_DISK = 16, 17
"""MiB; the size of its disk tells from a record whether a box is kept."""
SLACK = 0.2
ACTORS = 2
DAEMONS = (
    "true",
    "sleep 0.3",
    "(setsid sleep 999 &); sleep 0.2",
    "(setsid sh -c 'sleep 998 & sleep 997' >&1 2>&1 &) & sleep 0.1",
    "python3 -c 'import os, time; os.fork() or os.setsid() or os.fork() or time.sleep(996)'; sleep 0.2",
    "head -c 300000 /dev/zero; sleep 0.1; echo late >&2",
)


def say(**line: Any) -> None:
    """Tells whoever is going to kill this process."""
    os.write(1, json.dumps(line).encode() + b"\n")


class Actor:
    """One task that does one step after the other."""

    def __init__(self, client: AsyncSandstorm, chance: random.Random) -> None:
        self._client = client
        self._chance = chance

    async def run(self) -> None:
        """Never returns."""
        steps = (self._one_shot, self._one_shot, self._detached, self._attached, self._attached, self._kept, self._kept)
        while True:
            await self._step(self._chance.choice(steps))

    async def _step(self, step: Callable[..., Awaitable[None]], *args: Any) -> None:
        name = step.__name__.lstrip("_")
        say(step=name)
        try:
            await step(*args)
        except* Exception as group:  # the killer judges them
            for error in leaves(group):
                attempts = getattr(error, "attempts", ())
                classes = [attempt.error_class for attempt in attempts]
                say(error=type(error).__name__, classes=classes, step=name, text=str(error)[:300])

    def _spec(self, *, keep: bool) -> SandboxSpec:
        disk = KEPT_DISK if keep else ATTACHED_DISK
        return SandboxSpec(memory=128, disk=disk, files={"seed": b"x" * self._chance.randrange(100_000)})

    def _script(self) -> tuple[str, ...]:
        return ("bash", "-c", self._chance.choice(DAEMONS))

    async def _one_shot(self) -> None:
        await self._client.run(argv=self._script(), spec=self._spec(keep=False), timeout=30)

    async def _detached(self) -> None:
        await self._client.detach(argv=("sleep", "995"), spec=self._spec(keep=True), lifetime=self._lifetime(), timeout=600)

    async def _attached(self) -> None:
        async with self._client.sandbox(self._spec(keep=False), lifetime=300) as box:
            await self._use(box, keep=False)

    async def _kept(self) -> None:
        lifetime = self._lifetime()
        async with self._client.sandbox(self._spec(keep=True), lifetime=lifetime, keep=True) as box:
            say(kept=box.id, until=box.expires_at - SLACK)
            await self._use(box, keep=True)

    def _lifetime(self) -> float:
        return self._chance.uniform(2.5, 4.0)

    async def _use(self, box: Any, *, keep: bool) -> None:
        """Does a few things in a box; when it is kept it has to outlive all of them."""
        uses = [
            self._program,
            self._program,
            self._interactive,
            self._upload,
            self._cell,
            self._port,
            self._pause,
            self._snapshot,
        ]
        uses += [self._fork, *([self._extend] if keep else [])]
        for use in self._chance.sample(uses, self._chance.randint(1, 3)):
            await self._step(use, box, keep)

    # --- in a box -----------------------------------------------------------------------------------------

    async def _program(self, box: Any, keep: bool) -> None:
        await box.run(argv=self._script(), timeout=30)

    async def _interactive(self, box: Any, keep: bool) -> None:
        terminal = self._chance.choice([None, (80, 24)])
        async with box.exec("cat", interactive=True, terminal=terminal, timeout=30) as cat:
            await cat.write(b"hello\n")
            await trio.sleep(self._chance.uniform(0, 0.1))

    async def _upload(self, box: Any, keep: bool) -> None:
        await box.upload("a/b/c", bytes(self._chance.randrange(4_000_000)))
        await box.download("a/b/c")

    async def _cell(self, box: Any, keep: bool) -> None:
        await box.run("x = 1; import time; time.sleep(0.1); print(x)", "python", keep_state=True, timeout=30)

    async def _port(self, box: Any, keep: bool) -> None:
        await box.run(argv=("bash", "-c", "python3 -m http.server 8000 >/dev/null 2>&1 &"), timeout=30)
        url = await box.url(8000)
        say(port=int(url.rpartition(":")[2]))
        with suppress(OSError):
            await trio.to_thread.run_sync(fetch, url, abandon_on_cancel=True)

    async def _pause(self, box: Any, keep: bool) -> None:
        await box.pause()
        say(paused=box.id)
        await trio.sleep(self._chance.uniform(0, 0.2))
        await box.resume()

    async def _snapshot(self, box: Any, keep: bool) -> None:
        await box.snapshot(retention=2.0)

    async def _fork(self, box: Any, keep: bool) -> None:
        async with box.fork(keep=keep) as copy:
            await copy.run(argv=("cat", "seed"), timeout=30)

    async def _extend(self, box: Any, keep: bool) -> None:
        lifetime = self._lifetime()
        say(kept=box.id, until=0.0)  # from here on the moment is known only once it has been answered
        begun = time.time()
        await box.extend(lifetime)
        say(kept=box.id, until=begun + lifetime - SLACK)


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """The errors in a group, and in the groups in it."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def fetch(url: str) -> None:
    """Takes what the server says."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        answer.read()


async def main(config: dict[str, Any]) -> None:
    """Acts until the input ends."""
    settings = {"store": config["store"], "plugins": {"local": {"state_dir": config["state"]}}}
    async with AsyncSandstorm(settings=settings) as client, trio.open_nursery() as nursery:
        say(ready=os.getpid())
        for number in range(ACTORS):
            nursery.start_soon(Actor(client, random.Random(f"{config['seed']}-{number}")).run)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    say(closed=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    # Every process that descends from this one has the limit too, whatever becomes of its parent, user, group and command.
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (given["mark"], given["mark"]))
    trio.run(main, given)
