"""The vendor behind a reference provider: what exists there, since when, and what it charges."""

from __future__ import annotations

import heapq
from collections import Counter
from decimal import Decimal
from itertools import count

import attrs
import trio

from sandstorm._quote import cost
from sandstorm._result import Exit
from sandstorm._testing._program import Program
from sandstorm.provider import (
    Command,
    Conflict,
    Environment,
    InvalidSpec,
    Order,
    QuotaError,
    RateCard,
    ResourceInfo,
    SandboxGone,
    SandboxLost,
    Traits,
)


@attrs.frozen(kw_only=True)
class Call:
    """A request as it reached the vendor.

    Attributes:
        at: Seconds on the vendor's clock.
        step: What was asked for, such as `create`.
        marker: The marker of the sandbox concerned, or None.
        sandbox: The id of the sandbox concerned, or None.
        refused: The class of the error with which a create was refused, or None.
    """

    at: float
    step: str
    marker: str | None = None
    sandbox: str | None = None
    refused: str | None = None


@attrs.frozen(kw_only=True)
class Charge:
    """What one sandbox has cost so far.

    Attributes:
        sandbox: The vendor's id.
        marker: The marker that it carries.
        seconds: How long it has lived.
        usd: US dollars at the vendor's rates with the machine fully used, or None where it has no rates.
    """

    sandbox: str
    marker: str
    seconds: float
    usd: Decimal | None


class Box:
    """One sandbox at the vendor."""

    __slots__ = (
        "burned",
        "created_at",
        "ended_at",
        "ends_at",
        "files",
        "id",
        "order",
        "programs",
        "ready_at",
        "reason",
        "released",
        "running",
    )

    def __init__(self, *, sandbox_id: str, order: Order, created_at: float, ready_at: float) -> None:
        self.id = sandbox_id
        self.order = order
        self.created_at = created_at
        self.ready_at = ready_at
        self.ends_at = created_at + min(order.lifetime, order.offer.lifetime)
        self.ended_at: float | None = None
        self.reason = ""
        self.released = False
        self.files: dict[str, bytes] = dict(order.spec.files)
        self.burned: set[str] = set()
        self.programs: dict[str, Program] = {}
        self.running: list[Program] = []

    def require_alive(self) -> None:
        """Raises `SandboxGone` if it was released, `SandboxLost` if it ended in another way."""
        if self.released:
            raise SandboxGone(f"the sandbox {self.id} was released")
        if self.ended_at is not None:
            raise SandboxLost(self.reason)

    def advance(self, now: float) -> None:
        """Lets its programs do all that is due, in the order of time."""
        while self.running:
            program = min(self.running, key=lambda program: program.due_at)
            if program.due_at > now:
                return
            program.step()
            if not program.running:
                self.running.remove(program)

    def end(self, at: float, reason: str, *, released: bool) -> None:
        """Ends it at a time of the vendor's clock; its programs get no further and its files are gone."""
        self.advance(at)
        for program in self.running:
            program.lose(reason)
        self.ended_at = at
        self.reason = reason
        self.released = released
        self.files = {}
        self.programs = {}
        self.running = []


