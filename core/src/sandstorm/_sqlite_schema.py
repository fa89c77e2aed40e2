"""The SQLite journal's tables, and what is read from and written to them on one connection.

Amounts of money are whole nano-dollars. The marker of an attempt is its primary key. Large columns stand last in
their table, so that a listing does not read them. Nothing here starts or ends a transaction but `migrate` and
`reading`; the store decides what is committed together.
"""

# ruff: noqa: S608 - only names of our own columns are put into statements, and values are bound

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any

from sandstorm._errors import Conflict, InvalidInput
from sandstorm._limits import Limit
from sandstorm._offer import Facts
from sandstorm._store import OPEN_STATES, AttemptRow, KeyRow, KeyTaken, LedgerRow, LimitReached, Observation, RunRow

if TYPE_CHECKING:
    import sqlite3

RUN_SUMMARY = ("id", "tenant", "created_at", "state", "title", "provider", "exit", "seconds", "cost")
RUN_COLUMNS = (*RUN_SUMMARY, "request", "plan", "result")
ATTEMPT_IDENTITY = ("id", "run", "number", "provider", "offer", "region", "kind", "epoch", "created_at")
ATTEMPT_PROGRESS = (
    "state",
    "sandbox",
    "dispatch_by",
    "expires_at",
    "exposure",
    "outcome",
    "error",
    "error_class",
    "create_seconds",
    "start_seconds",
    "kept",
    "process",
)
ATTEMPT_COLUMNS = (*ATTEMPT_IDENTITY, *ATTEMPT_PROGRESS)
LEDGER_COLUMNS = ("attempt", "run", "tenant", "provider", "kind", "amount", "basis", "at")
MONEY_COLUMNS = frozenset({"cost", "exposure", "amount"})

# SQLite uses a partial index only where the query repeats the index's own condition.
_OPEN = "state IN ({})".format(", ".join(f"'{state}'" for state in OPEN_STATES))

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (
            id TEXT NOT NULL PRIMARY KEY,
            tenant TEXT NOT NULL,
            created_at REAL NOT NULL,
            state TEXT NOT NULL,
            title TEXT NOT NULL,
            provider TEXT,
            exit INTEGER,
            seconds REAL,
            cost INTEGER,
            request TEXT NOT NULL,
            plan TEXT,
            result TEXT
        )""",
        "CREATE INDEX runs_tenant ON runs (tenant, id)",
        """CREATE TABLE attempts (
            id TEXT NOT NULL PRIMARY KEY,
            run TEXT NOT NULL REFERENCES runs (id),
            number INTEGER NOT NULL,
            provider TEXT NOT NULL,
            offer TEXT NOT NULL,
            region TEXT NOT NULL,
            kind TEXT NOT NULL,
            epoch INTEGER NOT NULL,
            created_at REAL NOT NULL,
            state TEXT NOT NULL,
            sandbox TEXT,
            dispatch_by REAL NOT NULL,
            expires_at REAL NOT NULL,
            exposure INTEGER,
            outcome TEXT NOT NULL,
            error TEXT,
            error_class TEXT,
            create_seconds REAL,
            start_seconds REAL
        )""",
        "CREATE INDEX attempts_run ON attempts (run, number)",
        f"CREATE INDEX attempts_open ON attempts (created_at) WHERE {_OPEN}",
        """CREATE TABLE ledger (
            number INTEGER PRIMARY KEY,
            attempt TEXT NOT NULL REFERENCES attempts (id),
            run TEXT NOT NULL REFERENCES runs (id),
            tenant TEXT NOT NULL,
            provider TEXT NOT NULL,
            kind TEXT NOT NULL,
            amount INTEGER NOT NULL CHECK (amount >= 0),
            basis TEXT NOT NULL,
            at REAL NOT NULL
        )""",
        "CREATE INDEX ledger_run ON ledger (run)",
        "CREATE TABLE observations (key TEXT NOT NULL PRIMARY KEY, data TEXT NOT NULL)",
        "CREATE TABLE facts (provider TEXT NOT NULL PRIMARY KEY, at REAL NOT NULL, ttl REAL NOT NULL, data TEXT NOT NULL)",
    ),
    (
        "ALTER TABLE attempts ADD COLUMN kept INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE attempts ADD COLUMN process TEXT",
    ),
    ("CREATE TABLE IF NOT EXISTS routers (epoch INTEGER PRIMARY KEY AUTOINCREMENT, started_at REAL NOT NULL)",),
    (
        """CREATE TABLE keys (
            tenant TEXT NOT NULL,
            key TEXT NOT NULL,
            run TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            PRIMARY KEY (tenant, key)
        )""",
    ),
    (
        """CREATE TABLE windows (
            key TEXT NOT NULL,
            seconds REAL NOT NULL,
            number INTEGER NOT NULL,
            used INTEGER NOT NULL,
            PRIMARY KEY (key, seconds, number)
        )""",
        """CREATE TABLE holds (
            attempt TEXT NOT NULL REFERENCES attempts (id),
            key TEXT NOT NULL,
            seconds REAL NOT NULL,
            number INTEGER NOT NULL,
            usd INTEGER NOT NULL,
            PRIMARY KEY (attempt, key, seconds)
        )""",
    ),
)
"""One entry for each schema version; `PRAGMA user_version` says how many of them a file has had."""


def _insert(name: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def _upsert(name: str, columns: Sequence[str]) -> str:
    key, *others = columns
    return f"{_insert(name, columns)} ON CONFLICT ({key}) DO UPDATE SET " + ", ".join(f"{c} = excluded.{c}" for c in others)


_SAVE_RUN = _upsert("runs", RUN_COLUMNS)
_ADD_ATTEMPT = _insert("attempts", ATTEMPT_COLUMNS)
_SAVE_ATTEMPT = f"UPDATE attempts SET {', '.join(f'{c} = ?' for c in ATTEMPT_PROGRESS)} WHERE id = ? AND epoch = ?"
_TAKE = "UPDATE attempts SET epoch = ? WHERE id = ? AND epoch = ?"
_HOLDS = """SELECT 1 FROM runs WHERE id = ? AND (state NOT IN ('failed', 'cancelled')
    OR EXISTS (SELECT 1 FROM attempts WHERE attempts.run = runs.id AND outcome != 'not-started'))"""
_ADD_HOLD = "INSERT OR REPLACE INTO holds VALUES (?, ?, ?, ?, ?)"
_HOLDS_OF = "SELECT key, seconds, number, usd FROM holds WHERE attempt = ?"
_ADD_LEDGER = _insert("ledger", LEDGER_COLUMNS)
_SAVE_OBSERVATION = _upsert("observations", ("key", "data"))
_SAVE_FACTS = _upsert("facts", ("provider", "at", "ttl", "data"))

_EXACT = Context(prec=40)
_MOST_DOLLARS = 9_000_000_000
"""What still fits SQLite's integers as nano-dollars."""
_PART = 500
_LAST = "\U0010ffff"
"""Sorts after everything that an id may contain."""

