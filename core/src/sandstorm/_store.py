"""The journal's protocol: what is durable, and when.

Rows carry JSON text that the engine has encoded, so that a store needs to know nothing of the values. Every write
to an attempt names the owner's epoch; a store answers False where that epoch no longer owns it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from typing import Protocol

import attrs

from sandstorm._limits import Limit
from sandstorm._offer import Facts


@attrs.frozen(kw_only=True)
class AttemptRow:
    """One try at a vendor, durable before the vendor is called.

    Attributes:
        id: Unique; also the marker that the vendor object carries.
        run: The id of its run.
        number: 1 for the first attempt of the run.
        provider: The account.
        offer: The offer's id.
        region: The offer's region, or "".
        kind: `sandbox`, `image`, `snapshot` or `policy`.
        state: `intent`, `bound`, `started`, `releasing`, `released`, `absent` or `ambiguous`.
        sandbox: The vendor's id, once bound.
        epoch: The owner's epoch, for fencing.
        dispatch_by: Wall-clock seconds after which the create is not sent.
        expires_at: Wall-clock seconds at which the vendor ends it at the latest.
        exposure: US dollars reserved for it, or None where the price is unknown.
        outcome: The value of an `Outcome`.
        error: What went wrong, or None.
        error_class: The class of the error.
        created_at: Wall-clock seconds.
        create_seconds: From the call of create to the sandbox.
        start_seconds: From the call of create to the program running.
        kept: Whether it outlives its router, until `expires_at`.
        process: The vendor's id of its detached program, or None.
    """

    id: str
    run: str
    number: int
    provider: str
    offer: str
    region: str = ""
    kind: str = "sandbox"
    state: str = "intent"
    sandbox: str | None = None
    epoch: int = 0
    dispatch_by: float
    expires_at: float
    exposure: Decimal | None = None
    outcome: str = "not-started"
    error: str | None = None
    error_class: str | None = None
    created_at: float
    create_seconds: float | None = None
    start_seconds: float | None = None
    kept: bool = attrs.field(default=False, converter=bool)
    process: str | None = None


OPEN_STATES = ("intent", "bound", "started", "releasing", "ambiguous")
"""The states in which something may exist at the vendor."""


@attrs.frozen(kw_only=True)
class RunRow:
    """A run as it is stored.

    Attributes:
        id: Unique; sorts by time.
        tenant: Its tenant.
        created_at: Wall-clock seconds.
        state: `running`, `finished`, `failed`, `cancelled` or `unknown`.
        title: What people see in a list: the language or the command.
        request: JSON of the `Request`, as far as the setting `keep` allows.
        plan: JSON of the `Plan`, likewise; None until it is made.
        result: JSON of the `RunResult` without its plan, or of the error; None until it ended.
        provider: The account that ran it, or None.
        exit: The exit status in the shell's convention, or None.
        seconds: From the call to the result, or None.
        cost: US dollars, or None where unknown.
    """

    id: str
    tenant: str
    created_at: float
    state: str = "running"
    title: str = ""
    request: str = "{}"
    plan: str | None = None
    result: str | None = None
    provider: str | None = None
    exit: int | None = None
    seconds: float | None = None
    cost: Decimal | None = None


@attrs.frozen(kw_only=True)
class KeyRow:
    """Which run an idempotency key means.

    Attributes:
        tenant: Keys are unique within a tenant.
        key: The caller's.
        run: The run that was admitted with it.
        fingerprint: What was asked for, as a digest: the same key with another one is a conflict.
    """

    tenant: str
    key: str
    run: str
    fingerprint: str


class LimitReached(Exception):
    """A reservation does not fit a limit: it would be passed if everything that is open cost what it can."""

    def __init__(self, limit: Limit, wanted: Decimal | None, left: Decimal) -> None:
        asked = "its price is unknown" if wanted is None else f"it can cost up to ${wanted.normalize():f}"
        window = f"in {limit.window:g} s"
        super().__init__(f"{asked}, and ${left.normalize():f} of ${limit.usd.normalize():f} {window} are left for {limit.key}")
        self.limit = limit


class KeyTaken(Exception):
    """Another run holds the key: `held` says which."""

    def __init__(self, held: KeyRow) -> None:
        super().__init__(f"the key {held.key!r} is that of run {held.run}")
        self.held = held


@attrs.frozen(kw_only=True)
class LedgerRow:
    """One movement of money.

    Attributes:
        attempt: The attempt that it belongs to.
        run: Its run.
        tenant: Its tenant.
        provider: The account.
        kind: `reserve`, `release` or `settle`.
        amount: US dollars; never negative.
        basis: `exposure`, `estimated`, `metered` or `billed`.
        at: Wall-clock seconds.
    """

    attempt: str
    run: str
    tenant: str
    provider: str
    kind: str
    amount: Decimal
    basis: str
    at: float


@attrs.frozen(kw_only=True)
class Observation:
    """The aggregate of what was seen under one key, as JSON of the engine's own."""

    key: str
    data: str


