"""The contract of a store, and what only the SQLite store promises.

`StoreContract` is for every store: a subclass says how one is made.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from sandstorm import _sqlite_schema as schema
from sandstorm._errors import Conflict, InvalidInput, PluginError
from sandstorm._offer import Facts
from sandstorm._sqlite import LINGER_SECONDS, SqlitePlugin, SqliteStore, path_of
from sandstorm._store import OPEN_STATES, AttemptRow, LedgerRow, Observation, RunRow, Store


def a_run(run_id: str = "run-1", **changes: Any) -> RunRow:
    return RunRow(**{"id": run_id, "tenant": "acme", "created_at": 1000.5, "title": "python", "request": '{"id": 1}', **changes})


def an_attempt(run: RunRow, number: int = 1, **changes: Any) -> AttemptRow:
    fields: dict[str, Any] = {
        "id": f"{run.id}-{number}",
        "run": run.id,
        "number": number,
        "provider": "local",
        "offer": "default",
        "dispatch_by": 1010.0,
        "expires_at": 1400.25,
        "created_at": 1000.75,
        "exposure": Decimal("0.000000001"),
    }
    return AttemptRow(**{**fields, **changes})


def booked(attempt: AttemptRow, kind: str, amount: str) -> LedgerRow:
    return LedgerRow(
        attempt=attempt.id,
        run=attempt.run,
        tenant="acme",
        provider=attempt.provider,
        kind=kind,
        amount=Decimal(amount),
        basis="exposure",
        at=1001.0,
    )


def summary(run: RunRow) -> RunRow:
    """A run as a listing shows it."""
    return attrs.evolve(run, request="{}", plan=None, result=None)


async def store_run(store: Store, run: RunRow) -> AttemptRow:
    attempt = an_attempt(run)
    await store.begin(run, attempt, booked(attempt, "reserve", "0.25"))
    return attempt


class StoreContract:
    """What every store does. Subclasses make one in `make`, empty, and closed."""

    def make(self, folder: Path) -> Store:
        raise NotImplementedError

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        store = self.make(tmp_path)
        async with store.open():
            yield store

    async def test_begin_is_read_back_exactly(self, store: Store) -> None:
        """The run, the attempt and the reservation come back equal to what was written, money included."""
        run = a_run(plan='{"é": "\N{SNOWMAN}"}', cost=Decimal("12.345678901"), exit=0, seconds=0.125, provider="local")
        attempt = an_attempt(run, sandbox="sb", region="eu", error="x\0y", error_class="Ambiguous", create_seconds=0.5)
        reserved = booked(attempt, "reserve", "0.10")
        await store.begin(run, attempt, reserved)
        assert await store.run(run.id) == (run, [attempt], [reserved])

    async def test_a_second_attempt_joins_the_run(self, store: Store) -> None:
        """A later begin of the same run writes the run anew and adds its attempt, even without a reservation."""
        run = a_run()
        first = await store_run(store, run)
        later = attrs.evolve(run, provider="e2b")
        second = an_attempt(run, 2, provider="e2b", exposure=None)
        await store.begin(later, second, None)
        assert await store.run(run.id) == (later, [first, second], [booked(first, "reserve", "0.25")])

    async def test_a_marker_is_used_once(self, store: Store) -> None:
        """An attempt id that is taken is a conflict, and nothing of the failed call is written."""
        run = a_run()
        attempt = await store_run(store, run)
        before = await store.run(run.id)
        with pytest.raises(Conflict, match="run-1-1"):
            await store.begin(attrs.evolve(run, title="other"), attempt, booked(attempt, "reserve", "1"))
        with pytest.raises(Conflict):
            await store.begin(a_run("run-2"), attempt, None)
        assert await store.run(run.id) == before
        assert await store.run("run-2") is None

    async def test_an_update_of_the_owner_is_written(self, store: Store) -> None:
        """The owner's epoch changes the attempt and is told so."""
        run = a_run()
        attempt = attrs.evolve(await store_run(store, run), state="bound", sandbox="sb-1", exposure=Decimal(2))
        assert await store.update(attempt, durable=True) is True
        found = await store.run(run.id)
        assert found is not None and found[1] == [attempt]

    async def test_another_epoch_changes_nothing(self, store: Store) -> None:
        """Update and finish under an epoch that does not own the attempt answer False and write nothing."""
        run = a_run()
        attempt = await store_run(store, run)
        before = await store.run(run.id)
        foreign = attrs.evolve(attempt, epoch=7, state="released")
        assert await store.update(foreign, durable=True) is False
        assert await store.finish(attrs.evolve(run, state="failed"), foreign, [booked(attempt, "settle", "1")]) is False
        await store.update(foreign, durable=False)
        assert await store.run(run.id) == before

    async def test_an_unknown_attempt_is_not_owned(self, store: Store) -> None:
        """An attempt that was never begun cannot be updated or finished."""
        run = a_run()
        assert await store.update(an_attempt(run), durable=True) is False
        assert await store.finish(run, an_attempt(run), []) is False
        assert await store.run(run.id) is None

    async def test_writes_that_are_not_durable_keep_their_order(self, store: Store) -> None:
        """A read sees the last of several updates that nobody waited for, and a later finish wins over them."""
        run = a_run()
        attempt = await store_run(store, run)
        for state in ("bound", "started", "releasing"):
            await store.update(attrs.evolve(attempt, state=state), durable=False)
        assert [row.state for row in await store.open_attempts()] == ["releasing"]
        await store.update(attrs.evolve(attempt, state="ambiguous"), durable=False)
        assert await store.finish(run, attrs.evolve(attempt, state="released"), [])
        assert await store.open_attempts() == []

    async def test_finish_writes_result_attempt_and_ledger(self, store: Store) -> None:
        """The last barrier stores the result, the attempt's end and every booking, in their order."""
        run = a_run()
        attempt = await store_run(store, run)
        ended = attrs.evolve(run, state="finished", result='{"stdout": ""}', exit=3, seconds=1.5, cost=Decimal("0.05"))
        released = attrs.evolve(attempt, state="released", outcome="finished", start_seconds=0.25)
        rows = [booked(attempt, "release", "0.25"), booked(attempt, "settle", "0.05")]
        assert await store.finish(ended, released, rows) is True
        assert await store.run(run.id) == (ended, [released], [booked(attempt, "reserve", "0.25"), *rows])

    async def test_a_refused_run_needs_no_attempt(self, store: Store) -> None:
        """A run that was refused before anything was tried is stored by its finish alone."""
        run = a_run(state="refused", result='{"error": "Denied"}')
        assert await store.finish(run, None, []) is True
        assert await store.run(run.id) == (run, [], [])

    async def test_runs_are_listed_newest_first(self, store: Store) -> None:
        """Listings go by id from the newest on, page by page, by tenant, and without their large columns."""
        runs = [a_run(f"run-{n}", tenant="ab"[n % 2], plan="{}", result="{}", cost=Decimal(n)) for n in range(5)]
        for run in runs:
            await store_run(store, run)
        assert await store.runs() == [summary(run) for run in reversed(runs)]
        assert [run.id for run in await store.runs(limit=2)] == ["run-4", "run-3"]
        assert [run.id for run in await store.runs(limit=2, before="run-3")] == ["run-2", "run-1"]
        assert [run.id for run in await store.runs(tenant="b")] == ["run-3", "run-1"]
        assert [run.id for run in await store.runs(tenant="b", before="run-3")] == ["run-1"]
        assert await store.runs(limit=0) == []
        with pytest.raises(InvalidInput, match="limit"):
            await store.runs(limit=-1)

    async def test_a_run_is_found_by_its_beginning(self, store: Store) -> None:
        """An unambiguous beginning finds a run, a whole id wins over longer ones, and an ambiguous one is refused."""
        for run_id in ("abc", "abcd", "abx", "b\N{SNOWMAN}"):
            await store.finish(a_run(run_id), None, [])
        for beginning, run_id in (("abc", "abc"), ("abcd", "abcd"), ("abx", "abx"), ("b", "b\N{SNOWMAN}")):
            found = await store.run(beginning)
            assert found is not None and found[0].id == run_id
        for unknown in ("abcde", "c", "%", "ab_", "\udcff"):
            assert await store.run(unknown) is None
        for ambiguous in ("ab", ""):
            with pytest.raises(InvalidInput, match="id: expected an unambiguous beginning of a run's id"):
                await store.run(ambiguous)

    async def test_open_attempts_are_those_that_may_exist(self, store: Store) -> None:
        """Exactly the attempts in an open state are listed, oldest first, with all their columns."""
        run = a_run()
        states = (*OPEN_STATES, "released", "absent")
        attempts = [an_attempt(run, n, state=state, created_at=100.0 - n) for n, state in enumerate(states)]
        for attempt in attempts:
            await store.begin(run, attempt, None)
        assert await store.open_attempts() == attempts[len(OPEN_STATES) - 1 :: -1]

    async def test_observations_and_facts_replace_former_ones(self, store: Store) -> None:
        """What is stored soon is seen by the next read, the last one under each key."""
        store.observe_nowait([Observation(key="a", data="1"), Observation(key="b", data="2")])
        store.observe_nowait([Observation(key="a", data="3")])
        store.observe_nowait([])
        store.keep_facts_nowait("e2b", Facts(data={"old": None}, at=1.0))
        facts = Facts(data={"templates": ["é", {"cpu": 2.5}]}, at=2.0, ttl=60.0)
        store.keep_facts_nowait("e2b", facts)
        assert {row.key: row.data for row in await store.observations()} == {"a": "3", "b": "2"}
        assert await store.facts() == {"e2b": facts}

    async def test_undecodable_text_does_not_lose_a_row(self, store: Store) -> None:
        """A title or an error that is not valid text is stored with its odd parts escaped."""
        run = a_run(title="caf\udce9.py")
        await store.begin(run, an_attempt(run, error="é\ud800"), None)
        found = await store.run(run.id)
        assert found is not None
        assert (found[0].title, found[1][0].error) == ("caf\\udce9.py", "é\\ud800")

    async def test_money_is_rounded_up_to_a_nano_dollar(self, store: Store) -> None:
        """What is finer than a nano-dollar is rounded up, so that a reservation is never too small."""
        run = a_run(cost=Decimal("8999999999.0000000001"))
        attempt = an_attempt(run, exposure=Decimal("1E-30"))
        await store.begin(run, attempt, booked(attempt, "reserve", "0"))
        found = await store.run(run.id)
        assert found is not None
        assert (found[0].cost, found[1][0].exposure) == (Decimal("8999999999.000000001"), Decimal("0.000000001"))

    @pytest.mark.parametrize("amount", ["-0.01", "NaN", "Infinity", "9000000001", "1E+999999"])
    async def test_impossible_amounts_are_refused(self, store: Store, amount: str) -> None:
        """An amount that is negative, no number or too large names its field, and nothing is written."""
        run = a_run()
        attempt = an_attempt(run)
        with pytest.raises(InvalidInput, match="amount: expected an amount"):
            await store.begin(run, attempt, booked(attempt, "reserve", amount))
        with pytest.raises(InvalidInput, match="exposure"):
            await store.begin(run, attrs.evolve(attempt, exposure=Decimal(amount)), None)
        assert await store.run(run.id) is None

    async def test_a_failure_is_its_callers_alone(self, store: Store) -> None:
        """Among many writes at once, those that conflict fail, and the others are all kept."""
        taken = await store_run(store, a_run("taken"))
        failed = []

        async def begin(number: int) -> None:
            run = a_run(f"run-{number:03}")
            attempt = an_attempt(run) if number % 10 else taken
            try:
                await store.begin(run, attempt, booked(attempt, "reserve", "1"))
            except Conflict:
                failed.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(begin, number)
        assert sorted(failed) == list(range(0, 100, 10))
        kept = [run.id for run in await store.runs(limit=1000)]
        assert kept == ["taken", *(f"run-{n:03}" for n in range(99, 0, -1) if n % 10)]

    async def test_a_cancelled_wait_does_not_undo_the_write(self, store: Store) -> None:
        """A begin that was cancelled after it was handed over is stored all the same."""
        run = a_run()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.begin, run, an_attempt(run), None)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        found = await store.run(run.id)
        assert found is not None and found[0] == run

    async def test_a_call_in_a_cancelled_scope_writes_nothing(self, store: Store) -> None:
        """What was cancelled before it was handed over is not stored."""
        run = a_run()
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.begin(run, an_attempt(run), None)
        assert scope.cancelled_caught
        assert await store.run(run.id) is None

    async def test_a_closed_store_says_so(self, tmp_path: Path) -> None:
        """Outside `open`, a call names the store instead of hanging."""
        store = self.make(tmp_path)
        for call in (store.runs, store.open_attempts):
            with pytest.raises(PluginError, match="not open"):
                await call()
        with pytest.raises(PluginError, match="not open"):
            store.observe_nowait([])


class TestFile(StoreContract):
    """A file, with a thread that writes."""

    def make(self, folder: Path) -> Store:
        return SqliteStore(f"sqlite:///{folder}/journal.db")


class TestFileInline(StoreContract):
    """A file that the caller's thread writes."""

    def make(self, folder: Path) -> Store:
        return SqliteStore(f"sqlite:///{folder}/journal.db", inline=True)


class TestMemory(StoreContract):
    """In memory, with a thread that writes."""

    def make(self, folder: Path) -> Store:
        return SqliteStore("sqlite://")


class TestMemoryInline(StoreContract):
    """In memory, written by the caller's thread."""

    def make(self, folder: Path) -> Store:
        return SqliteStore("sqlite:///:memory:", inline=True)


# --- against a model --------------------------------------------------------------------------------------


class Model:
    """What a store holds, as plain dicts."""

    def __init__(self) -> None:
        self.runs: dict[str, RunRow] = {}
        self.attempts: dict[str, AttemptRow] = {}
        self.ledger: list[LedgerRow] = []

    def begin(self, run: RunRow, attempt: AttemptRow, reserved: LedgerRow) -> bool:
        if attempt.id in self.attempts:
            return False
        self.runs[run.id] = run
        self.attempts[attempt.id] = attempt
        self.ledger.append(reserved)
        return True

    def update(self, attempt: AttemptRow) -> bool:
        old = self.attempts.get(attempt.id)
        if old is None or old.epoch != attempt.epoch:
            return False
        self.attempts[attempt.id] = attempt
        return True

    def finish(self, run: RunRow, attempt: AttemptRow, rows: list[LedgerRow]) -> bool:
        if not self.update(attempt):
            return False
        self.runs[run.id] = run
        self.ledger.extend(rows)
        return True

    def run(self, run_id: str) -> Any:
        attempts = sorted((a for a in self.attempts.values() if a.run == run_id), key=lambda a: a.number)
        return self.runs[run_id], attempts, [row for row in self.ledger if row.run == run_id]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "update", "soon", "finish"]),
        st.integers(0, 2),  # the run
        st.integers(1, 2),  # its attempt
        st.integers(0, 1),  # the epoch
        st.sampled_from([*OPEN_STATES, "released", "absent"]),
        st.decimals(0, 1000, places=9),
    ),
    max_size=25,
)


async def agree_with_model(store: Store, operations: list[tuple[str, int, int, int, str, Decimal]]) -> None:
    """Does the same to a store and to a `Model`, and compares each answer and all that is left."""
    model = Model()
    async with store.open():
        for name, of, number, epoch, state, amount in operations:
            run = a_run(f"run-{of}", state=state, cost=amount)
            attempt = an_attempt(run, number, epoch=epoch, state=state, exposure=amount)
            row = booked(attempt, name, str(amount))
            if name == "begin" and model.begin(run, attempt, row):
                await store.begin(run, attempt, row)
            elif name == "begin":
                with pytest.raises(Conflict):
                    await store.begin(run, attempt, row)
            elif name == "finish":
                assert await store.finish(run, attempt, [row, row]) == model.finish(run, attempt, [row, row])
            elif name == "update":
                assert await store.update(attempt, durable=True) == model.update(attempt)
            else:
                await store.update(attempt, durable=False)
                model.update(attempt)
        for run_id in model.runs:
            assert await store.run(run_id) == model.run(run_id)
        open_ids = {attempt.id for attempt in await store.open_attempts()}
        assert open_ids == {attempt.id for attempt in model.attempts.values() if attempt.state in OPEN_STATES}
        assert [run.id for run in await store.runs()] == sorted(model.runs, reverse=True)


