"""The three clients: blocking code, trio and asyncio get the same, and each lets go of everything when it is interrupted."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sandstorm import AsyncSandstorm, Constraints, InvalidInput, NoCandidate, RunResult, SandboxGone, Sandstorm, Task
from sandstorm._sqlite import SqliteStore
from sandstorm.provider import Provider
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider, plugin_for

SETTINGS = {"store": "sqlite://", "strategy": "ordered", "plugins": {"strategies": {"order": ["first", "second"]}}}
PROGRAM = "out hello\nerr problem\ncat\nexit 3"


def blocking(*providers: Provider) -> Sandstorm:
    """The blocking client over these providers."""
    return Sandstorm(settings=SETTINGS, plugins=[("testing", plugin_for(*providers))])


def asynchronous(*providers: Provider, **options: Any) -> AsyncSandstorm:
    """The async client over these providers."""
    return AsyncSandstorm(settings=SETTINGS, plugins=[("testing", plugin_for(*providers))], **options)


def code(text: str) -> Task:
    """A task of the toy language."""
    return Task(code=text, language="python")


def fresh() -> tuple[Provider, Provider]:
    """A provider without room, and one that works."""
    return (
        ChaosProvider(ReferenceProvider("first"), [Fault(step="create", kind="capacity", times=99)]),
        ReferenceProvider("second"),
    )


@pytest.fixture(params=["trio", "asyncio"])
def run_async(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Runs an async function under one of the two libraries, on the real clock."""
    if request.param == "trio":
        return trio.run
    return lambda function: asyncio.run(function())  # type: ignore[arg-type]


def essence(result: RunResult) -> tuple[Any, ...]:
    """What must not depend on the kind of caller."""
    attempts = [(a.provider, a.outcome, a.error, a.error_class, a.open) for a in result.attempts]
    reasons = [line for line in result.plan.reasons if not line.startswith("excluded local")]
    return result.stdout, result.stderr, result.exit, result.outputs, result.provider, result.isolation, attempts, reasons


# --- the same everywhere ----------------------------------------------------------------------------------


def test_same_result() -> None:
    """The same program gives an equal result from blocking code, trio and asyncio, failover and reasons included."""
    arguments: dict[str, Any] = {"language": "python", "stdin": "typed\n", "outputs": ["main.py", "missing"]}

    async def run() -> RunResult:
        async with asynchronous(*fresh()) as client:
            return await client.run(PROGRAM, **arguments)

    with blocking(*fresh()) as client:
        results = [client.run(PROGRAM, **arguments), trio.run(run), asyncio.run(run())]
    first, second, third = map(essence, results)
    assert first == second == third
    assert (results[0].stdout, results[0].stderr, results[0].exit.code) == (b"hello\ntyped\n", b"problem\n", 3)
    assert results[0].outputs == {"main.py": PROGRAM.encode()}
    assert [attempt.provider for attempt in results[0].attempts] == ["first", "second"]


def test_blocking_client_without_with() -> None:
    """A blocking client opens on its first use and can be closed, twice, and used again."""
    client = blocking(ReferenceProvider())
    try:
        assert client.run("out a", "python").stdout == b"a\n"
        assert [run.title for run in client.runs()] == ["python"]
        client.close()
        client.close()
        assert client.run("out b", "python").stdout == b"b\n"
    finally:
        client.close()


def test_questions_of_the_blocking_client() -> None:
    """The blocking client shows plans, runs, accounts and plugins."""
    with blocking(*fresh()) as client:
        assert len(client.plan("out a", "python").candidates) == 2
        assert client.runs() == []
        result = client.run("out a", "python")
        record = client.show(result.id[:-2])
        assert (record.run.id, [row.provider for row in record.attempts]) == (result.id, ["first", "second"])
        with pytest.raises(InvalidInput, match="run: expected the id of a stored run"):
            client.show("nothing")
        assert {"first": True, "second": True}.items() <= {s.name: s.ok for s in client.providers()}.items()
        assert "testing" in {info.name for info in client.plugins().loaded}
        assert (client.language_of("a/b.js"), client.language_of("x.unknown")) == ("javascript", None)


