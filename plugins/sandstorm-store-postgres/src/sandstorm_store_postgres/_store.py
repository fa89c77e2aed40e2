"""The PostgreSQL store: the journal of routers on any number of hosts, in the schema `sandstorm` of one database.

One thread writes. What is queued while it commits goes into its next transaction, so that a hundred runs share a few
commits. Reads go over the other connections of a pool, in worker threads, and wait for what this store was told to
write before them. Every connection commits with `synchronous_commit` of at least `on`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import trio

from sandstorm import InvalidInput, PluginError
from sandstorm.policy import AttemptRow, Facts, KeyRow, LedgerRow, Limit, Observation, RunRow
from sandstorm_store_postgres import _lease as leases
from sandstorm_store_postgres import _rows as rows
from sandstorm_store_postgres._committer import Committer
from sandstorm_store_postgres._database import POOL_SIZE, Connection, Database
from sandstorm_store_postgres._migrate import migrate
from sandstorm_store_postgres._writer import Writer

_T = TypeVar("_T")


class PostgresStore:
    """A `Store` in a PostgreSQL database.

    A call that is cancelled before it is queued writes nothing; cancelled later, it writes all the same, and only the
    wait for it ends. Failures of the database are `PluginError`s that name it, without its password; those that may
    pass (a lost connection, a server that restarts, a deadlock) are tried again for `patience` seconds first.

    Attributes:
        url: The URL that it was made from, without its password and its parameters.
    """

    def __init__(self, url: str, *, inline: bool = False, patience: float = 10.0, lease: float = 15.0) -> None:
        """Connects to nothing yet. Raises `InvalidInput` for a URL that is not PostgreSQL's.

        `inline` commits at once on the calling thread, for virtual clocks. `lease` is how many seconds of the
        database's clock after its last sign of life a router counts as dead.
        """
        self._database = Database(url, patience)
        self.url = self._database.url
        self._inline = inline
        self._terms = leases.Terms.lasting(lease)
        self._readers = trio.CapacityLimiter(POOL_SIZE - 2)
        self._committer = Committer(self._database)
        self._writer: Writer | None = None

    def __repr__(self) -> str:
        return f"PostgresStore({self.url!r})"

    @property
    def commits(self) -> int:
        """How many transactions were committed since `open`."""
        self._open_writer()
        return self._committer.commits

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connects and migrates; at the end writes everything that is queued.

        Raises `PluginError` where the database cannot be reached, and `InvalidInput` where it cannot be a journal.
        """
        await self._run(self._connect)
        self._committer = Committer(self._database)
        self._writer = Writer(self._committer.commit, None if self._inline else trio.lowlevel.current_trio_token())
        try:
            yield
        finally:
            writer, self._writer = self._writer, None
            with trio.CancelScope(shield=True):
                await self._run(self._close, writer)

    @asynccontextmanager
    async def enlisted(self) -> AsyncIterator[int]:
        """The epoch of a router, which lives while its lease is renewed: a fifth of the lease apart, in a thread."""
        epoch = await self._write(partial(leases.enlist, terms=self._terms))
        lease = leases.Lease(self._database, epoch, self._terms)
        try:
            yield epoch
        finally:
            with trio.CancelScope(shield=True):
                await self._run(lease.end)

    async def living(self, epochs: Collection[int]) -> frozenset[int]:
        """Those whose router lives; all that have not left, for a lease's time after the store could not be written."""
        return await self._read(partial(leases.living, epochs=epochs, terms=self._terms))

    async def take(self, attempt: AttemptRow, epoch: int) -> AttemptRow | None:
        """The attempt as it stands now, owned by `epoch`; None where `attempt.epoch` does not own it any more."""
        return await self._write(partial(rows.take, attempt=attempt.id, owner=attempt.epoch, epoch=epoch))

    async def begin(
        self,
        run: RunRow,
        attempt: AttemptRow,
        reserved: LedgerRow | None,
        key: KeyRow | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        """Writes the run with its key, the intent and the reservation, or nothing.

        Raises `Conflict` where the attempt's id is taken, `KeyTaken` where another run holds the key, and `LimitReached`.
        """
        ledger = None if reserved is None else rows.ledger_values(reserved)
        action = partial(rows.begin, run=rows.run_values(run), attempt=rows.attempt_values(attempt), reserved=ledger)
        await self._write(partial(action, key=key, limits=limits))

    async def update(self, attempt: AttemptRow, booked: Sequence[LedgerRow] = (), *, durable: bool) -> bool:
        """Writes the attempt's progress and what it moves; False where its epoch does not own it.

        Not `durable`, the answer is True without having looked: what was fenced off shows at the next durable write.
        """
        ledger = [rows.ledger_values(row) for row in booked]
        action = partial(rows.update, progress=rows.progress_values(attempt), booked=ledger)
        if durable or self._inline:
            return await self._write(action)
        self._open_writer().write_soon(action)
        await trio.lowlevel.checkpoint()
        return True

    async def finish(self, run: RunRow, attempt: AttemptRow | None, booked: Sequence[LedgerRow]) -> bool:
        """Writes the result, the attempt's end and what was settled; False, and nothing, where the epoch is not its owner."""
        progress = None if attempt is None else rows.progress_values(attempt)
        ledger = [rows.ledger_values(row) for row in booked]
        return await self._write(partial(rows.finish, run=rows.run_values(run), progress=progress, booked=ledger))

    def observe_nowait(self, observations: Sequence[Observation]) -> None:
        """Stores aggregates soon; a failure is logged."""
        values = [rows.observation_values(observation) for observation in observations]
        self._open_writer().write_soon(partial(rows.observe, observations=values))

    def keep_facts_nowait(self, provider: str, facts: Facts) -> None:
        """Stores an account's facts soon; a failure is logged."""
        self._open_writer().write_soon(partial(rows.keep_facts, facts=rows.facts_values(provider, facts)))

    async def observations(self) -> Sequence[Observation]:
        """All aggregates."""
        return await self._read(rows.select_observations)

    async def facts(self) -> dict[str, Facts]:
        """The stored facts of every account."""
        return await self._read(rows.select_facts)

    async def runs(self, *, limit: int = 20, tenant: str | None = None, before: str | None = None) -> Sequence[RunRow]:
        """The newest runs first, by id, without `request`, `plan` and `result`."""
        if not 0 <= limit < 2**31:
            raise InvalidInput("limit", "a whole number of runs, at least 0", limit)
        return await self._read(partial(rows.select_runs, limit=limit, tenant=tenant, before=before))

    async def run(self, run_id: str) -> tuple[RunRow, Sequence[AttemptRow], Sequence[LedgerRow]] | None:
        """A run with its attempts and ledger, or None. Raises `InvalidInput` for the beginning of several ids."""
        return await self._read(partial(rows.select_run, beginning=run_id))

    async def attempts(self, markers: Collection[str]) -> Sequence[AttemptRow]:
        """The attempts with these ids, whatever their state."""
        return await self._read(partial(rows.select_attempts, markers=markers))

    async def open_attempts(self) -> Sequence[AttemptRow]:
        """Attempts of which something may exist at the vendor, oldest first."""
        return await self._read(rows.select_open_attempts)

    async def _write(self, action: Callable[[Connection], _T]) -> _T:
        writer = self._open_writer()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return writer.write_now(action)
        await trio.lowlevel.checkpoint_if_cancelled()
        result: _T = await writer.write(action)
        return result

    async def _read(self, query: Callable[[Connection], _T]) -> _T:
        writer = self._open_writer()
        if writer.behind:
            await writer.write(_nothing)
        read = partial(self._select, query)
        if not self._inline:
            # Cancelled, the thread ends by itself and gives its connection back.
            return await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self._readers)
        return await self._run(read)

    async def _run(self, function: Callable[..., _T], *given: Any) -> _T:
        """Calls what may block: here when inline, else in a worker thread."""
        if not self._inline:
            return await trio.to_thread.run_sync(partial(function, *given))
        await trio.lowlevel.checkpoint()
        return function(*given)

    def _select(self, query: Callable[[Connection], _T]) -> _T:
        try:
            return self._database.patiently(partial(self._select_once, query))
        except Exception as exc:
            raise self._database.readable(exc, "read") from exc

    def _select_once(self, query: Callable[[Connection], _T]) -> _T:
        with self._database.connection() as connection:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")  # all that is read is of one moment
            result = query(connection)
            connection.execute("COMMIT")
            return result

    def _connect(self) -> None:
        try:
            migrate(self._database)
            self._database.open()
        except Exception as exc:
            raise self._database.readable(exc, "open") from exc

    def _close(self, writer: Writer) -> None:
        writer.close()
        self._database.close()

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise PluginError("postgres", "store", f"{self.url} is not open")
        return self._writer


def _nothing(connection: Connection) -> None:
    """What a read writes in order to wait for the writes before it."""