@pytest.mark.parametrize("inline", [False, True])
@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_memory_agrees_with_a_model(inline: bool, operations: list[Any]) -> None:
    """Any sequence of writes leaves a journal in memory as it leaves plain dicts."""
    trio.run(agree_with_model, SqliteStore("sqlite://", inline=inline), operations)


@settings(max_examples=20, deadline=None)
@given(operations=OPERATIONS)
def test_a_file_agrees_with_a_model(operations: list[Any]) -> None:
    """Any sequence of writes leaves a journal file as it leaves plain dicts."""
    with tempfile.TemporaryDirectory() as folder:
        trio.run(agree_with_model, SqliteStore(f"sqlite:///{folder}/journal.db"), operations)


# --- SQLite: the URL and the file -------------------------------------------------------------------------


def test_urls_name_files_as_sqlalchemy_spells_them() -> None:
    """Three slashes are relative, four absolute, and no path is a journal in memory."""
    assert path_of("sqlite:////var/lib/j.db") == Path("/var/lib/j.db")
    assert path_of("sqlite:///data/j.db") == Path.cwd() / "data/j.db"
    assert path_of("sqlite://") is path_of("sqlite:///") is path_of("sqlite:///:memory:") is None


@pytest.mark.parametrize(
    "url", ["sqlite", "sqlite:x.db", "sqlite://host/x.db", "sqlite:///x.db?mode=ro", "sqlite:////x/", "pg://x"]
)
def test_other_urls_are_refused(url: str) -> None:
    """A URL that is not SQLite's names the setting and shows what would be right."""
    with pytest.raises(InvalidInput, match=r'store: expected "sqlite:///relative\.db"'):
        SqliteStore(url)


