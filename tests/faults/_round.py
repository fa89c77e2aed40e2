"""One round: a router at work, a kill at a random moment, and everything that has to hold afterwards."""

from __future__ import annotations

import json
import math
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import _host
import attrs
import trio
from _router import ATTACHED_DISK, KEPT_DISK

from sandstorm import AsyncSandstorm, SandboxSpec
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._state import Record, Records

ROUTER = Path(__file__).with_name("_router.py")
HIGHEST_MARK = 700_000
SOON = 2.0
"""Seconds after which nothing may be left of what was attached."""
LATE = 1.5
"""Seconds that a box may take to end after its lifetime, on a machine that does other things as well."""
EARLY = 0.25
"""Seconds before the end of its lifetime at which a kept box is looked at for the last time."""
TARGETS = ("router", "router", "router", "supervisor", "bwrap", "router+supervisor", "router+bwrap", "everything")
FIRST, LAST = 0.001, 1.5
"""Seconds from the beginning of a step to the kill."""
EXPECTED = {"SandboxLost", "SandboxGone", "OutcomeUnknown"}
"""What a router that lives may raise when a supervisor or a bubblewrap is killed; a creation fails with `RunFailed`."""


class Broken(AssertionError):
    """Something that was promised does not hold."""


@attrs.frozen
class Kept:
    """A box that goes on without its router: its supervisor, and the monotonic moment at which it has to end."""

    marker: str
    supervisor: int
    ends: float


@attrs.define
class Tally:
    """What a round saw.

    Attributes:
        target: What was killed.
        step: The step at whose beginning the clock started.
        delay: Seconds from there to the kill.
        killed: How many processes were killed.
        kept: How many boxes had to live on.
        gone: Seconds until all that was attached was gone.
        seconds: How long the round took.
    """

    target: str
    step: str = "start"
    delay: float = 0.0
    killed: int = 0
    kept: int = 0
    gone: float = 0.0
    seconds: float = 0.0


