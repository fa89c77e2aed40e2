"""The PostgreSQL store: one journal for routers on several hosts. psycopg and Alembic load when a store is made or opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandstorm.policy import hookimpl

if TYPE_CHECKING:
    from sandstorm.policy import Store

__all__ = ["PostgresPlugin"]


class PostgresPlugin:
    """Answers for store URLs with the scheme `postgresql` or `postgres`."""

    SANDSTORM_API = 1
    name = "postgres"

    @hookimpl
    def sandstorm_store(self, url: str) -> Store | None:
        """The store for a URL such as `postgresql://sandstorm@db.example/journal`."""
        if url.partition(":")[0] not in ("postgresql", "postgres"):
            return None
        from sandstorm_store_postgres._store import PostgresStore

        return PostgresStore(url)
