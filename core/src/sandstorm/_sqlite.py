"""The SQLite store, a built-in plugin: one file, one host, any number of processes.

One thread writes. What is queued while it commits goes into its next transaction, so that a hundred runs share a
few waits for the disk; an operation that fails is undone alone. Reads go over a connection of their own and wait for
what was queued before them. SQLite's write-ahead log is synced at each commit (`synchronous=FULL`): what was
acknowledged survives a loss of power.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from sandstorm import _sqlite_schema as schema
from sandstorm._errors import InvalidInput, PluginError
from sandstorm._hookspecs import hookimpl
from sandstorm._limits import Limit
from sandstorm._offer import Facts
from sandstorm._registry import Registry
from sandstorm._store import AttemptRow, KeyRow, LedgerRow, Observation, RunRow, Store

if TYPE_CHECKING:
    import sqlite3

_T = TypeVar("_T")
_log = logging.getLogger("sandstorm.sqlite")

LINGER_SECONDS = 0.05
"""How long what nobody waits for may stay unwritten, in the hope of sharing the next commit."""

_URLS = '"sqlite:///relative.db", "sqlite:////absolute.db" or "sqlite://" for one in memory'


class SqlitePlugin:
    """Answers for store URLs with the scheme `sqlite`."""

    SANDSTORM_API = 1
    name = "sqlite"

    @hookimpl
    def sandstorm_store(self, url: str) -> Store | None:
        """The store for a URL such as `sqlite:////var/lib/sandstorm/journal.db`."""
        return SqliteStore(url) if url.partition(":")[0] == "sqlite" else None


def path_of(url: str) -> Path | None:
    """The absolute path of the file that `url` names, or None for a journal in memory. Raises `InvalidInput`."""
    scheme, found, path = url.partition("://")
    if scheme != "sqlite" or not found or "?" in path or "\0" in path:
        raise InvalidInput("store", _URLS, url)
    if path in ("", "/", "/:memory:"):
        return None
    if not path.startswith("/") or path.endswith("/"):
        raise InvalidInput("store", _URLS, url)
    return Path(path[1:]).absolute()


class SqliteStore:
    """A `Store` in a SQLite file, or in memory.

    A call that is cancelled before it is queued writes nothing; cancelled later, it writes all the same, and only the
    wait for it ends. Failures of the file (full, read-only, locked for longer than `busy_seconds`) are `PluginError`s
    that name it.

    Attributes:
        url: As given.
        commits: How many transactions were committed since `open`.
    """

    def __init__(self, url: str, *, inline: bool = False, busy_seconds: float = 10.0) -> None:
        """Opens nothing yet. Raises `InvalidInput` for a URL that is not SQLite's.

        `inline` commits at once on the calling thread, for virtual clocks, and then no call ever waits.
        `busy_seconds` is how long other processes may hold SQLite's lock before a call fails.
        """
        self.url = url
        self._path = path_of(url)
        self._inline = inline
        self._busy_seconds = busy_seconds
        self._registry = Registry(None if self._path is None else Path(f"{self._path}.routers"))
        self._writer: _Writer | None = None
        self._reader: _Connection | None = None

    @property
    def commits(self) -> int:
        """How many transactions were committed since `open`."""
        return self._open_writer().commits

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Opens the store and migrates it; at the end writes everything that is queued.

        Raises `InvalidInput` where the file cannot be a journal: not a database, a newer schema, no permission.
        """
        connections = await self._run(_connect, self._path, self._inline, self._busy_seconds)
        writer = _Writer(connections[0], None if self._inline else trio.lowlevel.current_trio_token())
        self._writer, self._reader = writer, connections[-1]
        try:
            yield
        finally:
            self._writer = self._reader = None
            with trio.CancelScope(shield=True):
                await self._run(_close, writer, connections)

    @asynccontextmanager
    async def enlisted(self) -> AsyncIterator[int]:
        """The epoch of a router, which lives while it holds the lock of a file of that name beside the journal."""
        registry = self._registry
        epoch, lock = await self._write(partial(_enlist, registry=registry))
        try:
            yield epoch
        finally:
            registry.leave(epoch, lock)

    async def living(self, epochs: Collection[int]) -> frozenset[int]:
        """Those whose router lives."""
        await trio.lowlevel.checkpoint()
        return frozenset(epoch for epoch in epochs if self._registry.is_living(epoch))

    async def take(self, attempt: AttemptRow, epoch: int) -> AttemptRow | None:
        """The attempt as it stands now, owned by `epoch`; None where `attempt.epoch` does not own it any more."""
        return await self._write(partial(schema.take, attempt=attempt.id, owner=attempt.epoch, epoch=epoch))

    async def begin(
        self,
        run: RunRow,
        attempt: AttemptRow,
        reserved: LedgerRow | None,
        key: KeyRow | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        """Writes the run, the intent and the reservation. Raises `Conflict` where the id is taken, `KeyTaken`, `LimitReached`."""
        ledger = None if reserved is None else schema.ledger_values(reserved)
        await self._write(
            partial(
                schema.begin,
                run=schema.run_values(run),
                attempt=schema.attempt_values(attempt),
                reserved=ledger,
                key=key,
                limits=limits,
            )
        )

    async def update(self, attempt: AttemptRow, booked: Sequence[LedgerRow] = (), *, durable: bool) -> bool:
        """Writes the attempt's progress and what it moves; False where its epoch does not own it.

        Not `durable`, the answer is True without having looked: what was fenced off shows at the next durable write.
        """
        rows = [schema.ledger_values(row) for row in booked]
        action = partial(schema.update, progress=schema.progress_values(attempt), booked=rows)
        if durable or self._inline:
            return await self._write(action)
        self._open_writer().write_soon(action)
        await trio.lowlevel.checkpoint()
        return True

    async def finish(self, run: RunRow, attempt: AttemptRow | None, booked: Sequence[LedgerRow]) -> bool:
        """Writes the result, the attempt's end and what was settled; False, and nothing, where the epoch is not its owner."""
        progress = None if attempt is None else schema.progress_values(attempt)
        rows = [schema.ledger_values(row) for row in booked]
        return await self._write(partial(schema.finish, run=schema.run_values(run), progress=progress, booked=rows))

    def observe_nowait(self, observations: Sequence[Observation]) -> None:
        """Stores aggregates within `LINGER_SECONDS`; a failure is logged."""
        rows = [(observation.key, observation.data) for observation in observations]
        self._open_writer().write_soon(partial(schema.observe, observations=rows))

    def keep_facts_nowait(self, provider: str, facts: Facts) -> None:
        """Stores an account's facts within `LINGER_SECONDS`; a failure is logged."""
        self._open_writer().write_soon(partial(schema.keep_facts, facts=schema.facts_values(provider, facts)))

    async def observations(self) -> Sequence[Observation]:
        """All aggregates."""
        return await self._read(schema.select_observations)

    async def facts(self) -> dict[str, Facts]:
        """The stored facts of every account."""
        return await self._read(schema.select_facts)

    async def runs(self, *, limit: int = 20, tenant: str | None = None, before: str | None = None) -> Sequence[RunRow]:
        """The newest runs first, by id, without `request`, `plan` and `result`."""
        if not 0 <= limit < 2**31:
            raise InvalidInput("limit", "a whole number of runs, at least 0", limit)
        return await self._read(partial(schema.select_runs, limit=limit, tenant=tenant, before=before))

    async def run(self, run_id: str) -> tuple[RunRow, Sequence[AttemptRow], Sequence[LedgerRow]] | None:
        """A run with its attempts and ledger, or None. Raises `InvalidInput` for the beginning of several ids."""
        return await self._read(partial(schema.select_run, beginning=run_id))

    async def attempts(self, markers: Collection[str]) -> Sequence[AttemptRow]:
        """The attempts with these ids, whatever their state."""
        return await self._read(partial(schema.select_attempts, markers=markers))

    async def open_attempts(self) -> Sequence[AttemptRow]:
        """Attempts of which something may exist at the vendor, oldest first."""
        return await self._read(schema.select_open_attempts)

    async def _write(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        writer = self._open_writer()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return writer.write_now(action)
        await trio.lowlevel.checkpoint_if_cancelled()
        result: _T = await writer.write(action)
        return result

    async def _read(self, query: Callable[[sqlite3.Connection], _T]) -> _T:
        writer, reader = self._open_writer(), self._reader
        assert reader is not None
        if writer.behind:
            await writer.write(_nothing)
        return await self._run(reader.read, query)

    async def _run(self, function: Callable[..., _T], *given: Any) -> _T:
        """Calls what may block: here when inline, else in a worker thread."""
        if not self._inline:
            return await trio.to_thread.run_sync(partial(function, *given))
        await trio.lowlevel.checkpoint()
        return function(*given)

    def _open_writer(self) -> _Writer:
        if self._writer is None:
            raise PluginError("sqlite", "store", f"{self.url} is not open")
        return self._writer


class _Connection:
    """A connection that one thread at a time may use."""

    def __init__(self, connection: sqlite3.Connection, name: str, busy_seconds: float) -> None:
        self.raw = connection
        self.lock = threading.Lock()
        self._name = name
        self._busy_seconds = busy_seconds

    def read(self, query: Callable[[sqlite3.Connection], _T]) -> _T:
        """What `query` reads, all of one moment."""
        with self.lock:
            try:
                return self.patiently(partial(self._read, query))
            except Exception as exc:
                raise self.readable(exc, "read") from exc

    def patiently(self, step: Callable[[], _T]) -> _T:
        """What `step` returns, tried again with jittered pauses while another process holds SQLite's lock."""
        deadline = time.monotonic() + self._busy_seconds
        pause = 0.0005
        while True:
            try:
                return step()
            except Exception as exc:
                if not _busy(exc) or time.monotonic() >= deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            pause = min(pause * 2, 0.02)

    def readable(self, exc: Exception, stage: str) -> Exception:
        """SQLite's errors as one that names the file; others as they are."""
        import sqlite3

        if not isinstance(exc, sqlite3.Error):
            return exc
        reason = f"another process kept it locked for {self._busy_seconds:g} s" if _busy(exc) else str(exc)
        return PluginError("sqlite", stage, f"{self._name}: {reason}")

    def _read(self, query: Callable[[sqlite3.Connection], _T]) -> _T:
        with schema.reading(self.raw):
            return query(self.raw)


@attrs.define(eq=False)
class _Operation:
    """Something to write, and the task that waits for it, if one does."""

    action: Callable[[sqlite3.Connection], Any]
    task: trio.lowlevel.Task | None = None
    result: Any = None
    error: Exception | None = None


class _Writer:
    """Writes operations in order: in a thread of its own where there is a loop to wake, else when called."""

    def __init__(self, connection: _Connection, token: trio.lowlevel.TrioToken | None) -> None:
        self.commits = 0
        self._connection = connection
        self._token = token
        self._queue: deque[_Operation] = deque()
        self._wake = threading.Event()
        self._asleep = False
        self._writing = False
        self._closing = False
        self._thread: threading.Thread | None = None
        if token is not None:
            # A daemon, so that a loop that died without closing the store does not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="sandstorm-sqlite", daemon=True)
            self._thread.start()

    @property
    def behind(self) -> bool:
        """Whether something that was handed over may not be committed yet."""
        return self._writing or bool(self._queue)

    @trio.lowlevel.enable_ki_protection  # a task that is queued has to be waiting when it is woken
    async def write(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Queues `action` and waits for its commit. Cancelling ends the wait, not the write."""
        operation = _Operation(action, trio.lowlevel.current_task())
        self._queue.append(operation)
        self._wake.set()

        def forget(_: object) -> trio.lowlevel.Abort:
            operation.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(forget)
        if operation.error is not None:
            raise operation.error
        return operation.result

    def write_soon(self, action: Callable[[sqlite3.Connection], Any]) -> None:
        """Queues `action` for the next commit; a failure is logged."""
        operation = _Operation(action)
        if self._thread is None:
            self._commit([operation])
            _log_failure(operation)
            return
        self._queue.append(operation)
        if self._asleep:
            self._wake.set()

    def write_now(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        """Commits `action` on the calling thread."""
        operation = _Operation(action)
        self._commit([operation])
        if operation.error is not None:
            raise operation.error
        result: _T = operation.result
        return result

    def close(self) -> None:
        """Writes what is queued and ends the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while self._queue or not self._closing:
            self._wake.wait(LINGER_SECONDS)
            if not self._queue:
                self._sleep()
            self._wake.clear()
            # Said before the queue is emptied, so that `behind` never misses what is between the two.
            self._writing = True
            batch = [self._queue.popleft() for _ in range(len(self._queue))]
            if batch:
                self._commit(batch)
            self._writing = False
            self._wake_waiters(batch)

    def _sleep(self) -> None:
        """Waits for something to do. `_asleep` tells `write_soon` that it has to wake us."""
        self._asleep = True
        if not self._queue and not self._closing:
            self._wake.wait()
        self._asleep = False

    def _commit(self, batch: Sequence[_Operation]) -> None:
        """One transaction. What fails in one operation is its own; what fails in the transaction is everybody's."""
        raw = self._connection.raw
        with self._connection.lock:
            try:
                self._connection.patiently(partial(raw.execute, "BEGIN IMMEDIATE"))
                for operation in batch:
                    self._apply(raw, operation)
                raw.execute("COMMIT")
                self.commits += 1
            except BaseException as exc:
                if raw.in_transaction:
                    raw.execute("ROLLBACK")
                if not isinstance(exc, Exception):
                    raise
                for operation in batch:
                    operation.error = self._connection.readable(exc, "write")

    def _apply(self, raw: sqlite3.Connection, operation: _Operation) -> None:
        raw.execute("SAVEPOINT operation")
        try:
            operation.result = operation.action(raw)
        except Exception as exc:
            if not raw.in_transaction:
                # SQLite has given up the whole transaction, as it does when the disk is full.
                raise
            operation.error = self._connection.readable(exc, "write")
            raw.execute("ROLLBACK TO operation")
        raw.execute("RELEASE operation")

    def _wake_waiters(self, batch: Sequence[_Operation]) -> None:
        for operation in batch:
            if operation.task is None:
                _log_failure(operation)
        assert self._token is not None
        if any(operation.task is not None for operation in batch):
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(_reschedule, batch)


def _reschedule(batch: Sequence[_Operation]) -> None:
    for operation in batch:
        if operation.task is not None:
            task, operation.task = operation.task, None
            trio.lowlevel.reschedule(task)


def _log_failure(operation: _Operation) -> None:
    if operation.error is not None:
        _log.error("not written, and nobody waited for it: %s", operation.error)


def _enlist(connection: sqlite3.Connection, registry: Registry) -> tuple[int, int]:
    """An epoch and its lock, which is held before anybody can see the epoch."""
    epoch = schema.enlist(connection, time.time())
    return epoch, registry.enter(epoch)


def _nothing(connection: sqlite3.Connection) -> None:
    """What a read writes in order to wait for the writes before it."""


def _connect(path: Path | None, inline: bool, busy_seconds: float) -> list[_Connection]:
    """The writing connection and, for a file that is written in another thread, a reading one."""
    import sqlite3

    name = str(path or ":memory:")
    opened: list[_Connection] = []
    try:
        if path is not None:
            _create_file(path)
        for _ in range(1 if inline or path is None else 2):
            # Autocommit: the store begins its transactions itself. Retries are its own too, so no busy timeout.
            raw = sqlite3.connect(name, timeout=0, isolation_level=None, check_same_thread=False)
            opened.append(_Connection(raw, name, busy_seconds))
            opened[-1].patiently(partial(_configure, raw, path))
        opened[0].patiently(partial(schema.migrate, opened[0].raw))
    except BaseException as exc:
        for connection in opened:
            connection.raw.close()
        if isinstance(exc, OSError):
            raise InvalidInput("store", f"a file that can be opened ({exc.strerror})", name) from exc
        if isinstance(exc, sqlite3.Error) and _busy(exc):
            raise opened[0].readable(exc, "open") from exc
        if isinstance(exc, sqlite3.Error):
            raise InvalidInput("store", f"a SQLite journal that can be opened ({exc})", name) from exc
        raise
    return opened


def _configure(raw: sqlite3.Connection, path: Path | None) -> None:
    schema.schema_version(raw)  # before anything is changed in what may be a file of something else
    raw.execute("PRAGMA foreign_keys = ON")
    raw.execute("PRAGMA synchronous = FULL")
    (mode,) = raw.execute("PRAGMA journal_mode = WAL").fetchone()
    if path is not None and mode != "wal":
        raise InvalidInput("store", "a file system on which SQLite can keep a write-ahead log", str(path))


def _create_file(path: Path) -> None:
    """Makes the file and its folders for this user alone, and makes sure that its name survives a loss of power."""
    for folder in reversed([folder for folder in path.parents if not folder.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def _close(writer: _Writer, connections: Sequence[_Connection]) -> None:
    writer.close()
    for connection in reversed(connections):
        connection.raw.close()


def _busy(exc: BaseException) -> bool:
    """Whether SQLite says that somebody else holds a lock. The low byte of its code names the kind of error."""
    import sqlite3

    return isinstance(exc, sqlite3.Error) and getattr(exc, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )
