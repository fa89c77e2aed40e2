"""What Alembic runs: the migrations, in the one transaction of the connection that it is given."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text


def _run(connection: Connection) -> None:
    connection.execute(text("CREATE SCHEMA IF NOT EXISTS sandstorm"))
    context.configure(connection=connection, version_table="revision", version_table_schema="sandstorm")
    with context.begin_transaction():
        context.run_migrations()


_run(context.config.attributes["connection"])