def test_bad_arguments(run_async: Any) -> None:
    """Bad arguments come out as the same located errors from every client."""

    async def run() -> None:
        async with asynchronous(ReferenceProvider("first")) as client:
            with pytest.raises(InvalidInput, match="language: expected one of bash"):
                await client.run("out a", "klingon")
            with pytest.raises(InvalidInput, match="task: expected either a task or its fields"):
                await client.run(task=code("out a"), timeout=3)

    run_async(run)
    with blocking(ReferenceProvider("first")) as client:
        with pytest.raises(InvalidInput, match="language: expected one of bash"):
            client.run("out a", "klingon")
        with pytest.raises(InvalidInput, match="task: expected either a task or its fields"):
            client.run(task=code("out a"), timeout=3)


def test_settings_errors(run_async: Any) -> None:
    """Settings that are wrong come out as themselves where a client is opened."""

    async def run() -> None:
        async with AsyncSandstorm(settings={"store": "papyrus://"}):
            pass

    with pytest.raises(Exception, match="papyrus"):
        run_async(run)
    with pytest.raises(Exception, match="papyrus"), Sandstorm(settings={"store": "papyrus://"}):
        pass


# --- map --------------------------------------------------------------------------------------------------


def test_map_blocking() -> None:
    """`map` goes on past a task that fails and past one that is wrong, and hands out each with its result or error."""
    provider = ChaosProvider(ReferenceProvider("first"), [Fault(step="create", kind="capacity")])
    tasks = [code("out unlucky"), Task(code="x", language="klingon"), code("out fine")]
    with blocking(provider) as client:
        found = [(task.code, type(result).__name__) for task, result in client.map(tasks, concurrency=1)]
    assert found == [("out unlucky", "RunFailed"), ("x", "InvalidInput"), ("out fine", "RunResult")]


def test_map_async(run_async: Any) -> None:
    """The async `map` hands out results as they finish, errors included, under trio and asyncio."""

    async def run() -> list[str]:
        async with asynchronous(ReferenceProvider("first")) as client:
            tasks = [code("sleep 0.2\nout slow"), Task(code="x", language="klingon"), code("out quick")]
            async with client.map(tasks, concurrency=2) as results:
                return [getattr(result, "text", type(result).__name__) async for _, result in results]

    assert run_async(run) == ["InvalidInput", "quick\n", "slow\n"]


async def test_map_concurrency(autojump_clock: MockClock) -> None:
    """At most `concurrency` tasks run at once."""
    provider = ReferenceProvider("first")
    async with asynchronous(provider, store=SqliteStore("sqlite://", inline=True)) as client:
        async with client.map([code("sleep 1")] * 10, concurrency=3) as results:
            assert len([item async for item in results]) == 10
    live = [{"create": 1, "destroy": -1}.get(call.step, 0) for call in provider.vendor.log]
    assert max(itertools.accumulate(live)) == 3
    assert trio.current_time() == 4.0


async def test_map_ends_early(autojump_clock: MockClock) -> None:
    """Leaving `map` early cancels what is under way, starts nothing more, and leaves nothing live."""
    provider = ReferenceProvider("first")
    async with asynchronous(provider, store=SqliteStore("sqlite://", inline=True)) as client:
        async with client.map([code(f"sleep {n}") for n in range(1, 100)], concurrency=5) as results:
            async for task, _ in results:
                assert task.code == "sleep 1"
                break
        assert trio.current_time() == 1.0
        assert provider.vendor.live() == ()
        assert len([call for call in provider.vendor.log if call.step == "create"]) <= 7


def test_map_ends_early_blocking() -> None:
    """Ending the blocking iteration early cancels the rest at once."""
    provider = ReferenceProvider("first")
    began = time.monotonic()
    with blocking(provider) as client:
        results = client.map([code("out a"), *[code("sleep 60")] * 9], concurrency=4)
        assert next(results)[0].code == "out a"
        results.close()  # type: ignore[attr-defined]
        assert client.run("out b", "python").stdout == b"b\n"
    assert provider.vendor.live() == ()
    assert time.monotonic() - began < 20


def test_map_ends_early_asyncio() -> None:
    """Leaving the async iteration early under asyncio cancels the rest at once."""
    provider = ReferenceProvider("first")

    async def run() -> None:
        async with asynchronous(provider) as client, client.map([code("out a"), *[code("sleep 60")] * 9]) as results:
            async for task, _ in results:
                assert task.code == "out a"
                break

    began = time.monotonic()
    asyncio.run(run())
    assert provider.vendor.live() == ()
    assert time.monotonic() - began < 20