def test_the_plugin_answers_for_its_scheme() -> None:
    """The plugin serves `sqlite:` and leaves other schemes to other plugins."""
    store = SqlitePlugin().sandstorm_store("sqlite:////tmp/j.db")
    assert isinstance(store, SqliteStore) and store.url == "sqlite:////tmp/j.db"
    assert SqlitePlugin().sandstorm_store("postgresql://host/db") is None


def test_importing_the_plugin_does_not_load_sqlite() -> None:
    """SQLite itself is loaded when a store is opened, not when the plugin is imported."""
    code = "import sys, sandstorm._sqlite as s; s.SqliteStore('sqlite://'); sys.exit('sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """The journal and its log are 0600 and the folders made for it 0700, whatever the umask."""
    path = tmp_path / "a" / "b" / "journal.db"
    former = os.umask(0)
    try:
        store = SqliteStore(f"sqlite:///{path}")
        async with store.open():
            await store_run(store, a_run())
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(former)
    assert modes == {"journal.db": 0o600, "journal.db-wal": 0o600, "journal.db-shm": 0o600}
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, path.parent.parent)] == [0o700, 0o700]


async def refusal(path: Path) -> str:
    """What opening `path` says."""
    with pytest.raises(InvalidInput) as caught:
        async with SqliteStore(f"sqlite:///{path}").open():
            pytest.fail("it opened")
    return str(caught.value)


async def test_a_newer_schema_is_refused_readably(tmp_path: Path) -> None:
    """A file of a later version says which schema it has and which one is known, and is left alone."""
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    before = path.read_bytes()
    assert await refusal(path) == "store: expected a journal of schema 5, the newest that this Sandstorm knows, got 99"
    assert path.read_bytes() == before


async def test_a_foreign_database_is_left_alone(tmp_path: Path) -> None:
    """A database of something else is refused and not changed by a byte."""
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mail (x)")
    other.close()
    before = path.read_bytes()
    assert "a database of something else" in await refusal(path)
    assert path.read_bytes() == before


async def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    """A file of another kind, a folder, and a path through a file each give one line that says why."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and long enough for SQLite to look at its first hundred bytes" * 9)
    assert "file is not a database" in await refusal(path)
    assert "unable to open" in await refusal(tmp_path)
    assert "Not a directory" in await refusal(path / "journal.db")


async def test_a_journal_can_be_opened_again(tmp_path: Path) -> None:
    """Everything queued is written when the store closes, and there for the next one."""
    url = f"sqlite:///{tmp_path}/journal.db"
    store = SqliteStore(url)
    async with store.open():
        attempt = await store_run(store, a_run())
        await store.update(attrs.evolve(attempt, state="started"), durable=False)
        store.observe_nowait([Observation(key="k", data="1")])
    for again in (store, SqliteStore(url, inline=True)):
        async with again.open():
            assert await again.open_attempts() == [attrs.evolve(attempt, state="started")]
            assert await again.observations() == [Observation(key="k", data="1")]


