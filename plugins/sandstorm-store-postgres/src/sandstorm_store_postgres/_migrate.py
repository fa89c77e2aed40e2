"""Brings a database to the newest schema, once, however many routers open it at the same time."""

from __future__ import annotations

from pathlib import Path

import psycopg

from sandstorm import InvalidInput
from sandstorm_store_postgres._database import Connection, Database

REVISIONS = ("0001",)
"""Every revision in `migrations/versions`, oldest first."""

_LOCK = int.from_bytes(b"sandstrm")
"""The key of the advisory lock under which the schema changes."""


def migrate(database: Database) -> None:
    """Creates or upgrades the tables. Raises `InvalidInput` for a newer schema, and psycopg's errors."""
    connection = database.connect()
    try:
        if _revision(connection) == REVISIONS[-1]:
            return
        # Held by the session, so that whoever waited for it sees what was committed before.
        connection.execute("SET lock_timeout = 0")
        connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        if _revision(connection) != REVISIONS[-1]:
            _upgrade(database)
    finally:
        connection.close()


def _revision(connection: Connection) -> str | None:
    """The revision of the schema, or None before the first. Raises `InvalidInput` for one that is not known here."""
    try:
        found = connection.execute("SELECT version_num FROM sandstorm.revision").fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    if found is not None and found[0] not in REVISIONS:
        raise InvalidInput("store", f"a journal of schema {REVISIONS[-1]}, the newest that this Sandstorm knows", found[0])
    return None if found is None else str(found[0])


def _upgrade(database: Database) -> None:
    import sqlalchemy
    from alembic import command
    from alembic.config import Config

    # The connection is made by us, so that SQLAlchemy never sees the password.
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=database.connect, poolclass=sqlalchemy.NullPool)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except sqlalchemy.exc.DBAPIError as exc:
        if isinstance(exc.orig, psycopg.Error):
            raise exc.orig from None
        raise