def test_map_of_nothing() -> None:
    """No tasks give no results, and a concurrency below 1 is the caller's mistake."""
    with blocking(ReferenceProvider("first")) as client:
        assert list(client.map([])) == []
        with pytest.raises(InvalidInput, match="concurrency: expected a whole number of tasks at once"):
            list(client.map([code("out a")], concurrency=0))


# --- sandboxes --------------------------------------------------------------------------------------------


def test_sandbox_blocking(tmp_path: Path) -> None:
    """A sandbox keeps its files between programs, streams output as it comes, moves files, and is destroyed at the end."""
    provider = ReferenceProvider("first")
    (tmp_path / "local").write_bytes(b"x" * 300_000)
    with blocking(provider) as client:
        with client.sandbox() as box:
            assert (box.provider, box.isolation, box.id) == ("first", "microvm", provider.vendor.live()[0].id)
            assert box.native is not None
            assert box.run("write note kept", "python").exit.ok
            assert box.run("read note", "python").stdout == b"kept"
            box.upload("in/data", b"bytes\0")
            box.upload("large", tmp_path / "local")
            assert (box.download("in/data"), len(box.download("large"))) == (b"bytes\0", 300_000)
            assert box.download_to("large", tmp_path / "back") == 300_000
            assert (tmp_path / "back").read_bytes() == b"x" * 300_000
            with pytest.raises(FileNotFoundError):
                box.download("missing")
            with pytest.raises(InvalidInput):
                box.download("../escape")
            box.upload("main.py", b"out one\nerr two\nexit 4")
            with box.exec("python3", "main.py") as running:
                pieces = [(output.stream, output.data) for output in running]
                assert (pieces, running.exit and running.exit.code) == ([("stdout", b"one\n"), ("stderr", b"two\n")], 4)
            with box.exec("sleep", "60") as running:
                assert running.exit is None
        assert provider.vendor.live() == ()
        with pytest.raises(SandboxGone):
            box.run("out a", "python")
        (run,) = client.runs()
        assert (run.state, run.title) == ("finished", "sandbox")


def test_sandbox_async(run_async: Any) -> None:
    """The async sandbox does the same under trio and asyncio."""
    provider = ReferenceProvider("first")

    async def run() -> None:
        async with asynchronous(provider) as client:
            async with client.sandbox() as box:
                assert (await box.run("write note kept", "python")).exit.ok
                assert (await box.run("read note", "python", outputs=["note"])).outputs == {"note": b"kept"}
                await box.upload("main.py", b"out one\nerr two\nexit 4")
                assert await box.download("main.py") == b"out one\nerr two\nexit 4"
                async with box.exec("python3", "main.py", env={"A": "b"}) as running:
                    pieces = [(output.stream, output.data) async for output in running]
                    assert (pieces, running.exit and running.exit.code) == ([("stdout", b"one\n"), ("stderr", b"two\n")], 4)
                async with box.exec("sleep", "60") as running:
                    await running.kill()
                    assert [output async for output in running] == []
                    assert running.exit is not None
                    assert running.exit.kind == "signal"
            with pytest.raises(SandboxGone):
                await box.download("main.py")

    run_async(run)
    assert provider.vendor.live() == ()


def test_sandbox_refused(run_async: Any) -> None:
    """A sandbox that nobody gives raises as a run does, from every client."""

    async def run() -> None:
        async with asynchronous(ReferenceProvider("first")) as client:
            async with client.sandbox(constraints=Constraints(pin="other")):
                pass

    with pytest.raises(NoCandidate, match="pins other"):
        run_async(run)
    with pytest.raises(NoCandidate, match="pins other"), blocking(ReferenceProvider("first")) as client:
        with client.sandbox(constraints=Constraints(pin="other")):
            pass


# --- errors come out as themselves ------------------------------------------------------------------------


class Mine(Exception):
    """An exception of the caller's."""


CONTEXTS: dict[str, Callable[[AsyncSandstorm, Any], AbstractAsyncContextManager[Any]]] = {
    "sandbox": lambda client, box: client.sandbox(),
    "exec": lambda client, box: box.exec("sleep", "60"),
    "map": lambda client, box: client.map([code("sleep 60")] * 3),
}