async def test_a_write_that_nobody_waits_for_reaches_the_file(tmp_path: Path) -> None:
    """A nowait write is committed soon without any later call."""
    store = SqliteStore(f"sqlite:///{tmp_path}/journal.db")
    with trio.fail_after(20):
        async with store.open():
            await trio.sleep(3 * LINGER_SECONDS)  # until the writer sleeps and has to be woken
            store.observe_nowait([Observation(key="k", data="1")])
            while store.commits == 0:  # noqa: ASYNC110 - nothing tells of a write that nobody waits for
                await trio.sleep(0.01)


async def test_a_failed_nowait_write_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A nowait write that cannot be stored is logged, and the store goes on."""
    store = SqliteStore("sqlite://")
    async with store.open():
        store.observe_nowait([Observation(key="k", data="1"), Observation(key=None, data="2")])  # type: ignore[arg-type]
        assert await store.observations() == []
    assert "NOT NULL constraint failed: observations.key" in caplog.text


# --- SQLite: locks, crashes and other processes -----------------------------------------------------------


async def test_a_held_lock_is_waited_for(tmp_path: Path) -> None:
    """A begin waits while another connection holds the write lock; cancelled meanwhile, it is written later."""
    store = SqliteStore(f"sqlite:///{tmp_path}/journal.db")
    async with store.open():
        holder = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with trio.move_on_after(0.05) as scope:
            await store_run(store, a_run("run-1"))
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store_run, store, a_run("run-2"))
            await trio.testing.wait_all_tasks_blocked()
            holder.execute("ROLLBACK")
        holder.close()
        assert [run.id for run in await store.runs()] == ["run-2", "run-1"]


async def test_a_lock_that_is_never_released_is_named(tmp_path: Path) -> None:
    """Past the deadline every waiting call fails with the file and the reason, and reads go on."""
    store = SqliteStore(f"sqlite:///{tmp_path}/journal.db", busy_seconds=0.05)
    async with store.open():
        holder = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(PluginError, match=r"journal\.db: another process kept it locked for 0\.05 s"):
            await store_run(store, a_run())
        assert await store.runs() == []
        holder.close()
        await store_run(store, a_run())


CHILD = """
import sys, resource, trio
from decimal import Decimal
from sandstorm._errors import PluginError
from sandstorm._sqlite import SqliteStore
from sandstorm._store import AttemptRow, LedgerRow, RunRow

url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = SqliteStore(url)

def rows(number):
    run = RunRow(id=f"{name}-{number:05}", tenant="t", created_at=1.0, plan="x" * 500)
    attempt = AttemptRow(id=run.id, run=run.id, number=1, provider="p", offer="o", dispatch_by=2.0, expires_at=3.0, created_at=1.0)
    return run, attempt, LedgerRow(attempt=run.id, run=run.id, tenant="t", provider="p", kind="reserve",
                                   amount=Decimal(number), basis="exposure", at=1.0)

async def write(start):
    for number in range(start, count, 8):
        run, attempt, reserved = rows(number)
        await store.begin(run, attempt, reserved)
        print(run.id, flush=True)

async def main():
    async with store.open(), trio.open_nursery() as nursery:
        for start in range(8):
            nursery.start_soon(write, start)
