"""The PostgreSQL store's rows and statements, each of which acts on one connection.

Amounts of money are whole nano-dollars. Nothing here starts or ends a transaction. A write that is refused leaves
nothing behind, so that others can go on in the same transaction. Transactions that write come one after the other, on
every host (see `_committer`), so that what was read here is still so when it is acted on.
"""

# ruff: noqa: S608 - only names of our own columns are put into statements, and values are bound

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from decimal import Context, Decimal
from typing import Any

from sandstorm import Conflict, InvalidInput
from sandstorm.policy import OPEN_STATES, AttemptRow, Facts, KeyRow, KeyTaken, LedgerRow, Limit, LimitReached, Observation, RunRow
from sandstorm_store_postgres._database import Connection

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

# PostgreSQL uses a partial index only where the query implies the index's own condition.
_OPEN = "state IN ({})".format(", ".join(f"'{state}'" for state in OPEN_STATES))


def _insert(name: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO sandstorm.{name} ({', '.join(columns)}) VALUES ({', '.join(['%s'] * len(columns))})"


def _upsert(name: str, columns: Sequence[str]) -> str:
    key, *others = columns
    return f"{_insert(name, columns)} ON CONFLICT ({key}) DO UPDATE SET " + ", ".join(f"{c} = excluded.{c}" for c in others)


_SAVE_RUN = _upsert("runs", RUN_COLUMNS)
_ADD_ATTEMPT = _insert("attempts", ATTEMPT_COLUMNS) + " ON CONFLICT (id) DO NOTHING"
_SAVE_ATTEMPT = f"UPDATE sandstorm.attempts SET {', '.join(f'{c} = %s' for c in ATTEMPT_PROGRESS)} WHERE id = %s AND epoch = %s"
_TAKE = f"UPDATE sandstorm.attempts SET epoch = %s WHERE id = %s AND epoch = %s RETURNING {', '.join(ATTEMPT_COLUMNS)}"
_ADD_LEDGER = _insert("ledger", LEDGER_COLUMNS)
_KEY = "SELECT run, fingerprint FROM sandstorm.keys WHERE tenant = %s AND key = %s"
_SAVE_KEY = """INSERT INTO sandstorm.keys (tenant, key, run, fingerprint) VALUES (%s, %s, %s, %s)
    ON CONFLICT (tenant, key) DO UPDATE SET run = excluded.run, fingerprint = excluded.fingerprint"""
_HOLDS_KEY = """SELECT FROM sandstorm.runs WHERE id = %s AND (state NOT IN ('failed', 'cancelled')
    OR EXISTS (SELECT FROM sandstorm.attempts WHERE attempts.run = runs.id AND outcome != 'not-started'))"""
_ADD_HOLD = """INSERT INTO sandstorm.holds (attempt, key, seconds, number, usd) VALUES (%s, %s, %s, %s, %s)
    ON CONFLICT (attempt, key, seconds) DO UPDATE SET number = excluded.number, usd = excluded.usd"""
_HOLDS_OF = "SELECT key, seconds, number, usd FROM sandstorm.holds WHERE attempt = %s"
_USED = "SELECT used FROM sandstorm.windows WHERE key = %s AND seconds = %s AND number = %s"
_USE = """INSERT INTO sandstorm.windows AS held (key, seconds, number, used) VALUES (%s, %s, %s, %s)
    ON CONFLICT (key, seconds, number) DO UPDATE SET used = held.used + excluded.used"""
_SAVE_OBSERVATION = _upsert("observations", ("key", "data"))
_SAVE_FACTS = _upsert("facts", ("provider", "at", "ttl", "data"))

_EXACT = Context(prec=40)
_MOST_DOLLARS = 9_000_000_000
"""What still fits a bigint as nano-dollars."""
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
    return (*_values(attempt, ATTEMPT_PROGRESS), _stored_text(attempt.id), attempt.epoch)


def ledger_values(row: LedgerRow) -> _Values:
    """A movement of money as the columns of its table."""
    return _values(row, LEDGER_COLUMNS)


def facts_values(provider: str, facts: Facts) -> _Values:
    """An account's facts as the columns of their table."""
    return (_stored_text(provider), facts.at, facts.ttl, _stored_text(json.dumps(facts.data)))


def observation_values(observation: Observation) -> _Values:
    """An aggregate as the columns of its table."""
    return _values(observation, ("key", "data"))


def _values(row: RunRow | AttemptRow | LedgerRow | Observation, columns: Iterable[str]) -> _Values:
    return tuple([_stored(column, getattr(row, column)) for column in columns])


def _stored(column: str, value: Any) -> Any:
    if column in MONEY_COLUMNS:
        return nano_dollars(column, value)
    return _stored_text(value) if isinstance(value, str) else value


def _stored_text(value: str) -> str:
    """Text as PostgreSQL can hold it: without the zero character, and without undecodable bytes, which stay readable."""
    if not value.isascii():
        value = value.encode("utf-8", "backslashreplace").decode()
    return value.replace("\x1a", "\x1a1").replace("\0", "\x1a0") if "\0" in value or "\x1a" in value else value


def _loaded(column: str, value: Any) -> Any:
    if column in MONEY_COLUMNS and value is not None:
        return _EXACT.scaleb(Decimal(value), -9)
    return _loaded_text(value) if isinstance(value, str) else value


def _loaded_text(value: str) -> str:
    return value.replace("\x1a0", "\0").replace("\x1a1", "\x1a") if "\x1a" in value else value


def _fields(columns: Iterable[str], row: Iterable[Any]) -> dict[str, Any]:
    return {column: _loaded(column, value) for column, value in zip(columns, row, strict=True)}


# --- writing ----------------------------------------------------------------------------------------------


def take(connection: Connection, attempt: str, owner: int, epoch: int) -> AttemptRow | None:
    """Makes `epoch` the owner of an attempt; None, and nothing is written, where `owner` is not."""
    taken = connection.execute(_TAKE, (epoch, _stored_text(attempt), owner)).fetchone()
    return None if taken is None else AttemptRow(**_fields(ATTEMPT_COLUMNS, taken))


def begin(
    connection: Connection,
    run: _Values,
    attempt: _Values,
    reserved: _Values | None,
    key: KeyRow | None = None,
    limits: Sequence[Limit] = (),
) -> None:
    """Writes a run, an attempt and its reservation. Raises `Conflict` where the id is taken, `KeyTaken`, `LimitReached`."""
    with connection.transaction() if key is not None or limits else nullcontext():
        # The attempt first, since it decides; that its run exists is checked at the commit.
        if connection.execute(_ADD_ATTEMPT, attempt).rowcount != 1:
            raise Conflict(f"there is an attempt {attempt[0]!r} already")
        if key is not None:
            _claim(connection, key)
        connection.execute(_SAVE_RUN, run)
        for limit in limits:
            _hold(connection, attempt, limit)
        if reserved is not None:
            _book(connection, reserved)


def update(connection: Connection, progress: _Values, booked: Sequence[_Values] = ()) -> bool:
    """Writes an attempt's progress and its money; False where its epoch does not own it, and then nothing is written.

    Raises `LimitReached`, and writes nothing, where a reservation does not fit.
    """
    with connection.transaction() if any(_kind(row) == "reserve" for row in booked) else nullcontext():
        if connection.execute(_SAVE_ATTEMPT, progress).rowcount != 1:
            return False
        for row in booked:
            _book(connection, row)
        return True


def finish(connection: Connection, run: _Values, progress: _Values | None, booked: Sequence[_Values]) -> bool:
    """Writes a run's end; False where the attempt's epoch does not own it, and then nothing is written."""
    if progress is not None and not update(connection, progress, booked):
        return False
    connection.execute(_SAVE_RUN, run)
    return True


def _claim(connection: Connection, key: KeyRow) -> None:
    """Makes a key that of its run, unless another holds it: one that may have started something, or still may."""
    wanted = (_stored_text(key.tenant), _stored_text(key.key))
    held = connection.execute(_KEY, wanted).fetchone()
    run = _stored_text(key.run)
    if held is not None and held[0] != run and connection.execute(_HOLDS_KEY, (held[0],)).fetchone() is not None:
        raise KeyTaken(KeyRow(tenant=key.tenant, key=key.key, run=_loaded_text(held[0]), fingerprint=_loaded_text(held[1])))
    connection.execute(_SAVE_KEY, (*wanted, run, _stored_text(key.fingerprint)))


def _hold(connection: Connection, attempt: _Values, limit: Limit) -> None:
    """Says in which window of a limit the money of an attempt is counted."""
    at, exposure = (attempt[ATTEMPT_COLUMNS.index(name)] for name in ("created_at", "exposure"))
    if exposure is None:
        raise LimitReached(limit, None, limit.usd)
    window = (_stored_text(limit.key), limit.window, int(at // limit.window))
    connection.execute(_ADD_HOLD, (attempt[0], *window, nano_dollars("usd", limit.usd)))


def _book(connection: Connection, row: _Values) -> None:
    """Writes a movement of money, and counts it in the window of every limit that holds its attempt."""
    attempt, amount = (row[LEDGER_COLUMNS.index(name)] for name in ("attempt", "amount"))
    for key, seconds, number, usd in connection.execute(_HOLDS_OF, (attempt,)).fetchall():
        window = (key, seconds, number)
        found = connection.execute(_USED, window).fetchone()
        used = 0 if found is None else found[0]
        if _kind(row) == "reserve" and used + amount > usd:
            limit = Limit(key=_loaded_text(key), usd=_loaded("amount", usd), window=seconds)
            raise LimitReached(limit, _loaded("amount", amount), _loaded("amount", max(0, usd - used)))
        connection.execute(_USE, (*window, -amount if _kind(row) == "release" else amount))
    connection.execute(_ADD_LEDGER, row)


def _kind(row: _Values) -> str:
    return str(row[LEDGER_COLUMNS.index("kind")])


def observe(connection: Connection, observations: Sequence[_Values]) -> None:
    """Writes aggregates, each in the place of the former one under its key."""
    for observation in observations:
        connection.execute(_SAVE_OBSERVATION, observation)


def keep_facts(connection: Connection, facts: _Values) -> None:
    """Writes an account's facts in the place of the former ones."""
    connection.execute(_SAVE_FACTS, facts)


# --- reading ----------------------------------------------------------------------------------------------


def select_observations(connection: Connection) -> list[Observation]:
    """All aggregates."""
    rows = connection.execute("SELECT key, data FROM sandstorm.observations")
    return [Observation(**_fields(("key", "data"), row)) for row in rows]


def select_facts(connection: Connection) -> dict[str, Facts]:
    """The facts of every account."""
    rows = connection.execute("SELECT provider, at, ttl, data FROM sandstorm.facts")
    return {_loaded_text(provider): Facts(data=json.loads(data), at=at, ttl=ttl) for provider, at, ttl, data in rows}


def select_runs(connection: Connection, limit: int, tenant: str | None, before: str | None) -> list[RunRow]:
    """Runs without their large columns, newest first."""
    where = "id < %s" if tenant is None else "id < %s AND tenant = %s"
    last = _stored_text(before or _LAST)
    given = (last,) if tenant is None else (last, _stored_text(tenant))
    query = f"SELECT {', '.join(RUN_SUMMARY)} FROM sandstorm.runs WHERE {where} ORDER BY id DESC LIMIT %s"
    return [RunRow(**_fields(RUN_SUMMARY, row)) for row in connection.execute(query, (*given, limit))]


def select_run(connection: Connection, beginning: str) -> tuple[RunRow, Sequence[AttemptRow], Sequence[LedgerRow]] | None:
    """A run with its attempts and ledger. Raises `InvalidInput` where several ids have this beginning."""
    run_id = _full_id(connection, beginning)
    if run_id is None:
        return None
    (found,) = connection.execute(f"SELECT {', '.join(RUN_COLUMNS)} FROM sandstorm.runs WHERE id = %s", (run_id,)).fetchall()
    ledger = f"SELECT {', '.join(LEDGER_COLUMNS)} FROM sandstorm.ledger WHERE run = %s ORDER BY number"
    return (
        RunRow(**_fields(RUN_COLUMNS, found)),
        _attempts(connection, "run = %s ORDER BY number", run_id),
        [LedgerRow(**_fields(LEDGER_COLUMNS, row)) for row in connection.execute(ledger, (run_id,))],
    )


def select_attempts(connection: Connection, markers: Collection[str]) -> list[AttemptRow]:
    """Attempts by their ids."""
    return _attempts(connection, "id = ANY(%s::text[]) ORDER BY id", [_stored_text(marker) for marker in markers])


def select_open_attempts(connection: Connection) -> list[AttemptRow]:
    """Attempts of which something may exist, oldest first."""
    return _attempts(connection, f"{_OPEN} ORDER BY created_at")


def _attempts(connection: Connection, where: str, *given: object) -> list[AttemptRow]:
    query = f"SELECT {', '.join(ATTEMPT_COLUMNS)} FROM sandstorm.attempts WHERE {where}"
    return [AttemptRow(**_fields(ATTEMPT_COLUMNS, row)) for row in connection.execute(query, given)]


def _full_id(connection: Connection, beginning: str) -> str | None:
    """The stored id that is `beginning`, else the only one that begins with it."""
    query = "SELECT id FROM sandstorm.runs WHERE id >= %s AND id < %s ORDER BY id LIMIT 2"
    start = _stored_text(beginning)
    found: list[str] = [run_id for (run_id,) in connection.execute(query, (start, start + _LAST))]
    if not beginning or (len(found) > 1 and found[0] != start):
        raise InvalidInput("id", "an unambiguous beginning of a run's id", beginning)
    return found[0] if found else None