_Values = tuple[Any, ...]


def nano_dollars(field: str, amount: Decimal | None) -> int | None:
    """Whole nano-dollars for US dollars, rounded up; None for None. Raises `InvalidInput` for what cannot be stored."""
    if amount is None:
        return None
    if not amount.is_finite() or not 0 <= amount <= _MOST_DOLLARS:
        raise InvalidInput(field, f"an amount from 0 to {_MOST_DOLLARS} US dollars", amount)
    return int(_EXACT.scaleb(amount, 9).to_integral_value(rounding="ROUND_CEILING"))


def run_values(run: RunRow) -> _Values:
    """A run as the columns of its table."""
    return _values(run, RUN_COLUMNS)


def attempt_values(attempt: AttemptRow) -> _Values:
    """An attempt as the columns of its table."""
    return _values(attempt, ATTEMPT_COLUMNS)


def progress_values(attempt: AttemptRow) -> _Values:
    """What changes in an attempt, and then what it is found by."""
    return (*_values(attempt, ATTEMPT_PROGRESS), attempt.id, attempt.epoch)


def ledger_values(row: LedgerRow) -> _Values:
    """A movement of money as the columns of its table."""
    return _values(row, LEDGER_COLUMNS)


def facts_values(provider: str, facts: Facts) -> _Values:
    """An account's facts as the columns of their table."""
    return (provider, facts.at, facts.ttl, json.dumps(facts.data))


def _values(row: RunRow | AttemptRow | LedgerRow, columns: Iterable[str]) -> _Values:
    return tuple([_stored(column, getattr(row, column)) for column in columns])


def _stored(column: str, value: Any) -> Any:
    if column in MONEY_COLUMNS:
        return nano_dollars(column, value)
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    # Names of files and vendors' messages may hold undecodable bytes, and a row must not be lost to them.
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def _fields(columns: Iterable[str], row: Iterable[Any]) -> dict[str, Any]:
    return {
        column: _EXACT.scaleb(Decimal(value), -9) if column in MONEY_COLUMNS and value is not None else value
        for column, value in zip(columns, row, strict=True)
    }


