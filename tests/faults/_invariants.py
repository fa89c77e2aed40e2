"""What must hold at every step, judged by the vendors' own logs and the journal's rows."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import trio

from sandstorm._store import OPEN_STATES

if TYPE_CHECKING:
    from _vendors import FaultyProvider
    from _world import World

    from sandstorm.provider import Command, Order

NANO = Decimal("1E-9")
ROUNDING = Decimal("1E-8")


KNOWN = {
    "clock": "absence and cost of what was taken over are told by the wall clock, which may jump (_reconciler.py, _close, _trial)",
    "ended-unseen": "what came to be and ended before the look-up is held for absent, and booked as nothing (_reconciler.py, _close)",
    "intent": "an intent whose end the store refused stays open as long as its router lives (_reconciler.py, _due)",
}
"""Bugs of the core that the machine found and goes on with, counted by name. Whoever mends one removes it here."""


class Violation(AssertionError):
    """Something that was promised does not hold; begins with the name of what."""


class Journal:
    """Reads the journal at once, past every store, so that nothing happens in between."""

    def __init__(self, path: str) -> None:
        self._raw = sqlite3.connect(path, isolation_level=None)
        self._raw.row_factory = sqlite3.Row

    def attempts(self) -> dict[str, Any]:
        """Every attempt by its marker."""
        return {row["id"]: row for row in self._raw.execute("SELECT * FROM attempts")}

    def attempt(self, marker: str) -> Any:
        """One attempt, or None."""
        return self._raw.execute("SELECT * FROM attempts WHERE id = ?", (marker,)).fetchone()

    def runs(self) -> dict[str, Any]:
        """Every run by its id."""
        return {row["id"]: row for row in self._raw.execute("SELECT id, tenant, state FROM runs")}

    def money(self) -> dict[str, Counter[str]]:
        """Nano-dollars that were moved for each attempt, by kind."""
        moved: dict[str, Counter[str]] = defaultdict(Counter)
        for attempt, kind, amount in self._raw.execute("SELECT attempt, kind, SUM(amount) FROM ledger GROUP BY attempt, kind"):
            moved[attempt][kind] = amount
        return moved

    def close(self) -> None:
        """Lets go of the file."""
        self._raw.close()


class Guard:
    """Judges every call in the moment in which it is made."""

    def __init__(self, world: World) -> None:
        self.world = world

    def create(self, provider: FaultyProvider, order: Order) -> None:
        """An intent stands in the journal before the vendor is asked."""
        if self.world.journal.attempt(order.marker) is None:
            self.world.broken("intent", f"{order.marker} was sent and is not in the journal")

    def committed(self, provider: FaultyProvider, order: Order) -> None:
        """What comes to be in time is not held for absent; what comes later is the vendor's lie, and excused by name."""
        row = self.world.journal.attempt(order.marker)
        lag = provider.traits.commit_lag.seconds
        in_time = trio.current_time() <= order.dispatch_by + lag
        if row is None or (in_time and row["state"] in OPEN_STATES):
            return
        if in_time and not self.world.jumped and order.marker not in self.world.excused:
            self.world.broken("absence", f"{order.marker} was closed as {row['state']} while it could still come to be")
        self.world.excuse(order.marker, "it came to be after the time to send, or after its absence was concluded")

    def start(self, provider: FaultyProvider, marker: str, command: Command) -> None:
        """A start carries an id, and is durable before it is asked for."""
        row = self.world.journal.attempt(marker)
        if row is None or (row["outcome"] == "not-started" and row["epoch"] == provider.router.epoch):
            self.world.broken("start", f"{marker} is started, and the journal says that it is not")
        if not command.start_id:
            self.world.broken("start", f"{marker} is started without an id")

    def destroy(self, provider: FaultyProvider, marker: str, sandbox: str) -> None:
        """Nobody destroys what is foreign, wanted or kept."""
        world, row = self.world, self.world.journal.attempt(marker)
        if row is None:
            world.broken("foreign", f"{sandbox} with the marker {marker} is not ours, and is destroyed")
        elif row["state"] in ("intent", "bound", "started") and row["epoch"] == provider.router.epoch:
            world.broken("releasing", f"{marker} is destroyed in the state {row['state']}")
        elif row["state"] in ("intent", "bound", "started") and row["epoch"] in world.living() & {world.owners.get(marker)}:
            # Whoever has taken it over wants nothing of it but its end, so that its former owner may end it as well.
            world.broken("wanted", f"{marker} is destroyed by router {provider.router.epoch}, and {row['epoch']} uses it")
        elif marker in world.kept and world.wall() < world.kept[marker] and not world.jumped:
            world.broken("kept", f"{marker} is destroyed before its time")


