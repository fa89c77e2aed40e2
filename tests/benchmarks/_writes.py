"""What the journal and a failover cost: the waits for the disk of a run, the commits of many, a refusal."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import trio
from _measure import Figure, Pairs, installed_plugins

from sandstorm import Constraints, SandboxSpec, Task
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import settings_of
from sandstorm._sqlite import SqliteStore
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

RUNS = 100
ADDED = 1.0
"""Milliseconds that a journal may add beside its waits for the disk, and a refusal altogether."""
WAITS, COMMITS = 3, 10


def measure(quick: bool) -> Iterable[Figure]:
    """Each of them beside its baseline, in turns."""
    count = 20 if quick else 200
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        yield trio.run(_journal, Path(folder), count)
        yield trio.run(_commits, Path(folder))
    yield trio.run(_failover, count)


async def _journal(folder: Path, count: int) -> Figure:
    """A run with a file journal less one with a journal in memory, less the waits for the disk that are measured beside."""
    disk = os.open(folder / "disk", os.O_WRONLY | os.O_CREAT, 0o600)
    syncs: list[float] = []
    try:
        async with (
            _engine(f"sqlite:///{folder}/journal.db", ReferenceProvider()) as ours,
            _engine("sqlite://", ReferenceProvider()) as theirs,
        ):

            async def one() -> float:
                syncs.append(_sync_seconds(disk))
                return await _run_seconds(ours)

            pairs = await _turns(one, lambda: _run_seconds(theirs), count)
    finally:
        os.close(disk)
    sync = median(syncs)
    return Figure(
        name=f"a run with a journal in a file, beyond {WAITS} waits for the disk",
        value=(pairs.difference - WAITS * sync) * 1000,
        unit="ms",
        target=ADDED,
        baseline=f"journal in memory: {median(pairs.baseline) * 1000:.2f} ms; fdatasync: {sync * 1000:.2f} ms",
        detail=f"adds {pairs.difference * 1000:.2f} ms altogether; {pairs.spread}",
    )


async def _commits(folder: Path) -> Figure:
    """How many transactions a hundred runs at once take, from their first row to their end."""
    store = SqliteStore(f"sqlite:///{folder}/commits.db")
    async with _engine(store, ReferenceProvider()) as engine:
        await _run_seconds(engine)
        before = store.commits
        async with trio.open_nursery() as nursery:
            for _ in range(RUNS):
                nursery.start_soon(_run_seconds, engine)
        commits = store.commits - before
    return Figure(
        name=f"commits of {RUNS} runs at once",
        value=commits,
        unit="count",
        target=COMMITS,
        baseline=f"{RUNS} runs",
        detail="reference provider; those from the first row of a run to its end, all of them together",
    )


async def _failover(count: int) -> Figure:
    """A run that one provider refuses at once, less one that no provider refuses; both keep their journal in memory."""
    # Every other create passes, since failures in a row would open the breaker, and nothing would be left to fail over from.
    faults = [Fault(step="create", kind="provider-down", after=2 * number) for number in range(count + 5)]
    down = ChaosProvider(ReferenceProvider("down"), faults)

    async def one() -> float:
        seconds = await _run_seconds(ours, 2)
        await _run_seconds(ours)
        return seconds

    async with (
        _engine("sqlite://", down, ReferenceProvider()) as ours,
        _engine("sqlite://", ReferenceProvider()) as theirs,
    ):
        pairs = await _turns(one, lambda: _run_seconds(theirs), count)
    return Figure(
        name="a failover from a provider that refuses at once",
        value=pairs.difference * 1000,
        unit="ms",
        target=ADDED,
        baseline=f"no failover: {median(pairs.baseline) * 1000:.2f} ms",
        detail=f"journals in memory; {pairs.spread}",
    )


async def _turns(subject: Callable[[], Awaitable[float]], baseline: Callable[[], Awaitable[float]], count: int) -> Pairs:
    pairs = []
    for number in range(-5, count):
        if number % 2:
            theirs, ours = await baseline(), await subject()
        else:
            ours, theirs = await subject(), await baseline()
        if number >= 0:  # the first ones warm the caches
            pairs.append((ours, theirs))
    return Pairs.of(pairs)


async def _run_seconds(engine: Engine, attempts: int = 1) -> float:
    request = engine.request(Task(code="out hello", language="python"), SandboxSpec(), Constraints())
    began = time.perf_counter()
    result = await engine.run(request)
    seconds = time.perf_counter() - began
    if len(result.attempts) != attempts:
        raise AssertionError(f"{len(result.attempts)} attempts, where {attempts} were to be measured")
    return seconds


def _sync_seconds(disk: int) -> float:
    """Seconds that a wait for the disk takes after a write of one page."""
    os.pwrite(disk, os.urandom(4096), 0)
    began = time.perf_counter()
    os.fdatasync(disk)
    return time.perf_counter() - began


def _engine(store: str | SqliteStore, *providers: Any) -> AbstractAsyncContextManager[Engine]:
    settings = attrs.evolve(settings_of({"strategy": "ordered"}), disable=installed_plugins())
    plugins = Plugins.load(settings, extra=[(provider.name, plugin_for(provider)) for provider in providers])
    return open_engine(settings, plugins, store=SqliteStore(store) if isinstance(store, str) else store)
