"""Commits operations exactly once, also where the connection is lost at any moment.

Each transaction knows its id before it commits. Where the answer to COMMIT is lost, the server is asked over another
connection how that transaction ended (`pg_xact_status`), and only one that did not commit is done again.

The transactions of all routers take one advisory lock, and so come one after the other: what one of them checks (a key, a
limit) no other can change before it commits, and no two can deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import psycopg

from sandstorm import CallerError, PluginError
from sandstorm.policy import KeyTaken, LimitReached
from sandstorm_store_postgres._database import Connection, Database, Unsettled, is_passing
from sandstorm_store_postgres._writer import Operation

WRITE_LOCK = int.from_bytes(b"sandwrit")
"""The key of the advisory lock under which every transaction of a router writes."""

_ENTER = "SELECT pg_current_xact_id()::text, pg_advisory_xact_lock(%s)"


class Committer:
    """Writes batches of operations.

    Attributes:
        commits: How many transactions were committed.
    """

    def __init__(self, database: Database) -> None:
        self.commits = 0
        self._database = database

    def commit(self, batch: Sequence[Operation]) -> None:
        """One transaction, where every operation can be written; else one for each, so that a failure is its caller's alone."""
        try:
            self._database.patiently(partial(self._try, batch))
        except Exception as exc:
            if len(batch) > 1 and isinstance(exc, psycopg.Error) and not is_passing(exc):
                for operation in batch:
                    self.commit([operation])
                return
            for operation in batch:
                operation.error = self._database.readable(exc, "write")

    def _try(self, batch: Sequence[Operation]) -> None:
        with self._database.connection() as connection:
            connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            (transaction,) = connection.execute(_ENTER, (WRITE_LOCK,)).fetchall()[0][:1]
            for operation in batch:
                _apply(connection, operation)
            try:
                connection.execute("COMMIT")
            except psycopg.OperationalError as exc:
                if not connection.closed:
                    raise  # the server answered, and so did not commit
                lost = exc
            else:
                self.commits += 1
                return
        if not self._committed(transaction):
            raise lost
        self.commits += 1

    def _committed(self, transaction: str) -> bool:
        try:
            return self._database.patiently(partial(self._ask, transaction))
        except Exception as exc:
            reason = self._database.readable(exc, "write")
            raise PluginError(
                "postgres", "write", f"the connection was lost during a commit, which may have been applied: {reason}"
            ) from exc

    def _ask(self, transaction: str) -> bool:
        with self._database.connection() as connection:
            ((status,),) = connection.execute("SELECT pg_xact_status(%s::xid8)", (transaction,)).fetchall()
        if status not in ("committed", "aborted"):
            raise Unsettled(f"transaction {transaction} is {status or 'unknown'}")
        return bool(status == "committed")


def _apply(connection: Connection, operation: Operation) -> None:
    operation.result = operation.error = None
    try:
        operation.result = operation.action(connection)
    except (CallerError, KeyTaken, LimitReached) as exc:
        # Refused, and nothing of it is left, so that the others can go on in this transaction.
        operation.error = exc
