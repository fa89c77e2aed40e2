"""What only the PostgreSQL store promises: several hosts, lost connections, leases, and passwords that are not shown."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import psycopg
import pytest
import trio
from alembic.config import Config
from alembic.script import ScriptDirectory
from test_store import a_run, an_attempt, booked, store_run

from sandstorm import InvalidInput, PluginError
from sandstorm.policy import KeyRow, KeyTaken, Limit, LimitReached, Observation
from sandstorm_store_postgres import PostgresPlugin, _migrate
from sandstorm_store_postgres._committer import WRITE_LOCK
from sandstorm_store_postgres._store import PostgresStore

PASSWORD = "hunter2secret"
Query = Callable[[str], list[tuple[object, ...]]]


async def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - another process or server changes it
            await trio.sleep(0.02)


async def until_dead(store: PostgresStore, epoch: int, seconds: float) -> float:
    """After how many seconds a router counts as dead."""
    began = trio.current_time()
    with trio.fail_after(seconds):
        while await store.living([epoch]):  # noqa: ASYNC110 - the database's clock changes it
            await trio.sleep(0.02)
    return trio.current_time() - began


# --- the plugin and its URL -------------------------------------------------------------------------------


def test_the_plugin_answers_for_its_schemes() -> None:
    """The plugin serves both spellings of its scheme, and leaves other schemes to other plugins."""
    for scheme in ("postgresql", "postgres"):
        store = PostgresPlugin().sandstorm_store(f"{scheme}://me:{PASSWORD}@db.example:5433/journal?sslmode=require")
        assert isinstance(store, PostgresStore) and store.url == "postgresql://me@db.example:5433/journal"
    assert PostgresPlugin().sandstorm_store("sqlite://") is None


def test_importing_the_plugin_loads_no_driver() -> None:
    """The driver is loaded when a store is made, not when the plugin is imported."""
    code = "import sys, sandstorm_store_postgres; sys.exit(any(name in sys.modules for name in ('psycopg', 'alembic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("rest", ["@[host/db", "@host/db?nonsense=1", "@host:%zz/db", "@x@host/db", "/x@host/db"])
def test_an_unreadable_url_is_refused_without_its_password(rest: str) -> None:
    """A URL that libpq cannot read names the setting and shows what would be right, and nothing of what was given."""
    with pytest.raises(InvalidInput, match='store: expected a URL such as "postgresql://') as caught:
        PostgresStore(f"postgresql://me:{PASSWORD}{rest}")
    assert (
        PASSWORD not in f"{caught.value} {caught.value!r}" and "x@h" not in str(caught.value) and caught.value.__cause__ is None
    )


@pytest.mark.parametrize("host", ["socket", "127.0.0.1:1"])
async def test_no_error_shows_a_password(server: Any, host: str, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong password and a server that is not there are named by the URL without the password, in errors and in logs."""
    where = server.url("postgres").rpartition("@")[2] if host == "socket" else f"{host}/postgres"
    store = PostgresStore(f"postgresql://secured:wrong-{PASSWORD}@{where}", patience=0.5)
    with pytest.raises(PluginError, match="password authentication failed" if host == "socket" else "refused") as caught:
        async with store.open():
            pytest.fail("it opened")
    shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r} {store!r} {store.url} {caplog.text}"
    assert PASSWORD not in shown and "postgresql://secured@" in shown
    assert caught.value.stage == "open"


async def test_a_password_opens_the_store(server: Any, database: str) -> None:
    """A role with a password, and no rights but those on its database, keeps a journal."""
    server.execute(f"ALTER DATABASE {database} OWNER TO secured")
    store = PostgresStore(server.url(database).replace("postgres@", f"secured:{PASSWORD}@"))
    async with store.open():
        await store_run(store, a_run())
        assert [run.id for run in await store.runs()] == ["run-1"]


# --- the schema -------------------------------------------------------------------------------------------