@pytest.mark.parametrize("context", [None, *CONTEXTS])
@pytest.mark.parametrize("raised", [Mine("mine"), KeyError("key"), ExceptionGroup("group", [Mine(1), Mine(2)])], ids=repr)
def test_callers_exceptions(run_async: Any, context: str | None, raised: Exception) -> None:
    """What is raised inside a context comes out as the very same object, and nothing is left live."""
    provider = ReferenceProvider("first")

    async def run() -> None:
        async with asynchronous(provider) as client:
            if context is None:
                raise raised
            async with client.sandbox() as box, CONTEXTS[context](client, box):
                raise raised

    with pytest.raises(type(raised)) as caught:
        run_async(run)
    assert caught.value is raised
    assert provider.vendor.live() == ()


def test_callers_exceptions_blocking() -> None:
    """The same holds for blocking code."""
    provider = ReferenceProvider("first")
    raised = Mine()
    with pytest.raises(Mine) as caught, blocking(provider) as client:
        with client.sandbox() as box, box.exec("sleep", "60"):
            raise raised
    assert caught.value is raised
    assert provider.vendor.live() == ()


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("doing", ["run", "create", "sandbox", "making a sandbox", "map"])
def test_asyncio_cancellation(doing: str) -> None:
    """A cancelled asyncio task cancels the remote call, waits for it, and leaves nothing live."""
    provider = ReferenceProvider("first", start_seconds=0.3 if doing in ("create", "making a sandbox") else 0.0)

    async def work(client: AsyncSandstorm) -> None:
        if doing in ("run", "create"):
            await client.run("sleep 60", "python")
        elif doing == "map":
            async with client.map([code("sleep 60")] * 3) as results:
                async for _ in results:
                    pass
        else:
            async with client.sandbox() as box:
                await box.run("sleep 60", "python")

    async def run() -> None:
        async with asynchronous(provider) as client:
            task = asyncio.create_task(work(client))
            while not provider.vendor.log or provider.vendor.log[-1].step not in ("events", "create"):  # noqa: ASYNC110 - the vendor lives in another thread
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if doing in ("run", "sandbox", "map"):
                assert provider.vendor.live() == ()
        assert provider.vendor.live() == ()

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < 20


def test_asyncio_timeout() -> None:
    """`asyncio.timeout` ends a run like any other call."""
    provider = ReferenceProvider("first")

    async def run() -> None:
        async with asynchronous(provider) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.run("sleep 60", "python")
            assert provider.vendor.live() == ()
            assert (await client.run("out a", "python")).stdout == b"a\n"

    asyncio.run(run())


SCRIPT = """
import sys, trio
from sandstorm import AsyncSandstorm, Sandstorm, Task
from sandstorm.testing import ReferenceProvider, plugin_for

provider = ReferenceProvider("only", start_seconds=0.2)
options = dict(settings={"store": "sqlite://"}, plugins=[("testing", plugin_for(provider))])
task = Task(code="out ready\\nsleep 60", language="python")
ready = lambda output: print("ready", flush=True)

async def under_trio():
    async with AsyncSandstorm(**options) as client:
        await client.run(task=task, on_output=ready)

try:
    if sys.argv[1] == "trio":
        trio.run(under_trio)
    else:
        with Sandstorm(**options) as client:
            if sys.argv[1] == "run":
                client.run(task=task, on_output=ready)
            elif sys.argv[1] == "sandbox":
                with client.sandbox() as box:
                    box.run(task=task, on_output=ready)
            elif sys.argv[1] == "making":
                print("ready", flush=True)
                with client.sandbox() as box:
                    box.run(task=task)
            else:
                print("ready", flush=True)
                list(client.map([task] * 5))
except KeyboardInterrupt:
    creates = [call for call in provider.vendor.log if call.step == "create"]
    destroys = [call for call in provider.vendor.log if call.step == "destroy"]
    print("interrupted", len(provider.vendor.live()), len(creates) == len(destroys), flush=True)
"""


@pytest.mark.parametrize("doing", ["run", "sandbox", "making", "map", "trio"])
def test_interrupt(doing: str) -> None:
    """Ctrl-C in the middle comes out as `KeyboardInterrupt`, soon, and leaves nothing live at the vendor."""
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, doing], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert (out, err) == ("interrupted 0 True\n", "")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.run("out a", "python", timout=3), "timout"),
        (lambda client: list(client.map([], timeout=3)), "timeout"),
        (lambda client: client.plan("out a", "python", tenants="a"), "tenants"),
    ],
)
def test_unknown_argument(call: Any, field: str) -> None:
    """A misspelt argument is bad input that names it, and never ignored."""
    with Sandstorm(settings={"store": "sqlite://"}) as client, pytest.raises(InvalidInput) as caught:
        call(client)
    assert caught.value.field == field