"""


def child(code: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True)


async def stored(url: str) -> set[str]:
    """The ids of all runs that have their attempt and their reservation."""
    store = SqliteStore(url)
    async with store.open():
        found = [await store.run(run.id) for run in await store.runs(limit=10_000)]
    return {row[0].id for row in found if row is not None and len(row[1]) == len(row[2]) == 1}


@pytest.mark.parametrize("acknowledged", [1, 37, 300])
async def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, acknowledged: int) -> None:
    """After SIGKILL in the middle of writing, every run that was acknowledged is there, whole."""
    url = f"sqlite:///{tmp_path}/journal.db"
    process = child(CHILD + "trio.run(main)", url, "run", "1000000")
    assert process.stdout is not None
    with process:
        seen = {process.stdout.readline().strip() for _ in range(acknowledged)}
        process.kill()
        # The last line may be torn: it was then never acknowledged in full.
        seen |= {line.strip() for line in process.stdout if line.endswith("\n")}
    kept = await stored(url)
    assert seen <= kept
    assert len(kept) <= len(seen) + 8


async def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    """Two processes that create and write the same journal at once both keep everything."""
    url = f"sqlite:///{tmp_path}/journal.db"
    with child(CHILD + "trio.run(main)", url, "a", "300") as one, child(CHILD + "trio.run(main)", url, "b", "300") as two:
        outputs = [process.communicate(timeout=60)[0].split() for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0]
    assert await stored(url) == {*outputs[0], *outputs[1]}
    assert [len(output) for output in outputs] == [300, 300]


FULL = """
async def full():
    async with store.open():
        await store.begin(*rows(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        failures = []
        for number in range(2, 100):
            try:
                await store.begin(*rows(number))
            except PluginError as exc:
                failures.append(str(exc))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await store.begin(*rows(100))
        print(len(failures) + len(await store.runs(limit=1000)), *set(failures))
"""


async def test_a_full_disk_fails_the_call_and_not_the_store(tmp_path: Path) -> None:
    """Writes that do not fit raise an error that names the file; once there is room the store goes on, nothing torn."""
    url = f"sqlite:///{tmp_path}/journal.db"
    with child(CHILD + FULL + "trio.run(full)", url, "run", "0") as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert output.startswith("100 plugin 'sqlite' (write): ") and "journal.db: " in output
    assert len(await stored(url)) > 1


# --- SQLite: cost -----------------------------------------------------------------------------------------


async def test_runs_at_once_share_commits(tmp_path: Path) -> None:
    """A hundred begins at once need few waits for the disk."""
    store = SqliteStore(f"sqlite:///{tmp_path}/journal.db")
    async with store.open():
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(store_run, store, a_run(f"run-{number}"))
        assert 1 <= store.commits <= 20
        assert len(await store.runs(limit=1000)) == 100


@pytest.fixture
def connection() -> Any:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    schema.migrate(connection)
    yield connection
    connection.close()


def whole_life(connection: sqlite3.Connection, run: RunRow) -> None:
    """Everything that a run writes."""
    attempt = an_attempt(run)
    row = schema.ledger_values(booked(attempt, "reserve", "1"))
    progress = schema.progress_values(attrs.evolve(attempt, state="released"))
    schema.begin(connection, schema.run_values(run), schema.attempt_values(attempt), row)
    schema.update(connection, progress)
    schema.finish(connection, schema.run_values(run), progress, [row])


READS: dict[str, Callable[[sqlite3.Connection], object]] = {
    "run": lambda connection: schema.select_run(connection, "run-000001"),
    "newest runs": lambda connection: schema.select_runs(connection, 20, None, None),
    "a tenant's runs": lambda connection: schema.select_runs(connection, 20, "acme", "run-5"),
    "open attempts": schema.select_open_attempts,
}


def test_no_statement_scans_a_table(connection: sqlite3.Connection) -> None:
    """SQLite's own plan of every statement uses an index; only the index of open attempts is read whole."""
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    whole_life(connection, a_run("run-000001"))
    for read in READS.values():
        read(connection)
    connection.set_trace_callback(None)
    assert len(statements) >= 12
    steps = [row[3] for statement in statements for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
    assert [step for step in steps if "SCAN" in step] == ["SCAN attempts USING INDEX attempts_open"]
    assert not [step for step in steps if "TEMP B-TREE" in step]


def test_cost_does_not_grow_with_the_rows(connection: sqlite3.Connection) -> None:
    """With 20,000 stored runs every operation takes as many steps of SQLite's machine as with 100."""

    def steps(work: Callable[[], object]) -> int:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1

        connection.set_progress_handler(step, 1)
        work()
        connection.set_progress_handler(None, 1)
        return count

    def measure(run_id: str) -> dict[str, int]:
        return {
            "life": steps(lambda: whole_life(connection, a_run(run_id))),
            **{name: steps(lambda read=read: read(connection)) for name, read in READS.items()},  # type: ignore[misc]
        }

    for number in range(100):
        whole_life(connection, a_run(f"run-{number:06}"))
    few = measure("run-000100")
    for number in range(101, 20_000):
        whole_life(connection, a_run(f"run-{number:06}"))
    many = measure("run-020000")
    assert all(many[name] <= few[name] * 1.05 + 5 for name in few), (few, many)
