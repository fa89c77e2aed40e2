"""A PostgreSQL database as the store sees it: pooled connections, patience with passing failures, readable errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import psycopg
from psycopg import conninfo
from psycopg_pool import ConnectionPool, PoolTimeout

from sandstorm import InvalidInput, PluginError

_T = TypeVar("_T")

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

POOL_SIZE = 6
"""Connections of one store at most: one writes, one renews a lease, the others read."""

_URLS = 'a URL such as "postgresql://user@host:5432/database"'

_DEFAULTS = {
    "application_name": "sandstorm",
    "target_session_attrs": "read-write",
    # A host that vanished without a word is given up after some ten seconds, and not after the kernel's two hours.
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""What libpq is told where the URL does not say it: see "Parameter Key Words" in PostgreSQL's manual."""

_PASSING = frozenset({"25006", "25P03", "40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03", "57P05"})
"""SQLSTATEs after which trying again may help: read-only for now, timed out, serialization, deadlock, too many
connections, lock not available, and a server that stops or starts (PostgreSQL's manual, appendix A)."""


class Unsettled(Exception):
    """The server does not know yet how a transaction ended."""


class Database:
    """The database that a URL names. Nothing that it shows or raises has the URL's password in it.

    Attributes:
        url: The URL without its password and its parameters.
        patience: For how many seconds a passing failure is tried again.
    """

    def __init__(self, url: str, patience: float) -> None:
        """Connects to nothing yet. Raises `InvalidInput` for a URL that libpq cannot read."""
        given = _parsed(url)
        self.url = _shown(given)
        self.patience = patience
        self._parameters: dict[str, Any] = {**_DEFAULTS, **given}
        self._pool: ConnectionPool[Connection] | None = None

    def __repr__(self) -> str:
        return f"Database({self.url!r})"

    def connect(self) -> Connection:
        """A connection outside of the pool, for its caller to close. Raises psycopg's errors at once."""
        connection = psycopg.connect(**self._parameters, autocommit=True)
        try:
            self._configure(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def open(self) -> None:
        """Opens the pool."""
        self._pool = ConnectionPool(
            connection_class=psycopg.Connection[tuple[Any, ...]],
            kwargs={**self._parameters, "autocommit": True},
            configure=self._configure,
            min_size=1,
            max_size=POOL_SIZE,
            reconnect_timeout=self.patience,
            open=True,
        )

    def close(self) -> None:
        """Closes every connection that is not in use; those in use close when they are given back."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close(timeout=1.0)

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Connection]:
        """A connection of the pool, with no transaction open before or after. Raises psycopg's errors."""
        pool = self._pool
        if pool is None:
            raise PluginError("postgres", "store", f"{self.url} is not open")
        connection = pool.getconn(self.patience if timeout is None else timeout)
        try:
            yield connection
        except BaseException:
            _undo(connection)
            raise
        finally:
            pool.putconn(connection)

    def patiently(self, step: Callable[[], _T]) -> _T:
        """What `step` returns, tried again with jittered pauses while its failure may pass."""
        deadline = time.monotonic() + self.patience
        pause = 0.005
        while True:
            try:
                return step()
            except Exception as exc:
                if not is_passing(exc) or time.monotonic() >= deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            pause = min(pause * 2, 0.2)

    def readable(self, exc: Exception, stage: str) -> Exception:
        """Psycopg's errors as one that names the database; others as they are."""
        if not isinstance(exc, psycopg.Error | Unsettled):
            return exc
        return PluginError("postgres", stage, f"{self.url}: {self._reason(exc)}")

    def _reason(self, exc: Exception) -> str:
        if isinstance(exc, PoolTimeout):
            # The pool keeps the cause to itself.
            try:
                self.connect().close()
            except psycopg.Error as cause:
                return self._reason(cause)
            return f"no connection within {self.patience:g} s"
        primary = exc.diag.message_primary if isinstance(exc, psycopg.Error) else None
        return primary or " ".join(str(exc).split())[:300]

    def _configure(self, connection: Connection) -> None:
        encoding = connection.execute("SHOW server_encoding").fetchone()
        if encoding != ("UTF8",):
            raise InvalidInput("store", "a database with the encoding UTF8", encoding and encoding[0])
        # What was acknowledged must survive; a cluster that asks for more than `on` keeps it.
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false)"
            " WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')"
        )
        # Shorter than our own patience, so that what a lost connection or a stopped process left open settles within it.
        for name, part in (("lock_timeout", 0.5), ("idle_in_transaction_session_timeout", 0.25)):
            connection.execute("SELECT set_config(%s, %s, false)", (name, f"{max(1, int(self.patience * part * 1000))}ms"))
        connection.execute("SET client_encoding = 'UTF8'")


def is_passing(exc: Exception) -> bool:
    """Whether the same may work in a moment: the connection was lost, or another transaction was in the way."""
    if isinstance(exc, Unsettled):
        return True
    if not isinstance(exc, psycopg.Error):
        return False
    state = exc.sqlstate
    return isinstance(exc, psycopg.OperationalError) if state is None else state in _PASSING or state.startswith("08")


def _undo(connection: Connection) -> None:
    """Ends a transaction without effect; a connection that cannot do that is closed, which does it too."""
    if connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE:
        return
    try:
        connection.execute("ROLLBACK")
    except psycopg.Error:
        with suppress(psycopg.Error):
            connection.close()


def _parsed(url: str) -> dict[str, str]:
    """A URL as libpq's parameters. Raises `InvalidInput`, which does not quote the URL, since there is a password in it."""
    try:
        given = {name: str(value) for name, value in conninfo.conninfo_to_dict(url).items() if value is not None}
    except psycopg.Error:
        raise InvalidInput("store", _URLS, "one that libpq cannot read") from None
    # A password with a raw "@" or "/" in it spills into what comes after it, and that is shown.
    port = given.get("port", "").replace(",", "")
    if "@" in given.get("host", "") + given.get("dbname", "") or (port and not port.isdecimal()):
        raise InvalidInput("store", _URLS, 'one with an unquoted "@" or "/": write %40 and %2F')
    return given


def _shown(given: dict[str, str]) -> str:
    user = f"{quote(given['user'], safe='')}@" if "user" in given else ""
    port = f":{given['port']}" if "port" in given else ""
    return f"postgresql://{user}{quote(given.get('host', ''), safe='.,:[]')}{port}/{quote(given.get('dbname', ''), safe='')}"