class Store(Protocol):
    """Keeps the journal. `open` is entered once for each engine.

    A call returns once what it wrote is durable, unless it says otherwise.
    """

    @property
    def url(self) -> str:
        """The URL that it was made from."""
        ...

    def open(self) -> AbstractAsyncContextManager[None]:
        """Opens the store, migrates it, and closes it at the end after everything queued was written."""
        ...

    def enlisted(self) -> AbstractAsyncContextManager[int]:
        """The epoch of a router, never given before. It lives until the context ends or its process does, however that ends."""
        ...

    async def living(self, epochs: Collection[int]) -> frozenset[int]:
        """Those whose router lives."""
        ...

    async def take(self, attempt: AttemptRow, epoch: int) -> AttemptRow | None:
        """The attempt as it stands now, owned by `epoch`; None where `attempt.epoch` does not own it any more."""
        ...

    async def begin(
        self,
        run: RunRow,
        attempt: AttemptRow,
        reserved: LedgerRow | None,
        key: KeyRow | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        """First barrier: the run (if it is new) with its key, the intent and the reservation, in one commit.

        A reservation fits a limit where what was settled in its window, and what is reserved there, leave room for all of it;
        else this raises `LimitReached`, and writes nothing. Later movements of the attempt count in the same window.
        Raises `KeyTaken`, and writes nothing, where another run holds the key. A run that ended without having started
        anything does not hold it any more.
        """
        ...

    async def update(self, attempt: AttemptRow, booked: Sequence[LedgerRow] = (), *, durable: bool) -> bool:
        """Writes the attempt's progress, and the money that moves with it, where its epoch still owns it.

        Raises `LimitReached`, and writes nothing, where a further reservation does not fit.
        What `begin` said of its identity (run, number, provider, offer, region, kind, created_at) stays. Not `durable`
        means soon and in order; the answer may then be True without having looked, and the next durable write tells.
        """
        ...

    async def finish(self, run: RunRow, attempt: AttemptRow | None, booked: Sequence[LedgerRow]) -> bool:
        """Last barrier: the result, the attempt's state, and what was settled, in one commit.

        Without an attempt it writes the run alone; money then has no place to move to, so `booked` is empty.
        """
        ...

    def observe_nowait(self, observations: Sequence[Observation]) -> None:
        """Stores aggregates soon; losing the last ones in a crash is allowed."""
        ...

    async def observations(self) -> Sequence[Observation]:
        """All aggregates."""
        ...

    def keep_facts_nowait(self, provider: str, facts: Facts) -> None:
        """Stores an account's facts soon."""
        ...

    async def facts(self) -> dict[str, Facts]:
        """The stored facts of every account."""
        ...

    async def runs(self, *, limit: int = 20, tenant: str | None = None, before: str | None = None) -> Sequence[RunRow]:
        """The newest runs first; `before` is the id of the last one seen. `request`, `plan` and `result` are left out."""
        ...

    async def run(self, run_id: str) -> tuple[RunRow, Sequence[AttemptRow], Sequence[LedgerRow]] | None:
        """A run by its id or an unambiguous beginning of it, with its attempts and ledger, or None."""
        ...

    async def attempts(self, markers: Collection[str]) -> Sequence[AttemptRow]:
        """The attempts with these ids, whatever their state; ids that are not known are left out."""
        ...

    async def open_attempts(self) -> Sequence[AttemptRow]:
        """Attempts of which something may exist at the vendor."""
        ...
