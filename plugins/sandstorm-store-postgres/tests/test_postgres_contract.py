"""The contract of every store, kept by the PostgreSQL store, and its agreement with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from test_store import OPERATIONS, StoreContract, agree_with_model

from sandstorm.policy import Store
from sandstorm_store_postgres._store import PostgresStore

TABLES = "sandstorm.runs, sandstorm.attempts, sandstorm.ledger, sandstorm.holds"


class TestPostgres(StoreContract):
    """A database, with a thread that writes."""

    url = ""

    @pytest.fixture(autouse=True)
    def _database(self, url: str) -> None:
        type(self).url = url  # asynchronous fixtures have an instance of their own

    def make(self, folder: Path) -> Store:
        return PostgresStore(self.url)


class TestPostgresInline(TestPostgres):
    """A database that the caller's thread writes."""

    def make(self, folder: Path) -> Store:
        return PostgresStore(self.url, inline=True)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_a_database_agrees_with_a_model(url: str, query: Any, operations: list[Any]) -> None:
    """Any sequence of writes leaves a journal in PostgreSQL as it leaves plain dicts."""
    if query("SELECT to_regclass('sandstorm.runs')") != [(None,)]:
        query(f"TRUNCATE {TABLES}")
    trio.run(agree_with_model, PostgresStore(url), operations)