def schema_version(connection: sqlite3.Connection) -> int:
    """How many of `MIGRATIONS` the file has had. Raises `InvalidInput` for more than there are, and for foreign tables."""
    # In this order: another process may be migrating the file, and tables come with their version.
    filled = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise InvalidInput("store", f"a journal of schema {len(MIGRATIONS)}, the newest that this Sandstorm knows", version)
    if filled and not version:
        raise InvalidInput("store", "a journal of Sandstorm", "a database of something else")
    return version


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the tables to the newest schema. Needs the write lock, and so may raise SQLite's own "busy"."""
    if schema_version(connection) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in MIGRATIONS[schema_version(connection) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


# --- writing ----------------------------------------------------------------------------------------------


def enlist(connection: sqlite3.Connection, at: float) -> int:
    """An epoch that was never given before."""
    epoch = connection.execute("INSERT INTO routers (started_at) VALUES (?)", (at,)).lastrowid
    assert epoch is not None
    return epoch


def take(connection: sqlite3.Connection, attempt: str, owner: int, epoch: int) -> AttemptRow | None:
    """Makes `epoch` the owner of an attempt; None, and nothing is written, where `owner` is not."""
    if connection.execute(_TAKE, (epoch, _text(attempt), owner)).rowcount != 1:
        return None
    (taken,) = _attempts(connection, "id = ?", _text(attempt))
    return taken


def begin(
    connection: sqlite3.Connection,
    run: _Values,
    attempt: _Values,
    reserved: _Values | None,
    key: KeyRow | None = None,
    limits: Sequence[Limit] = (),
) -> None:
    """Writes a run, an attempt and its reservation. Raises `Conflict` where the id is taken, `KeyTaken`, `LimitReached`."""
    import sqlite3

    if key is not None:
        _claim(connection, key)
    connection.execute(_SAVE_RUN, run)
    try:
        connection.execute(_ADD_ATTEMPT, attempt)
    except sqlite3.IntegrityError as exc:
        if exc.sqlite_errorname == "SQLITE_CONSTRAINT_PRIMARYKEY":
            raise Conflict(f"there is an attempt {attempt[0]!r} already") from exc
        raise
    at, exposure = (attempt[ATTEMPT_COLUMNS.index(name)] for name in ("created_at", "exposure"))
    for limit in limits:
        if exposure is None:
            raise LimitReached(limit, None, limit.usd)
        connection.execute(
            _ADD_HOLD, (attempt[0], _text(limit.key), limit.window, at // limit.window, nano_dollars("usd", limit.usd))
        )
    if reserved is not None:
        _book(connection, reserved)


def _book(connection: sqlite3.Connection, row: _Values) -> None:
    """Writes a movement of money, and counts it in the window of every limit that holds its attempt."""
    attempt, kind, amount = (row[LEDGER_COLUMNS.index(name)] for name in ("attempt", "kind", "amount"))
    for key, seconds, number, usd in connection.execute(_HOLDS_OF, (attempt,)).fetchall():
        window = (key, seconds, number)
        connection.execute("INSERT OR IGNORE INTO windows VALUES (?, ?, ?, 0)", window)
        (used,) = connection.execute("SELECT used FROM windows WHERE key = ? AND seconds = ? AND number = ?", window).fetchone()
        if kind == "reserve" and used + amount > usd:
            limit = Limit(key=key, usd=_EXACT.scaleb(Decimal(usd), -9), window=seconds)
            raise LimitReached(limit, _EXACT.scaleb(Decimal(amount), -9), _EXACT.scaleb(Decimal(max(0, usd - used)), -9))
        change = -amount if kind == "release" else amount
        connection.execute("UPDATE windows SET used = used + ? WHERE key = ? AND seconds = ? AND number = ?", (change, *window))
    connection.execute(_ADD_LEDGER, row)


def _claim(connection: sqlite3.Connection, key: KeyRow) -> None:
    """Makes a key that of its run, unless another holds it: one that may have started something, or still may."""
    wanted = (_text(key.tenant), _text(key.key))
    held = connection.execute("SELECT run, fingerprint FROM keys WHERE tenant = ? AND key = ?", wanted).fetchone()
    if held is not None and held[0] != key.run and connection.execute(_HOLDS, (held[0],)).fetchone() is not None:
        raise KeyTaken(KeyRow(tenant=key.tenant, key=key.key, run=held[0], fingerprint=held[1]))
    connection.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?)", (*wanted, key.run, key.fingerprint))


def update(connection: sqlite3.Connection, progress: _Values, booked: Sequence[_Values] = ()) -> bool:
    """Writes an attempt's progress and its money; False where its epoch does not own it, and then nothing is written."""
    if connection.execute(_SAVE_ATTEMPT, progress).rowcount != 1:
        return False
    for row in booked:
        _book(connection, row)
    return True


def finish(connection: sqlite3.Connection, run: _Values, progress: _Values | None, booked: Sequence[_Values]) -> bool:
    """Writes a run's end; False where the attempt's epoch does not own it, and then nothing is written."""
    if progress is not None and not update(connection, progress, booked):
        return False
    connection.execute(_SAVE_RUN, run)
    return True


def observe(connection: sqlite3.Connection, observations: Sequence[tuple[str, str]]) -> None:
    """Writes aggregates, each in the place of the former one under its key."""
    connection.executemany(_SAVE_OBSERVATION, observations)


def keep_facts(connection: sqlite3.Connection, facts: _Values) -> None:
    """Writes an account's facts in the place of the former ones."""
    connection.execute(_SAVE_FACTS, facts)


# --- reading ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is read inside is of one moment."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def select_observations(connection: sqlite3.Connection) -> list[Observation]:
    """All aggregates."""
    return [Observation(key=key, data=data) for key, data in connection.execute("SELECT key, data FROM observations")]


def select_facts(connection: sqlite3.Connection) -> dict[str, Facts]:
    """The facts of every account."""
    rows = connection.execute("SELECT provider, at, ttl, data FROM facts")
    return {provider: Facts(data=json.loads(data), at=at, ttl=ttl) for provider, at, ttl, data in rows}


def select_runs(connection: sqlite3.Connection, limit: int, tenant: str | None, before: str | None) -> list[RunRow]:
    """Runs without their large columns, newest first."""
    where = "id < ?" if tenant is None else "id < ? AND tenant = ?"
    given = (_text(before or _LAST),) if tenant is None else (_text(before or _LAST), _text(tenant))
    query = f"SELECT {', '.join(RUN_SUMMARY)} FROM runs WHERE {where} ORDER BY id DESC LIMIT ?"
    return [RunRow(**_fields(RUN_SUMMARY, row)) for row in connection.execute(query, (*given, limit))]


def select_run(connection: sqlite3.Connection, beginning: str) -> tuple[RunRow, Sequence[AttemptRow], Sequence[LedgerRow]] | None:
    """A run with its attempts and ledger. Raises `InvalidInput` where several ids have this beginning."""
    run_id = _full_id(connection, _text(beginning))
    if run_id is None:
        return None
    (found,) = connection.execute(f"SELECT {', '.join(RUN_COLUMNS)} FROM runs WHERE id = ?", (run_id,))
    ledger = f"SELECT {', '.join(LEDGER_COLUMNS)} FROM ledger WHERE run = ? ORDER BY number"
    return (
        RunRow(**_fields(RUN_COLUMNS, found)),
        _attempts(connection, "run = ? ORDER BY number", run_id),
        [LedgerRow(**_fields(LEDGER_COLUMNS, row)) for row in connection.execute(ledger, (run_id,))],
    )


def select_attempts(connection: sqlite3.Connection, markers: Collection[str]) -> list[AttemptRow]:
    """Attempts by their ids. Asked for in parts, since a statement takes so many values and no more."""
    ids, found = [_text(marker) for marker in markers], []
    for start in range(0, len(ids), _PART):
        part = ids[start : start + _PART]
        found += _attempts(connection, f"id IN ({', '.join('?' * len(part))}) ORDER BY id", *part)
    return found


def select_open_attempts(connection: sqlite3.Connection) -> list[AttemptRow]:
    """Attempts of which something may exist, oldest first."""
    return _attempts(connection, f"{_OPEN} ORDER BY created_at")


def _attempts(connection: sqlite3.Connection, where: str, *given: str) -> list[AttemptRow]:
    query = f"SELECT {', '.join(ATTEMPT_COLUMNS)} FROM attempts WHERE {where}"
    return [AttemptRow(**_fields(ATTEMPT_COLUMNS, row)) for row in connection.execute(query, given)]


def _full_id(connection: sqlite3.Connection, beginning: str) -> str | None:
    """The id that is `beginning`, else the only one that begins with it."""
    query = "SELECT id FROM runs WHERE id >= ? AND id < ? ORDER BY id LIMIT 2"
    found = [run_id for (run_id,) in connection.execute(query, (beginning, beginning + _LAST))]
    if not beginning or (len(found) > 1 and found[0] != beginning):
        raise InvalidInput("id", "an unambiguous beginning of a run's id", beginning)
    return found[0] if found else None