class Round:
    """One of them. What it does depends on its seed alone, as far as a machine that does several things at a time allows."""

    def __init__(self, seed: str, number: int) -> None:
        self._chance = random.Random(f"{seed}-{number}")
        self._mark = HIGHEST_MARK - number - 1000 * (os.getpid() % 500)
        self._top = Path(tempfile.mkdtemp(prefix=f"kill9-{number}-"))
        self._top.chmod(0o711)
        self._state = self._top / "state"
        self._store = f"sqlite:///{self._top}/journal.db"
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._heard: list[dict[str, Any]] = []
        self._ports: dict[int, str | None] = {}
        self._dead: set[int] = set()
        self._hit: set[int] = set()
        self._closed = False
        self._before: list[Kept] = []
        self._frozen: set[str] = set()
        self._router: subprocess.Popen[bytes]
        self.tally = Tally(self._chance.choice(TARGETS))

    def play(self) -> Tally:
        """Plays it. Raises `Broken`."""
        begun = time.monotonic()
        self._start()
        try:
            self._wait_moment()
            self._kill()
            if self._router.pid not in self._dead:
                self._live_on()
            self._check_attached(time.monotonic())
            self._check_kept()
            self._check_swept()
        finally:
            self._router.kill()
            self._router.wait()
            for pid in _host.marked(self._mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self._top, ignore_errors=True)
        self.tally.seconds = time.monotonic() - begun
        return self.tally

    # --- up to the kill -----------------------------------------------------------------------------------

    def _start(self) -> None:
        config = {"state": str(self._state), "store": self._store, "seed": self._chance.random(), "mark": self._mark}
        errors = (self._top / "stderr").open("wb")
        command = [sys.executable, str(ROUTER), json.dumps(config)]
        self._router = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=self._top)
        errors.close()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._router.stdout is not None
        for line in self._router.stdout:
            heard = json.loads(line)
            if "port" in heard:
                self._ports[heard["port"]] = _host.listener(heard["port"])
            self._heard.append(heard)
            self._lines.put(heard)
        self._lines.put(None)

    def _next(self, key: str, seconds: float) -> dict[str, Any]:
        """The next line with this key."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                raise Broken(f"the router said no {key!r} for {seconds:g} seconds; last: {self._heard[-5:]}") from None
            if line is None:
                raise Broken(f"the router ended by itself: {(self._top / 'stderr').read_text()[-2000:]}")
            if key in line:
                return line

    def _wait_moment(self) -> None:
        if self._chance.random() > 0.1:
            self._next("ready", 30)
            for _ in range(self._chance.randint(1, 8)):
                self.tally.step = self._next("step", 30)["step"]
        self.tally.delay = math.exp(self._chance.uniform(math.log(FIRST), math.log(LAST)))
        time.sleep(self.tally.delay)
        if errors := [line for line in self._heard if "error" in line]:
            raise Broken(f"a router that nobody has disturbed says {errors}")

    def _kill(self) -> None:
        targets = self._targets()
        self._chance.shuffle(targets)
        # Bubblewrap is a supervisor's child, and until it has set the sandbox up there are two of it, one the other's child.
        parents = {_host.parent_of(pid) for pid in targets}
        self._hit = {*targets, *parents, *map(_host.parent_of, parents)}
        self._before = self._find_kept()
        self._check_told()
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._dead = set(targets)
        self.tally.killed = len(targets)

    def _check_told(self) -> None:
        """What the router has been promised is there up to the kill."""
        until = {line["kept"]: line["until"] for line in self._heard if "kept" in line}
        for marker in until.keys() - {kept.marker for kept in self._before}:
            if (left := until[marker] - time.time()) > EARLY:
                raise Broken(f"the kept box {marker} was gone {left:.2f} seconds early, before anything was killed")

    def _targets(self) -> list[int]:
        target = self.tally.target
        if target == "router":
            return [self._router.pid]
        alive = _host.marked(self._mark)
        supervisors = {pid for pid in alive if "_supervisor import main" in _host.command_of(pid)}
        bwraps = {pid for pid in alive if "--die-with-parent" in _host.command_of(pid)} - supervisors
        if target == "everything":
            found = [self._router.pid, *supervisors, *bwraps]
        else:
            found = [self._router.pid] if target.startswith("router") else []
            candidates = sorted(supervisors if target.endswith("supervisor") else bwraps)
            found += [self._chance.choice(candidates)] if candidates else []
        return found or [self._router.pid]

    # --- a router that lives on ---------------------------------------------------------------------------

    def _live_on(self) -> None:
        """A router whose supervisors or bubblewraps were killed clears up after them by itself, and goes on."""
        until = time.monotonic() + SOON
        heard = len(self._heard)
        while rest := self._rest_of_dead():
            if time.monotonic() > until:
                raise Broken(f"the router that lives on leaves {rest}")
            time.sleep(0.02)
        while self._router.poll() is None and time.monotonic() < until + 10:
            if any("step" in line for line in self._heard[heard:]):
                break
            time.sleep(0.02)
        else:
            raise Broken(f"the router does not go on: {self._heard[-5:]} {(self._top / 'stderr').read_text()[-2000:]}")
        for line in self._heard:
            if "error" in line and line["error"] not in EXPECTED and line["error"] != "RunFailed":
                raise Broken(f"the router says {line}")
        assert self._router.stdin is not None
        if self._chance.random() < 0.5:
            self._closed = True
            self._router.stdin.close()
            try:
                if code := self._router.wait(20):
                    raise Broken(f"the router ended with {code}: {(self._top / 'stderr').read_text()[-2000:]}")
            except subprocess.TimeoutExpired:
                raise Broken("the router does not end") from None
        else:
            self._router.kill()
        self._dead.add(self._router.pid)

    def _rest_of_dead(self) -> list[str]:
        """What is left of supervisors that were killed."""
        rest = [str(record.marker) for record in self._records() if int(record.owner.split("-")[1]) in self._dead]
        tokens = tuple(f"-{pid}-" for pid in self._dead)
        return rest + [group for group in _host.dead_groups() if any(token in group for token in tokens)]

    # --- afterwards ---------------------------------------------------------------------------------------

    def _records(self) -> list[Record]:
        return list(Records(self._state).all()) if (self._state / "boxes").is_dir() else []

    def _check_attached(self, killed_at: float) -> None:
        """All but kept boxes that have their supervisor is gone soon."""
        self._router.wait()
        while True:
            self._kept = self._find_kept()
            alive = _host.marked(self._mark)
            rest = alive - _host.below({kept.supervisor for kept in self._kept}, alive) - self._in_freezer(alive)
            if not rest:
                break
            if time.monotonic() > killed_at + SOON:
                raise Broken(f"{SOON:g} seconds after the kill there are {_host.described(rest)}")
            time.sleep(0.02)
        self.tally.gone, self.tally.kept = time.monotonic() - killed_at, len(self._kept)
        self._check_nothing_ended_early()

    def _find_kept(self) -> list[Kept]:
        kept = []
        for record in self._records():
            pid = int(record.owner.split("-")[1])
            # A record that still names the router is one whose supervisor has only just been started.
            if record.disk == KEPT_DISK and record.supervised and pid not in (*self._dead, self._router.pid):
                kept.append(Kept(record.marker, pid, time.monotonic() + record.expires_at - time.time()))
        return kept

    def _in_freezer(self, alive: set[int]) -> set[int]:
        """What is paused and has lost its supervisor: version 1 of control groups lets it die only when it is swept."""
        if self._dead == {self._router.pid}:
            return set()
        frozen = set()
        for pid in alive:
            with suppress(OSError):
                groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
                place = next((line.rpartition(":")[2] for line in groups if ":freezer:" in line), "/")
                if (Path("/sys/fs/cgroup/freezer") / place.lstrip("/") / "freezer.state").read_text().strip() != "THAWED":
                    frozen.add(pid)
        return frozen

    def _check_nothing_ended_early(self) -> None:
        there = {kept.marker for kept in self._kept}
        told = {line["kept"] for line in self._heard if "kept" in line}
        for kept in self._before:
            if self._closed and kept.marker not in told:
                continue  # a router that is closed takes back what it was still making
            left = kept.ends - time.monotonic()
            if left > EARLY and kept.marker not in there and kept.supervisor not in self._hit:
                raise Broken(f"the kept box {kept.marker} is gone {left:.2f} seconds early")

    def _check_kept(self) -> None:
        """What is kept lives until its lifetime ends, and no longer."""
        for kept in sorted(self._kept, key=lambda kept: kept.ends):
            time.sleep(max(0.0, kept.ends - EARLY - time.monotonic()))
            alive = _host.below({kept.supervisor}, _host.marked(self._mark))
            # Looked at the clock last: what took so long that the lifetime has ended proves nothing.
            if len(alive) < 3 and (left := kept.ends - time.monotonic()) > 0:
                raise Broken(f"the kept box {kept.marker} is gone {left:.2f} seconds early")
            place = self._state / "boxes" / kept.marker
            while _host.state_of(kept.supervisor) not in ("X", "Z") or place.exists():
                if time.monotonic() > kept.ends + LATE:
                    raise Broken(f"the kept box {kept.marker} is there {LATE:g} seconds after its lifetime")
                time.sleep(0.02)
        alive = _host.marked(self._mark)
        if rest := alive - self._in_freezer(alive):
            raise Broken(f"after all lifetimes there are {_host.described(rest)}")
        tokens = tuple(f"-{kept.supervisor}-" for kept in self._kept)
        if groups := [group for group in _host.dead_groups() if any(token in group for token in tokens)]:
            raise Broken(f"boxes that ended by themselves leave {groups}")

    def _check_swept(self) -> None:
        """One session later nothing is left of anything, and the next router does what it is asked."""
        self._wait_retention()
        groups = _host.dead_groups()
        trio.run(self._sweep)
        rest = sorted(groups & _host.dead_groups())
        rest += [_host.described({pid}) for pid in _host.marked(self._mark)]
        rest += _host.mounts(self._top.name)
        rest += [f"port {port}" for port, inode in self._ports.items() if inode and _host.listener(port) == inode]
        if self._state.is_dir():
            rest += _host.leftovers(self._state)
        if rest:
            raise Broken(f"after a sweep there are {rest}")
        trio.run(self._work)
        if rest := _host.leftovers(self._state):
            raise Broken(f"after the next router there are {rest}")

    def _wait_retention(self) -> None:
        for place in (self._state / "snapshots").glob("*.json"):
            with suppress(OSError, ValueError):
                time.sleep(max(0.0, json.loads(place.read_text())["expires_at"] - time.time()))

    async def _sweep(self) -> None:
        async with LocalProvider(state_dir=str(self._state)).connect():
            pass

    async def _work(self) -> None:
        """Another router with the same journal."""
        settings = {"store": self._store, "plugins": {"local": {"state_dir": str(self._state), "warn": False}}}
        async with AsyncSandstorm(settings=settings) as client:
            async with client.sandbox(SandboxSpec(memory=128, disk=ATTACHED_DISK)) as box:
                ran = await box.run(argv=("echo", "again"))
                if ran.stdout != b"again\n":
                    raise Broken(f"the next router gets {ran}")
