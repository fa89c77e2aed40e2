"""What outlives its router: kept sandboxes, detached runs, snapshots and forks, on a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sandstorm import (
    AsyncSandstorm,
    Environment,
    InvalidInput,
    NoCandidate,
    NotSupported,
    OutcomeUnknown,
    SandboxGone,
    SandboxSpec,
    Task,
)
from sandstorm._sqlite import SqliteStore
from sandstorm.policy import Event, Preparing, hookimpl
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for, reference_traits


@asynccontextmanager
async def router(path: Path, *providers: Any, plugins: Mapping[str, object] | None = None) -> AsyncIterator[AsyncSandstorm]:
    """A router over these providers; several of them share one journal."""
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    given = [(provider.name, plugin_for(provider)) for provider in providers] + list((plugins or {}).items())
    async with AsyncSandstorm(settings={"strategy": "ordered"}, plugins=given, store=store) as sandstorm:
        yield sandstorm


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal's file."""
    return tmp_path / "journal.db"


async def test_a_kept_sandbox_outlives_its_router(autojump_clock: MockClock, journal: Path) -> None:
    """It is found again by id, with its files, is let be at the end of each context, and ends by `destroy`."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm, sandstorm.sandbox(keep=True, lifetime=600) as box:
        await box.upload("state.txt", b"kept")
    assert len(cloud.vendor.live()) == 1
    async with router(journal, cloud) as other:
        (kept,) = await other.sandboxes()
        assert (kept.id, kept.provider, kept.state) == (box.id, "cloud", "running")
        async with other.open_sandbox(kept.id) as again:
            assert await again.download("state.txt") == b"kept"
        assert len(cloud.vendor.live()) == 1
        async with other.open_sandbox(kept.run) as again:
            await again.destroy()
            with pytest.raises(SandboxGone):
                await again.download("state.txt")
        assert await other.sandboxes() == ()
        with pytest.raises(InvalidInput, match="sandbox: expected the id of a sandbox that is kept"):
            async with other.open_sandbox(kept.id):
                pytest.fail("it was opened")
    assert cloud.vendor.live() == ()


async def test_a_kept_sandbox_is_durable_before_its_id_is_known(autojump_clock: MockClock, journal: Path) -> None:
    """The intent says that it is kept and until when, before the vendor is asked for it."""
    cloud = ReferenceProvider("cloud")
    store = SqliteStore(f"sqlite:///{journal}", inline=True)
    seen: list[Any] = []

    class Looking:
        name = "looking"

        @hookimpl
        def sandstorm_observe(self, event: Event) -> None:
            if type(event).__name__ == "AttemptOpened":
                seen.append((event, cloud.vendor.log[-1].step))

    plugins = [("cloud", plugin_for(cloud)), ("looking", Looking())]
    async with AsyncSandstorm(plugins=plugins, store=store) as sandstorm, sandstorm.sandbox(keep=True, lifetime=600):
        (row,) = await store.open_attempts()
    assert row.kept
    assert row.expires_at - row.created_at >= 600
    assert [step for _, step in seen] != ["create"]


async def test_an_expired_sandbox_is_settled_when_it_is_looked_for(autojump_clock: MockClock, journal: Path) -> None:
    """One that its vendor ended is left out of the list, its reservation released and at most its lifetime charged."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        async with sandstorm.sandbox(keep=True, lifetime=50) as box:
            pass
        await trio.sleep(100)
        assert await sandstorm.sandboxes() == ()
        run = box.plan.request.id
    store = SqliteStore(f"sqlite:///{journal}", inline=True)
    async with store.open():
        found = await store.run(run)
    assert found is not None
    assert [attempt.state for attempt in found[1]] == ["released"]
    moved = {kind: sum((row.amount for row in found[2] if row.kind == kind), Decimal(0)) for kind in ("reserve", "release")}
    assert moved["reserve"] == moved["release"] > 0


async def test_a_sandbox_that_is_not_listed_yet_is_let_be(journal: Path) -> None:
    """A vendor may show a new sandbox late: until then it stays in the journal, and in the list."""
    cloud = ReferenceProvider("cloud", traits=reference_traits(find_lag=30))
    async with router(journal, cloud) as sandstorm:
        async with sandstorm.sandbox(keep=True) as box:
            pass
        for _ in range(2):
            (kept,) = await sandstorm.sandboxes()
            assert (kept.id, kept.state) == (box.id, "unknown")
        async with sandstorm.open_sandbox(box.id) as again:
            await again.destroy()
    assert cloud.vendor.live() == ()


