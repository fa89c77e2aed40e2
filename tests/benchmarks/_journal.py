"""Whether a run costs more the more runs are stored: 100,000 against 100."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from pathlib import Path
from statistics import median

import trio
from _measure import Figure, Pairs, installed_plugins

from sandstorm import Constraints, SandboxSpec, Task
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import Settings
from sandstorm._sqlite import SqliteStore
from sandstorm.testing import ReferenceProvider, plugin_for

FEW, MANY, QUICK_MANY = 100, 100_000, 2_000
TARGET = 1.2
TENANTS = 7


def measure(quick: bool) -> Iterable[Figure]:
    """The ratio of the two, one run at a time, and what a run costs."""
    many, pairs_wanted = (QUICK_MANY, 20) if quick else (MANY, 400)
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        few_db, many_db = Path(folder, "few.db"), Path(folder, "many.db")
        for path, stored in ((few_db, FEW), (many_db, many)):
            trio.run(_fill_with_runs, path, FEW)
            _copy_runs(path, stored)
        size = many_db.stat().st_size / 2**20
        pairs = trio.run(_pairs, many_db, few_db, pairs_wanted)
        listings = trio.run(_listings, many_db, few_db, pairs_wanted)
    total = sum(pairs.subject) / sum(pairs.baseline)
    yield Figure(
        name=f"a run with {many:,} runs stored",
        value=pairs.ratio,
        unit="x",
        target=TARGET,
        baseline=f"with {FEW} stored: {median(pairs.baseline) * 1000:.2f} ms",
        detail=f"reference provider, synced SQLite file of {size:.0f} MiB; all runs together {total:.2f} x; {pairs.spread}",
    )
    yield Figure(
        name=f"`runs list` with {many:,} runs stored",
        value=listings.ratio,
        unit="x",
        baseline=f"with {FEW} stored: {median(listings.baseline) * 1000:.2f} ms",
        detail=listings.spread,
    )


async def _pairs(subject: Path, baseline: Path, count: int) -> Pairs:
    """Runs in turns against the two journals, which are both open all the time."""
    pairs = []
    async with AsyncExitStack() as stack:
        ours, theirs = [await stack.enter_async_context(_engine(path)) for path in (subject, baseline)]
        for number in range(-10, count):
            first, second = (ours, theirs) if number % 2 else (theirs, ours)
            seconds = {id(engine): await _run_seconds(engine) for engine in (first, second)}
            if number >= 0:  # the first ones warm the caches
                pairs.append((seconds[id(ours)], seconds[id(theirs)]))
    return Pairs.of(pairs)


async def _listings(subject: Path, baseline: Path, count: int) -> Pairs:
    pairs = []
    stores = SqliteStore(f"sqlite:///{subject}"), SqliteStore(f"sqlite:///{baseline}")
    async with stores[0].open(), stores[1].open():
        for _ in range(count):
            seconds = []
            for store in stores:
                began = time.perf_counter()
                await store.runs(limit=20)
                seconds.append(time.perf_counter() - began)
            pairs.append((seconds[0], seconds[1]))
    return Pairs.of(pairs)


async def _run_seconds(engine: Engine) -> float:
    request = engine.request(Task(code="out hello", language="python"), SandboxSpec(), Constraints(max_cost="1"))
    began = time.perf_counter()
    await engine.run(request)
    return time.perf_counter() - began


def _engine(path: Path) -> AbstractAsyncContextManager[Engine]:
    settings = Settings(disable=installed_plugins())
    plugin = plugin_for(ReferenceProvider())
    return open_engine(settings, Plugins.load(settings, extra=[("reference", plugin)]), store=SqliteStore(f"sqlite:///{path}"))


async def _fill_with_runs(path: Path, count: int) -> None:
    """Real runs, whose rows are then the pattern of all others."""
    async with _engine(path) as engine:
        for _ in range(count):
            await _run_seconds(engine)


def _copy_runs(path: Path, wanted: int) -> None:
    """Fills the journal with copies of its first runs, ledger and attempts included, under ids that sort before them."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.create_function("earlier", 2, _earlier, deterministic=True)
        (real,) = connection.execute("SELECT count(*) FROM runs").fetchone()
        for copy in range(1, -(-wanted // real)):
            for table, ids in (("runs", {"id"}), ("attempts", {"id", "run"}), ("ledger", {"attempt", "run"})):
                _copy_table(connection, table, ids, copy, real)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("rb") as file:
        os.fsync(file)  # else the first runs would pay for writing what was filled in


def _copy_table(connection: sqlite3.Connection, table: str, ids: set[str], copy: int, real: int) -> None:
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    kept = [column for column in columns if not (table == "ledger" and column == "number")]
    chosen = [f"earlier({column}, {copy})" if column in ids else column for column in kept]
    if "tenant" in kept:
        chosen[kept.index("tenant")] = f"'tenant-{copy % TENANTS}'"
    originals = "run" if table != "runs" else "id"
    connection.execute(
        f"INSERT INTO {table} ({', '.join(kept)}) SELECT {', '.join(chosen)} FROM {table} "
        f"WHERE {originals} IN (SELECT id FROM runs ORDER BY id DESC LIMIT {real})"
    )


def _earlier(row_id: str, copy: int) -> str:
    """The id of a run, or of an attempt at one, as it would be `copy` hours before."""
    marker = row_id.startswith("ss-")
    run = row_id.removeprefix("ss-")
    return ("ss-" if marker else "") + f"{int(run[:11], 16) - copy * 3_600_000:011x}{run[11:]}"