def test_every_migration_is_known() -> None:
    """The revisions that the store compares with are those of the migration scripts, in their order."""
    config = Config()
    config.set_main_option("script_location", str(Path(_migrate.__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config).walk_revisions()
    assert tuple(script.revision for script in scripts)[::-1] == _migrate.REVISIONS


async def test_many_may_create_the_schema_at_once(url: str, query: Query) -> None:
    """Stores that open an empty database at the same time all work, and it is migrated once."""

    async def use(number: int) -> None:
        store = PostgresStore(url)
        async with store.open():
            await store_run(store, a_run(f"run-{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(use, number)
    assert query("SELECT version_num FROM sandstorm.revision") == [(_migrate.REVISIONS[-1],)]
    assert query("SELECT count(*) FROM sandstorm.runs") == [(4,)]


async def test_a_newer_schema_is_refused_readably(url: str, query: Query) -> None:
    """A database of a later version says which schema it has and which one is known."""
    async with PostgresStore(url).open():
        pass
    query("UPDATE sandstorm.revision SET version_num = '9999'")
    with pytest.raises(InvalidInput, match="a journal of schema 0001, the newest that this Sandstorm knows, got '9999'"):
        async with PostgresStore(url).open():
            pytest.fail("it opened")


async def test_another_encoding_is_refused(server: Any) -> None:
    """A database that cannot hold every text is refused when it is opened."""
    server.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(InvalidInput, match="encoding UTF8, got 'LATIN1'"):
        async with PostgresStore(server.url("latin")).open():
            pytest.fail("it opened")


@pytest.mark.parametrize("error", ["\x1a", "\x1a0", "\0\x1a1", "\x1a\0", "a\x1a1\0b"])
async def test_every_character_comes_back(url: str, error: str) -> None:
    """The zero character, which PostgreSQL cannot hold, and the one that stands for it are both read back."""
    store = PostgresStore(url)
    async with store.open():
        attempt = an_attempt(a_run(), error=error)
        await store.begin(a_run(), attempt, None)
        assert await store.open_attempts() == [attempt]


# --- two routers over one database ------------------------------------------------------------------------


async def test_two_routers_fence_each_other(url: str) -> None:
    """What one router took over the other cannot write any more, and of two that take it one gets it."""
    one, two = PostgresStore(url), PostgresStore(url)
    async with one.open(), two.open(), one.enlisted() as first, two.enlisted() as second:
        assert first != second
        attempt = an_attempt(a_run(), epoch=first)
        await one.begin(a_run(), attempt, booked(attempt, "reserve", "1"))
        taken = await two.take(attempt, second)
        assert taken == attrs.evolve(attempt, epoch=second)
        assert await one.take(attempt, first) is None
        assert await one.update(attrs.evolve(attempt, state="bound"), durable=True) is False
        assert await one.finish(a_run(state="failed"), attempt, [booked(attempt, "settle", "1")]) is False
        assert await two.update(attrs.evolve(taken, state="releasing"), durable=True) is True
        found = await one.run("run-1")
        assert found is not None and (found[0].state, found[1][0].state, len(found[2])) == ("running", "releasing", 1)


async def test_a_limit_holds_across_routers(url: str) -> None:
    """Of many reservations at once from two routers, exactly as many fit as the limit has room for."""
    limit = Limit(key="tenant:acme", usd=Decimal(1), window=3600)
    refused: list[str] = []

    async def begin(store: PostgresStore, run_id: str) -> None:
        attempt = an_attempt(a_run(run_id), exposure=Decimal("0.25"))
        try:
            await store.begin(a_run(run_id), attempt, booked(attempt, "reserve", "0.25"), limits=[limit])
        except LimitReached:
            refused.append(run_id)

    one, two = PostgresStore(url), PostgresStore(url)
    async with one.open(), two.open():
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(begin, (one, two)[number % 2], f"run-{number:02}")
        kept = [run.id for run in await one.runs()]
        assert (len(kept), len(refused)) == (4, 16) and not {*kept} & {*refused}
        attempt = an_attempt(a_run(kept[0]))
        assert await one.update(attrs.evolve(attempt, state="released"), [booked(attempt, "release", "0.25")], durable=True)
        await begin(two, "late")
        assert "late" in [run.id for run in await one.runs()]


async def test_a_key_is_one_runs_alone(url: str) -> None:
    """Of many runs with one key from two routers one is admitted, and the others are told which, and leave nothing."""
    held: list[str] = []

    async def begin(store: PostgresStore, run_id: str) -> None:
        key = KeyRow(tenant="acme", key="k", run=run_id, fingerprint="f")
        try:
            await store.begin(a_run(run_id), an_attempt(a_run(run_id)), None, key=key)
        except KeyTaken as exc:
            held.append(exc.held.run)

    one, two = PostgresStore(url), PostgresStore(url)
    async with one.open(), two.open():
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(begin, (one, two)[number % 2], f"run-{number}")
        (admitted,) = await one.runs()
        assert held == [admitted.id] * 9 and len(await one.open_attempts()) == 1
        await one.finish(attrs.evolve(admitted, state="failed"), attrs.evolve(an_attempt(admitted), state="absent"), [])
        await begin(two, "later")
        assert [run.id for run in await one.runs()] == [admitted.id, "later"] and len(held) == 9


async def test_runs_at_once_share_commits(url: str) -> None:
    """A hundred begins at once need few commits."""
    store = PostgresStore(url)
    async with store.open():
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(store_run, store, a_run(f"run-{number}"))
        assert 1 <= store.commits <= 10
        assert len(await store.runs(limit=1000)) == 100


# --- leases -----------------------------------------------------------------------------------------------

ROUTER = """
import sys, trio
from sandstorm_store_postgres._store import PostgresStore

async def main():
    store = PostgresStore(sys.argv[1], lease=1.0)
    async with store.open(), store.enlisted() as epoch:
        print(epoch, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@contextmanager
def router(url: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A router in a process of its own, and its epoch."""
    with subprocess.Popen([sys.executable, "-c", ROUTER, url], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


async def test_a_killed_router_dies_with_its_lease(url: str) -> None:
    """A router lives as long as it renews its lease, for a lease's time after it was killed, and then no longer."""
    store = PostgresStore(url, lease=1.0)
    async with store.open(), store.enlisted() as own:
        with router(url) as (process, epoch):
            await trio.sleep(1.5)
            assert await store.living([own, epoch, 12345]) == {own, epoch}
            process.kill()
            assert 0.5 < await until_dead(store, epoch, 10) < 3
            assert await store.living([own, epoch]) == {own}


async def test_a_router_that_leaves_is_dead_at_once(url: str) -> None:
    """An epoch ends with its context, is never given again, and epoch 0, which nobody has, never lives."""
    store = PostgresStore(url)
    async with store.open():
        async with store.enlisted() as first:
            assert await store.living([0, first]) == {first}
        assert await store.living([first]) == set()
        async with store.enlisted() as second:
            assert second > first


async def test_a_newcomer_waits_before_it_concludes(url: str, query: Query) -> None:
    """A lease that ran out long ago counts only after a newcomer has seen the store be writable for a lease's time."""
    store = PostgresStore(url, lease=1.0)
    async with store.open():
        gone = "now() - interval '1 hour'"
        columns = "started_at, steady_since, renewed_at, lease_until"
        ((epoch,),) = query(f"INSERT INTO sandstorm.routers ({columns}) VALUES ({gone}, {gone}, {gone}, {gone}) RETURNING epoch")
        assert isinstance(epoch, int)
        async with store.enlisted():
            assert await store.living([epoch]) == {epoch}
            assert await until_dead(store, epoch, 5) > 0.7


async def test_no_lease_ends_while_the_store_is_away(server: Any, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """After the database was away for longer than a lease, every router still lives, keeps its epoch, and says what happened."""
    one, two = PostgresStore(url, lease=1.0), PostgresStore(url, lease=1.0)
    async with one.open(), two.open(), one.enlisted() as first, two.enlisted() as second:
        attempt = an_attempt(a_run(), epoch=first)
        await one.begin(a_run(), attempt, None)
        await trio.sleep(1.2)
        server.stop()
        await trio.sleep(1.8)
        server.start()
        for _ in range(40):
            assert await two.living([first, second]) == await one.living([first, second]) == {first, second}
            await trio.sleep(0.05)
        assert await one.update(attrs.evolve(attempt, state="bound"), durable=True)
        await wait_until(lambda: "too late" in caplog.text)
    assert "a lease cannot be renewed: plugin 'postgres' (lease): postgresql://postgres@" in caplog.text


# --- lost connections -------------------------------------------------------------------------------------

DROP = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sandstorm' AND datname = current_database()"
)


async def test_a_dropped_connection_is_survived(url: str, query: Query) -> None:
    """When the server ends every connection, the next write and the next read work."""
    store = PostgresStore(url)
    async with store.open():
        for number in range(3):
            await store_run(store, a_run(f"run-{number}"))
            query(DROP)
            assert len(await store.runs()) == number + 1
            query(DROP)


async def test_a_crash_of_the_server_loses_nothing(server: Any, url: str) -> None:
    """Through a crash and a restart amid many writes, each is written once, and nobody is told otherwise."""
    store = PostgresStore(url)
    count = 0

    async def write(lane: int) -> None:
        nonlocal count
        for number in range(40):
            await store_run(store, a_run(f"run-{lane}-{number:03}"))
            count += 1

    async with store.open():
        async with trio.open_nursery() as nursery:
            for lane in range(8):
                nursery.start_soon(write, lane)
            await wait_until(lambda: count >= 50)
            await trio.to_thread.run_sync(server.stop, signal.SIGQUIT)
            await trio.to_thread.run_sync(server.start)
            assert count < 320
        found = [await store.run(run.id) for run in await store.runs(limit=1000)]
    assert [len(row[2]) for row in found if row is not None] == [1] * 320


class Proxy:
    """A socket between a store and its server that loses the next COMMIT once told to: `commit`, its `answer`, or with that `everything`."""

    def __init__(self, server_folder: Path, folder: Path) -> None:
        self.lose: str | None = None
        self.lost = 0
        self._target = str(server_folder / ".s.PGSQL.5432")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for end in self._pairs:
            _cut(end)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._pairs += [client, server]
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
        _cut(client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self.lose is not None and b"COMMIT\0" in data:
                    kind, self.lose, self.lost = self.lose, None, self.lost + 1
                    if kind != "commit":
                        for end in self._pairs if kind == "everything" else [client]:
                            if end is not server:
                                _cut(end)
                        server.sendall(data)
                        time.sleep(0.2)
                    break
                server.sendall(data)
        _cut(client)
        _cut(server)


def _cut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(server: Any) -> Iterator[tuple[Proxy, Path]]:
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        proxy = Proxy(server.folder, Path(name))
        yield proxy, Path(name)
        proxy.close()


@pytest.mark.parametrize("lose", ["answer", "commit"])
async def test_a_lost_commit_is_neither_denied_nor_repeated(
    server: Any, database: str, proxy: tuple[Proxy, Path], lose: str, query: Query
) -> None:
    """A commit whose answer is lost, and one that never arrived, are each written once; the caller need not know."""
    store = PostgresStore(server.url(database, proxy[1]))
    async with store.open():
        await store_run(store, a_run("run-0"))
        proxy[0].lose = lose
        attempt = await store_run(store, a_run("run-1"))
        assert proxy[0].lost == 1
        proxy[0].lose = lose
        assert await store.finish(a_run("run-1"), attempt, [booked(attempt, "settle", "0.05")]) is True
        assert proxy[0].lost == 2
    assert query("SELECT run, kind FROM sandstorm.ledger ORDER BY number") == [
        ("run-0", "reserve"),
        ("run-1", "reserve"),
        ("run-1", "settle"),
    ]


async def test_a_commit_in_doubt_is_called_that(server: Any, database: str, proxy: tuple[Proxy, Path]) -> None:
    """Where nobody can be asked how a commit ended, the error says that it may have been applied."""
    store = PostgresStore(server.url(database, proxy[1]), patience=1.0)
    async with store.open():
        await store_run(store, a_run("run-0"))
        proxy[0].lose = "everything"
        proxy[0]._listener.close()
        (proxy[1] / ".s.PGSQL.5432").unlink()
        with pytest.raises(PluginError, match=r"during a commit, which may have been applied: .*No such file"):
            await store_run(store, a_run("run-1"))


async def test_a_database_that_stays_away_is_named(server: Any, url: str) -> None:
    """Past its patience a call fails with the database and the reason; when the database is back the store goes on."""
    store = PostgresStore(url, patience=0.5)
    async with store.open():
        await store_run(store, a_run("run-0"))
        server.stop()
        try:
            with pytest.raises(PluginError, match=r"\(write\): postgresql://postgres@.*No such file or directory"):
                await store_run(store, a_run("run-1"))
            with pytest.raises(PluginError, match=r"\(read\): postgresql://postgres@"):
                await store.runs()
        finally:
            server.start()
        with trio.fail_after(10):
            while True:
                try:
                    await store_run(store, a_run("run-2"))
                    break
                except PluginError:
                    await trio.sleep(0.1)
        assert [run.id for run in await store.runs()] == ["run-2", "run-0"]


async def test_a_read_ends_when_it_is_cancelled(url: str, query: Query) -> None:
    """A read that the database holds up ends with its scope, and the store goes on."""
    store = PostgresStore(url)
    async with store.open():
        await store_run(store, a_run())
        with locked_runs(url):
            with trio.move_on_after(0.2) as scope:
                await store.runs()
            assert scope.cancelled_caught
        assert [run.id for run in await store.runs()] == ["run-1"]


@contextmanager
def locked_runs(url: str) -> Iterator[None]:
    """Holds a lock that every reader of runs waits for."""
    with psycopg.connect(url) as holder:
        holder.execute("LOCK TABLE sandstorm.runs IN ACCESS EXCLUSIVE MODE")
        yield


async def test_a_failed_nowait_write_is_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A nowait write that cannot be stored is logged, without its values, and what shared its commit is stored."""
    store = PostgresStore(url)
    async with store.open():
        store.observe_nowait([Observation(key="k", data="1"), Observation(key=None, data="private")])  # type: ignore[arg-type]
        store.observe_nowait([Observation(key="good", data="2")])
        assert await store.observations() == [Observation(key="good", data="2")]
    assert 'null value in column "key"' in caplog.text and "private" not in caplog.text


async def test_a_stopped_writer_does_not_stop_the_others(url: str, query: Query) -> None:
    """A writer that stands still in its transaction is ended by the server, and the other routers then go on."""
    one, two = PostgresStore(url, patience=2.0), PostgresStore(url, patience=4.0)
    async with one.open(), two.open():
        with one._database.connection() as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (WRITE_LOCK,))
            with trio.fail_after(4):
                await store_run(two, a_run())
        assert [run.id for run in await one.runs()] == ["run-1"]