async def test_a_look_up_that_fails_settles_nothing(autojump_clock: MockClock, journal: Path) -> None:
    """An account that does not answer is no sighting: its sandboxes stay in the list, in an unknown state."""
    cloud = ReferenceProvider("cloud")
    chaos = ChaosProvider(cloud, [Fault(step="find", kind="provider-down")])
    async with router(journal, chaos) as sandstorm:
        async with sandstorm.sandbox(keep=True):
            pass
        assert [kept.state for kept in await sandstorm.sandboxes()] == ["unknown"]
        assert [kept.state for kept in await sandstorm.sandboxes()] == ["running"]


async def test_a_detached_run_is_collected_by_another_router(autojump_clock: MockClock, journal: Path) -> None:
    """It goes on without its router, is followed from its beginning, started once, and released when it was collected."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        run = await sandstorm.detach(argv=["out", "hello"], timeout=60)
        (attempt,) = (await sandstorm.sandboxes(),)[0]
        assert attempt.run == run
    heard = []
    async with router(journal, cloud) as other:
        result = await other.attach(run, on_output=heard.append)
        assert (result.id, result.stdout, result.exit.code) == (run, b"hello\n", 0)
        assert b"".join(output.data for output in heard) == result.stdout
        again = await other.attach(run)
        assert (again.stdout, again.exit) == (result.stdout, result.exit)
    assert cloud.vendor.live() == ()
    assert cloud.vendor.starts(f"ss-{run}-1") >= 1
    assert [call.step for call in cloud.vendor.log].count("start") == 1


async def test_leaving_a_detached_run_does_not_end_it(autojump_clock: MockClock, journal: Path) -> None:
    """Who stops following leaves it running; the next one has all of its output."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        run = await sandstorm.detach(argv=["sleep", "30"], timeout=60)
        with trio.move_on_after(5) as left:
            await sandstorm.attach(run)
        assert left.cancelled_caught
        assert len(cloud.vendor.live()) == 1
        assert (await sandstorm.attach(run)).exit.ok


async def test_a_detached_run_whose_sandbox_is_gone_is_unknown(autojump_clock: MockClock, journal: Path) -> None:
    """Nobody collected it within its lifetime: what it did is not known, it is said so, and it is not started again."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        run = await sandstorm.detach(argv=["out", "hello"], timeout=10, lifetime=50)
        await trio.sleep(100)
        with pytest.raises(OutcomeUnknown):
            await sandstorm.attach(run)
        assert [call.step for call in cloud.vendor.log].count("start") == 1
        assert await sandstorm.sandboxes() == ()


async def test_a_detached_run_whose_sandbox_is_lost_meanwhile_is_unknown(autojump_clock: MockClock, journal: Path) -> None:
    """Evicted while it is followed: the caller is told that its outcome is unknown, and nothing stays open."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        run = await sandstorm.detach(argv=["sleep", "30"], timeout=60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_evict, cloud)
            with pytest.raises(OutcomeUnknown, match="evicted"):
                await sandstorm.attach(run)
        assert await sandstorm.sandboxes() == ()


async def _evict(cloud: ReferenceProvider) -> None:
    await trio.sleep(5)
    cloud.vendor.evict(cloud.vendor.live()[0].id)


async def test_attach_needs_a_detached_run(autojump_clock: MockClock, journal: Path) -> None:
    """A run that is not known, and a sandbox that runs nothing detached, are refused by name."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        with pytest.raises(InvalidInput, match="run: expected the id of a stored run"):
            await sandstorm.attach("nothing")
        async with sandstorm.sandbox(keep=True) as box:
            with pytest.raises(InvalidInput, match="run: expected a run that was detached"):
                await sandstorm.attach(box.plan.request.id)


async def test_a_snapshot_is_where_another_sandbox_begins(autojump_clock: MockClock, journal: Path) -> None:
    """Its files are there in a new sandbox of the same account, and it has a row of its own in the journal."""
    cloud, other = ReferenceProvider("cloud"), ReferenceProvider("other")
    store = SqliteStore(f"sqlite:///{journal}", inline=True)
    plugins = [(provider.name, plugin_for(provider)) for provider in (cloud, other)]
    async with AsyncSandstorm(settings={"strategy": "ordered"}, plugins=plugins, store=store) as sandstorm:
        async with sandstorm.sandbox() as box:
            await box.upload("a/b.txt", b"copied")
            name = await box.snapshot(3600)
        assert [row.kind for row in await store.open_attempts()] == ["snapshot"]
        async with sandstorm.sandbox(SandboxSpec(snapshot=name)) as box:
            assert await box.download("a/b.txt") == b"copied"
            assert box.provider == name.partition("/")[0]
            assert "is not one of its account" in " ".join(box.plan.reasons)
        with pytest.raises(NoCandidate, match="is not one of its account"):
            async with sandstorm.sandbox(SandboxSpec(snapshot="elsewhere/1")):
                pytest.fail("it was made")


async def test_a_fork_has_the_files_and_a_life_of_its_own(autojump_clock: MockClock, journal: Path) -> None:
    """What one of the two writes is not in the other, and both are released."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm:
        async with sandstorm.sandbox() as box:
            await box.upload("shared.txt", b"1")
            async with box.fork() as fork:
                assert fork.id != box.id
                await fork.upload("own.txt", b"2")
                assert await fork.download("shared.txt") == b"1"
                with pytest.raises(FileNotFoundError):
                    await box.download("own.txt")
            assert len(cloud.vendor.live()) == 1
        assert cloud.vendor.live() == ()