def check(world: World) -> None:
    """The invariants of every step."""
    rows, money, runs = world.journal.attempts(), world.journal.money(), world.journal.runs()
    windows: Counter[tuple[str, int]] = Counter()
    for marker, row in rows.items():
        moved = money[marker]
        held = moved["reserve"] - moved["release"] + moved["settle"]
        windows[runs[row["run"]]["tenant"], int(row["created_at"] // world.window)] += held
        accrued = world.bill(row["provider"], marker)
        if held < 0:
            world.broken("booked", f"{marker} is {row['state']}, and {moved} were moved", _hurt(world, marker, "booked-twice"))
        if accrued > held * NANO + ROUNDING and marker not in world.excused:
            world.broken(
                "money",
                f"{marker} has cost {accrued} and {held * NANO} are reserved or settled ({row['state']})",
                _short(world, row),
            )
    for (tenant, number), held in windows.items():
        if held * NANO > world.limit + ROUNDING:
            world.broken("limit", f"{held * NANO} of {world.limit} are reserved or settled for {tenant} in window {number}")
    _starts(world, rows)


def _starts(world: World, rows: dict[str, Any]) -> None:
    """A program starts once, and never where it was said that it did not."""
    started: Counter[str] = Counter()
    for marker, row in rows.items():
        asked = world.asked.get(row["run"])
        if asked is None or asked.box:
            continue
        starts = world.vendors[row["provider"]].vendor.starts(marker)
        started[asked.name] += starts
        if starts and marker in world.claims:
            world.broken(
                "not-started", f"{marker} was reported as not started, and the vendor started it", _hurt(world, marker, "outcome")
            )
        if starts and row["outcome"] == "not-started" and row["state"] not in OPEN_STATES:
            world.broken(
                "not-started",
                f"{marker} is {row['state']} and not started, and the vendor started it",
                _hurt(world, marker, "outcome"),
            )
        if started[asked.name] > 1 and asked.effects == "unknown":
            again = any(
                world.asked[each["run"]].name == asked.name and mark in world.store_hurt
                for mark, each in rows.items()
                if each["run"] in world.asked
            )
            world.broken("twice", f"{asked.name} was started {started[asked.name]} times", "outcome" if again else None)


def _hurt(world: World, marker: str, known: str) -> str | None:
    """The known bug behind it, where the store failed at this attempt."""
    return known if marker in world.store_hurt else None


def _short(world: World, row: Any) -> str | None:
    """The known bug behind too little money that was booked."""
    if row["id"] in world.store_hurt:
        return "booked-twice"
    if world.jumped:
        return "clock"
    if row["state"] == "absent":
        return "ended-unseen"
    return "destroy-time" if row["state"] == "released" and row["id"] in world.touched else None


def leftovers(world: World) -> list[str]:
    """What is open in the journal or lives at a vendor, but for what is kept, foreign or excused."""
    rows = world.journal.attempts()
    kept = {marker for marker, until in world.kept.items() if world.wall() < until + 300}
    left = [f"{marker} is {row['state']}" for marker, row in rows.items() if row["state"] in OPEN_STATES and marker not in kept]
    for provider in world.vendors.values():
        live = {info.marker for info in provider.vendor.live()}
        left += [f"{marker} lives" for marker in live - kept - world.foreign - set(world.excused) if marker is not None]
    return left


def settled(world: World) -> None:
    """Once nothing is open nothing is reserved, and what was settled covers the bill; exactly so where nothing went wrong."""
    rows, money = world.journal.attempts(), world.journal.money()
    for marker, row in rows.items():
        moved, bill = money[marker], world.bill(row["provider"], marker)
        if moved["reserve"] != moved["release"]:
            world.broken(
                "ledger",
                f"{marker} is {row['state']}, and {moved} leaves something reserved",
                _hurt(world, marker, "booked-twice"),
            )
        paid = moved["settle"] * NANO
        if marker in world.excused:
            continue
        if paid + ROUNDING < bill:
            world.broken("ledger", f"{marker} cost {bill}, and {paid} were settled", _short(world, row))
        if row["kept"] or row["epoch"] != world.owners.get(marker):
            continue  # it was ended by somebody who knows when it must have ended, and not when it did
        if marker not in world.touched and not world.disturbed and paid > bill + ROUNDING:
            world.broken("ledger", f"{marker} cost {bill}, and {paid} were settled although nothing went wrong")