class Vendor:
    """The vendor's own side: outlives every session, and says what really happened.

    Its clock is trio's. It stands still while no event loop of trio runs, and goes on in the next one from where it was
    last looked at, the end of a session included: so a test can let one router crash and another take over. All its answers are free of charge and not in `log`.

    Attributes:
        log: Every request that reached it, oldest first.
    """

    def __init__(self, *, name: str, traits: Traits, rates: RateCard | None, start_seconds: float) -> None:
        self.log: list[Call] = []
        self._name = name
        self._traits = traits
        self._rates = rates
        self._start_seconds = start_seconds
        self._boxes: dict[str, Box] = {}
        self._live: dict[str, Box] = {}
        self._by_marker: dict[str, list[Box]] = {}
        self._ends: list[tuple[float, str]] = []
        self._starts: Counter[str] = Counter()
        self._snapshots: dict[str, tuple[float, dict[str, bytes]]] = {}
        self._environments: dict[Environment, str] = {}
        self._numbers = count(1)
        self._loop: trio.lowlevel.TrioToken | None = None
        self._offset = 0.0
        self._last = 0.0

    def now(self) -> float:
        """Seconds on the vendor's clock; outside of trio, those at which it was last looked at."""
        try:
            loop = trio.lowlevel.current_trio_token()
        except RuntimeError:
            return self._last
        if loop is not self._loop:
            self._offset = 0.0 if self._loop is None else self._last - trio.current_time()
            self._loop = loop
        self._last = max(self._last, trio.current_time() + self._offset)
        return self._last

    def live(self) -> tuple[ResourceInfo, ...]:
        """The sandboxes that exist and cost money now, oldest first, whatever `find` shows."""
        self._settle()
        return tuple(_info(box) for box in self._live.values())

    def creates(self, marker: str) -> int:
        """How many sandboxes were ever made with this marker."""
        return len(self._by_marker.get(marker, ()))

    def starts(self, name: str) -> int:
        """How many programs were started with this start id, or in sandboxes with this marker."""
        return self._starts[name]

    def bill(self, marker: str | None = None) -> tuple[Charge, ...]:
        """What every sandbox that ever existed has cost so far, or those with this marker; oldest first."""
        self._settle()
        boxes = self._boxes.values() if marker is None else self._by_marker.get(marker, ())
        return tuple(self._charge(box) for box in boxes)

    def owed(self) -> Decimal | None:
        """US dollars of the whole bill, or None where the vendor has no rates."""
        if self._rates is None:
            return None
        return sum((charge.usd for charge in self.bill() if charge.usd is not None), Decimal(0))

    def evict(self, sandbox: str, reason: str = "evicted") -> None:
        """Ends a sandbox from the vendor's side. Succeeds if it is already gone."""
        now = self._settle()
        if sandbox in self._live:
            self._end(self._live[sandbox], now, reason, released=False)

    # --- what the sessions call ----------------------------------------------------------------------------

    def reached(self, at: float) -> None:
        """A wait until this time is over: rounding must not make it last longer."""
        self._last = max(self._last, at)

    def deadline(self, at: float) -> float:
        """The time of trio's clock that means this one of the vendor's."""
        self.now()
        return at - self._offset

    def note(self, step: str, *, box: Box | None = None) -> None:
        """Writes a request into the log."""
        marker, sandbox = (box.order.marker, box.id) if box else (None, None)
        self.log.append(Call(at=self._settle(), step=step, marker=marker, sandbox=sandbox))

    def create(self, order: Order, step: str = "create") -> Box:
        """A new sandbox, or the one that the same order has made where markers are idempotency keys."""
        now = self._settle()
        try:
            box = self._taken(order) or self._new(order, now)
        except Exception as exc:
            self.log.append(Call(at=now, step=step, marker=order.marker, refused=type(exc).__name__))
            raise
        self.log.append(Call(at=now, step=step, marker=order.marker, sandbox=box.id))
        return box

    def attach(self, sandbox: str) -> Box:
        """The sandbox with this id. Raises `SandboxGone`."""
        self._settle()
        if sandbox not in self._live:
            raise SandboxGone(f"there is no sandbox {sandbox}")
        return self._live[sandbox]

    def listed(self, marker: str | None) -> tuple[ResourceInfo, ...]:
        """What a look-up shows now: sandboxes that took effect at least the find lag ago."""
        seen = self._settle() - self._traits.find_lag.seconds
        boxes = self._live.values() if marker is None else self._by_marker.get(marker, ())
        return tuple(_info(box) for box in boxes if box.ended_at is None and box.created_at <= seen)

    def start(self, box: Box, command: Command) -> Program:
        """A program in a live sandbox; the one that runs already where the start id is known."""
        start = command.start_id or f"start-{next(self._numbers)}"
        known = box.programs.get(start)
        if known is not None:
            if known.command != command:
                raise Conflict(f"the start id {start} is in use for another command")
            return known
        if start in box.burned:
            raise Conflict(f"the start {start} was burned: it never happens")
        started_at = max(self.now(), box.ready_at)
        variables = {**box.order.spec.env, **box.order.secrets}
        program = Program(
            process_id=f"{box.id}/{start}", command=command, started_at=started_at, files=box.files, variables=variables
        )
        box.programs[start] = program
        box.running.append(program)
        self._starts.update({box.order.marker, start})
        return program

    def burn(self, box: Box, start: str) -> bool:
        """Whether a start was not done, and from now on never will be."""
        if start in box.programs:
            return False
        box.burned.add(start)
        return True

    def advance(self, box: Box) -> float:
        """Lets everything that is due happen; returns the time."""
        now = self._settle()
        box.advance(now)
        return now

    def extend(self, box: Box, lifetime: float) -> None:
        """Moves the end of a sandbox to `lifetime` seconds from now."""
        box.ends_at = self.advance(box) + lifetime
        heapq.heappush(self._ends, (box.ends_at, box.id))

    def snapshot(self, box: Box, marker: str, retention: float) -> str:
        """The id of a copy of its files."""
        self._snapshots[marker] = (self.advance(box) + retention, dict(box.files))
        return marker

    def fork(self, box: Box, order: Order) -> Box:
        """Another sandbox with a copy of its files."""
        self.advance(box)
        other = self.create(order, "fork")
        other.files.update(box.files)
        return other

    def prepare(self, environment: Environment) -> str:
        """The name of an environment, built once."""
        return self._environments.setdefault(environment, f"environment-{len(self._environments) + 1}")

    def kill(self, box: Box, program: Program) -> None:
        """Ends a program, unless it has ended."""
        self.advance(box)
        program.end(Exit(kind="signal", signal=9))
        if program in box.running:
            box.running.remove(program)

    def destroy(self, box: Box) -> None:
        """Ends a sandbox, unless it has ended."""
        now = self._settle()
        if box.ended_at is None:
            self._end(box, now, "deleted", released=True)

    def _settle(self) -> float:
        """Ends what has outlived its lifetime, each at its own time; returns the time."""
        now = self.now()
        while self._ends and self._ends[0][0] <= now:
            at, sandbox = heapq.heappop(self._ends)
            box = self._live.get(sandbox)
            if box is not None and box.ends_at <= now:
                self._end(box, at, "expired", released=False)
        return now

    def _end(self, box: Box, at: float, reason: str, *, released: bool) -> None:
        box.end(at, reason, released=released)
        del self._live[box.id]

    def _taken(self, order: Order) -> Box | None:
        earlier = self._by_marker.get(order.marker)
        if not earlier or self._traits.marker == "metadata":
            return None
        box = earlier[-1]
        if self._traits.marker == "name":
            if box.ended_at is None:
                raise Conflict(f"the name {order.marker} is in use")
            return None
        if attrs.evolve(order, dispatch_by=box.order.dispatch_by) != box.order:
            raise Conflict(f"the idempotency key {order.marker} is in use for another order")
        return box

    def _new(self, order: Order, now: float) -> Box:
        _require_sound(order, self._name)
        cap = self._traits.max_concurrent
        if cap is not None and len(self._live) >= cap:
            raise QuotaError(f"the account may have {cap} sandboxes at once")
        sandbox = f"{self._name.replace(':', '-')}-{next(self._numbers)}"
        box = Box(sandbox_id=sandbox, order=order, created_at=now, ready_at=now + self._start_seconds)
        if order.spec.snapshot is not None:
            until, files = self._snapshots.get(order.spec.snapshot, (0.0, {}))
            if until <= now:
                raise InvalidSpec(f"there is no snapshot {order.spec.snapshot}")
            box.files = {**files, **box.files}
        self._boxes[box.id] = self._live[box.id] = box
        self._by_marker.setdefault(order.marker, []).append(box)
        heapq.heappush(self._ends, (box.ends_at, box.id))
        return box

    def _charge(self, box: Box) -> Charge:
        seconds = (self._last if box.ended_at is None else box.ended_at) - box.created_at
        usd = None if self._rates is None else cost(self._rates, box.order.offer, seconds, 1.0)
        return Charge(sandbox=box.id, marker=box.order.marker, seconds=seconds, usd=usd)


def _require_sound(order: Order, name: str) -> None:
    marker = order.marker
    if not 1 <= len(marker) <= 40 or set(marker) - set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise InvalidSpec("a marker has 1 to 40 of the characters a-z, 0-9 and '-'")
    if order.lifetime <= 0:
        raise InvalidSpec("a lifetime is above 0 seconds")
    if order.offer.provider != name:
        raise InvalidSpec(f"the offer is one of {order.offer.provider}")


def _info(box: Box) -> ResourceInfo:
    return ResourceInfo(id=box.id, marker=box.order.marker)