async def test_a_longer_life_is_reserved_before_it_is_asked_for(autojump_clock: MockClock, journal: Path) -> None:
    """`extend` moves the end, and what the whole life can cost is reserved; beyond the provider's limit it is refused."""
    cloud = ReferenceProvider("cloud", lifetime=1000)
    async with router(journal, cloud) as sandstorm:
        async with sandstorm.sandbox(lifetime=100) as box:
            await trio.sleep(60)
            await box.extend(100)
            await trio.sleep(90)
            await box.upload("alive.txt", b"")
            with pytest.raises(InvalidInput, match="lifetime: expected seconds from now, above 0 and at most"):
                await box.extend(5000)
        record = await _ledger(journal, box.plan.request.id)
    reserved = [row.amount for row in record if row.kind == "reserve"]
    assert len(reserved) == 2
    assert sum(reserved) == sum(row.amount for row in record if row.kind == "release")
    owed = cloud.vendor.owed()
    assert owed is not None
    assert sum(reserved) >= owed


async def test_what_is_not_declared_is_refused_at_once(autojump_clock: MockClock, journal: Path) -> None:
    """The vendor is not even asked, and the error has the provider's reason."""
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm, sandstorm.sandbox() as box:
        asked = len(cloud.vendor.log)
        with pytest.raises(NotSupported, match="cloud has no Pause here"):
            await box.pause()
        with pytest.raises(NotSupported, match="cloud has no Interpreter here"):
            await box.run("1", "python", keep_state=True)
        with pytest.raises(NotSupported, match="cloud has no Interactive here"):
            async with box.exec("cat", interactive=True):
                pytest.fail("it was started")
        assert len(cloud.vendor.log) == asked


async def test_files_are_listed_and_moved_as_directories(journal: Path, tmp_path: Path) -> None:
    """A directory comes back as it went, and progress adds up to its bytes."""
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"1" * 10)
    (source / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))
    moved: list[int] = []
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm, sandstorm.sandbox() as box:
        assert await box.upload_directory("there", source, moved.append) == 2
        assert sum(moved) == 266
        assert [entry.path for entry in await box.list("there", recursive=True)] == [
            "there/a.txt",
            "there/deep",
            "there/deep/er",
            "there/deep/er/b.bin",
        ]
        assert (await box.stat("there/a.txt")).size == 10
        assert await box.download_directory("there", tmp_path / "back") == []
        await box.remove("there/deep")
        assert [entry.path for entry in await box.list("there")] == ["there/a.txt"]
    assert {p.relative_to(tmp_path / "back"): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()} == {
        p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()
    }


async def test_links_in_a_local_directory_are_refused_before_anything_is_sent(journal: Path, tmp_path: Path) -> None:
    """A link might lead anywhere on this machine."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"")
    (source / "link").symlink_to("/etc/passwd")
    cloud = ReferenceProvider("cloud")
    async with router(journal, cloud) as sandstorm, sandstorm.sandbox() as box:
        with pytest.raises(InvalidInput, match="source: expected files and directories only, and no links"):
            await box.upload_directory(".", source)
        assert await box.list() == []


async def test_an_environment_is_prepared_before_the_create(autojump_clock: MockClock, journal: Path) -> None:
    """A run with requirements has them built first, and `prepare` builds them ahead."""
    cloud = ReferenceProvider("cloud")
    seen: list[Event] = []

    class Watcher:
        @hookimpl
        def sandstorm_observe(self, event: Event) -> None:
            seen.append(event)

    environment = Environment(language="python", requirements=("numpy",))
    async with router(journal, cloud, plugins={"watcher": Watcher()}) as sandstorm:
        prepared = await sandstorm.prepare(environment)
        assert (prepared.provider, prepared.name) == ("cloud", "environment-1")
        await sandstorm.run(task=Task(argv=("out", "1")), spec=SandboxSpec(environment=environment))
    steps = [call.step for call in cloud.vendor.log if call.step in ("prepare", "create")]
    assert steps == ["prepare", "prepare", "create"]
    assert [event.provider for event in seen if isinstance(event, Preparing)] == ["cloud", "cloud"]


async def _ledger(path: Path, run: str) -> Any:
    store = SqliteStore(f"sqlite:///{path}", inline=True)
    async with store.open():
        found = await store.run(run)
    assert found is not None
    return found[2]
