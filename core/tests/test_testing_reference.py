"""The reference provider obeys the contract, on a virtual clock."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from sandstorm import testing
from sandstorm.provider import (
    Command,
    Conflict,
    Declined,
    Environment,
    Exit,
    Facts,
    Gpu,
    InvalidInput,
    InvalidSpec,
    Network,
    Offer,
    OneShot,
    Order,
    Output,
    Process,
    Provider,
    ProviderDown,
    QuotaError,
    Reconnect,
    Sandbox,
    SandboxGone,
    SandboxLost,
    SandboxSpec,
)
from sandstorm.testing import ReferenceProvider, plugin_for, reference_traits

SPEC = SandboxSpec()


def order(provider: Provider, marker: str = "m1", *, spec: SandboxSpec = SPEC, **fields: object) -> Order:
    """An order on the provider's only offer, with an hour of life and no hurry."""
    (offer,) = provider.offers(spec, Facts())
    assert isinstance(offer, Offer)
    values = {"dispatch_by": math.inf, "lifetime": 3600.0, **fields}
    return Order(spec=spec, offer=offer, marker=marker, **values)  # type: ignore[arg-type]


def command(*argv: str, **fields: object) -> Command:
    """A command with a minute to run in."""
    return Command(argv=argv, **{"timeout": 60.0, **fields})  # type: ignore[arg-type]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    """The parts, one after the other."""
    for part in parts:
        yield part


async def read(sandbox: Sandbox, path: str) -> bytes:
    """A file of the sandbox."""
    async with sandbox.download(path) as parts:
        return b"".join([part async for part in parts])


async def collect(process: Process) -> tuple[bytes, bytes, Exit]:
    """stdout, stderr and the exit of a program, with every offset checked."""
    streams = {"stdout": b"", "stderr": b""}
    exits: list[Exit] = []
    async with process.events() as events:
        async for event in events:
            assert not exits, "nothing follows the exit"
            if isinstance(event, Output):
                assert event.data
                assert event.offset == len(streams[event.stream])
                streams[event.stream] += event.data
            else:
                assert isinstance(event, Exit)
                exits.append(event)
    (how,) = exits
    return streams["stdout"], streams["stderr"], how


@asynccontextmanager
async def program(text: str, **fields: object) -> AsyncIterator[Process]:
    """The text, started as `python3 main.py` in a fresh sandbox."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        await sandbox.upload("main.py", chunks(text.encode(errors="surrogateescape")))
        yield await sandbox.start(command("python3", "main.py", **fields))


async def run(text: str, **fields: object) -> tuple[bytes, bytes, Exit]:
    """stdout, stderr and the exit of the text as a program."""
    async with program(text, **fields) as process:
        return await collect(process)


def typed(provider: ReferenceProvider) -> Provider:
    """The provider, checked against the protocol."""
    return provider


def run_virtually(function: Callable[[], object]) -> object:
    """The result of an async function on a clock that jumps."""
    return trio.run(function, clock=MockClock(autojump_threshold=0))  # type: ignore[arg-type]


# --- the toy language -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out hello", (b"hello\n", b"", Exit(code=0))),
        ("print('hello')", (b"hello\n", b"", Exit(code=0))),
        ('print("a", 1)', (b"a 1\n", b"", Exit(code=0))),
        ("out  two  spaces ", (b" two  spaces \n", b"", Exit(code=0))),
        ("err oops\nexit 3\nout never", (b"", b"oops\n", Exit(code=3))),
        ("# a comment\n\nout \udcff", (b"\xff\n", b"", Exit(code=0))),
        ("cat\ncat", (b"in\0put", b"", Exit(code=0))),
        ("write a/b x y\nread a/b", (b"x y", b"", Exit(code=0))),
        ("read nothing", (b"", b"line 1: no file 'nothing'\n", Exit(code=1))),
        ("env HOME", (b"/work\n", b"", Exit(code=0))),
        ("env NOPE", (b"", b"line 1: no variable 'NOPE'\n", Exit(code=1))),
        ("signal 11", (b"", b"", Exit(kind="signal", signal=11))),
        ("hog", (b"", b"", Exit(kind="out-of-memory", signal=9))),
        ("flood 70000", (b"x" * 70000, b"", Exit(code=0))),
        ("sleep soon", (b"", b"line 1: sleep needs a number of seconds\n", Exit(code=2))),
        ("import os", (b"", b"line 1: unknown instruction 'import'\n", Exit(code=127))),
        ("print(1 / 0)", (b"", b"line 1: unknown instruction 'print(1'\n", Exit(code=127))),
        ("", (b"", b"", Exit(code=0))),
    ],
)
async def test_each_instruction(text: str, expected: tuple[bytes, bytes, Exit]) -> None:
    """Each instruction does what the module says, and a wrong one is the program's own failure."""
    assert await run(text, stdin=b"in\0put", env={"HOME": "/work"}) == expected


async def test_paths_stay_in_the_work_area() -> None:
    """A program that reaches outside fails by itself, and an upload or download is refused."""
    _, stderr, how = await run("read ../../secret")
    assert b"work area" in stderr and how.code == 1
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        with pytest.raises(InvalidInput):
            await sandbox.upload("../x", chunks())
        with pytest.raises(InvalidInput):
            async with sandbox.download("/x"):
                pass


async def test_a_command_without_a_file_is_one_line() -> None:
    """Where the second word names no file, the words themselves are the program."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        assert await collect(await sandbox.start(command("out", "hello"))) == (b"hello\n", b"", Exit(code=0))


async def test_cwd_is_relative_to_the_work_area() -> None:
    """Programs and the paths in them are found from the working directory."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider, spec=SandboxSpec(files={"sub/main.py": b"write f x\nread f"})))
        stdout, _, _ = await collect(await sandbox.start(command("python3", "main.py", cwd="sub")))
        assert (stdout, await read(sandbox, "sub/f")) == (b"x", b"x")


async def test_variables_come_from_the_spec_the_secrets_and_the_command() -> None:
    """All three reach the program, the command's winning, and no secret is in the log or a repr."""
    provider = ReferenceProvider()
    wanted = order(provider, spec=SandboxSpec(env={"A": "spec", "B": "spec"}), secrets={"KEY": "hunter2"})
    async with provider.connect() as session:
        sandbox = await session.create(wanted)
        await sandbox.upload("main.py", chunks(b"env A\nenv B\nenv KEY"))
        stdout, _, _ = await collect(await sandbox.start(command("python3", "main.py", env={"B": "command"})))
    assert stdout == b"spec\ncommand\nhunter2\n"
    assert "hunter2" not in repr((provider.vendor.log, wanted, sandbox, sandbox.native))


# --- time and limits ------------------------------------------------------------------------------------


async def test_a_program_goes_on_while_nobody_listens(autojump_clock: MockClock) -> None:
    """What happens at the vendor follows the clock and not the reader."""
    async with program("sleep 5\nout a\nwrite f x\nsleep 5\nout b") as process:
        await trio.sleep(8)
        async with process.events() as events:
            assert await anext(events) == Output("stdout", b"a\n", 0)
            assert trio.current_time() == 8
            assert await anext(events) == Output("stdout", b"b\n", 2)
            assert trio.current_time() == 10
            assert await anext(events) == Exit(code=0)
            with pytest.raises(StopAsyncIteration):
                await anext(events)


@pytest.mark.parametrize("seconds", [4, 4.5, 10])
async def test_the_deadline_ends_the_program(autojump_clock: MockClock, seconds: float) -> None:
    """Output before the deadline is delivered, nothing from it on, and the exit comes at its very time."""
    stdout, _, how = await run(f"out a\nsleep {seconds}\nout b", timeout=4.0)
    assert (stdout, how, trio.current_time()) == (b"a\n", Exit(kind="deadline", signal=9), 4.0)


@pytest.mark.parametrize(("count", "kind"), [(9, "exited"), (10, "exited"), (11, "output-limit"), (10**12, "output-limit")])
async def test_the_output_limit_counts_both_streams(count: int, kind: str) -> None:
    """Exactly the limit is let through; one byte more ends the program with the limit's worth delivered."""
    stdout, stderr, how = await run(f"err abc\nflood {count}", output_limit=14)
    assert (len(stdout) + len(stderr), how.kind) == (4 + min(count, 10), kind)


async def test_kill_ends_a_running_program_and_wakes_its_reader(autojump_clock: MockClock) -> None:
    """A kill ends the program at once, twice is once, and its reader gets the output and the signal."""
    async with program("out a\nsleep 50\nout b") as process, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _kill() -> None:
            await trio.sleep(3)
            await process.kill()
            await process.kill()

        assert await collect(process) == (b"a\n", b"", Exit(kind="signal", signal=9))
        assert trio.current_time() == 3


async def test_kill_after_the_end_changes_nothing() -> None:
    """A program that has ended keeps its exit."""
    async with program("exit 4") as process:
        await process.kill()
        assert (await collect(process))[2] == Exit(code=4)


async def test_the_vendor_ends_what_outlives_its_lifetime(autojump_clock: MockClock) -> None:
    """An expired sandbox is lost at its own time, by nobody's doing, and is billed until then."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider, lifetime=10.0))
        process = await sandbox.start(command("sleep", "50"))
        async with process.events() as events:
            with pytest.raises(SandboxLost, match="expired"):
                await anext(events)
        assert trio.current_time() == 10
        await trio.sleep(90)
        with pytest.raises(SandboxLost, match="expired"):
            await sandbox.start(command("out", "x"))
        with pytest.raises(SandboxGone):
            await session.attach(sandbox.id)
        await sandbox.destroy()
    assert provider.vendor.live() == ()
    assert [charge.seconds for charge in provider.vendor.bill()] == [10.0]


async def test_an_end_that_nobody_saw_has_its_own_time(autojump_clock: MockClock) -> None:
    """A sandbox that expired unwatched is billed to its end and not to the time at which someone looked."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        await session.create(order(provider, lifetime=10.0))
        await trio.sleep(1000)
    assert [charge.seconds for charge in provider.vendor.bill()] == [10.0]


async def test_the_offer_bounds_the_lifetime(autojump_clock: MockClock) -> None:
    """A vendor ends a sandbox at its own longest lifetime where more is asked for."""
    provider = ReferenceProvider(lifetime=5.0)
    async with provider.connect() as session:
        await session.create(order(provider, lifetime=100.0))
        await trio.sleep(4.9)
        assert len(provider.vendor.live()) == 1
        await trio.sleep(0.1)
        assert provider.vendor.live() == ()


async def test_bill_follows_the_rate_card(autojump_clock: MockClock) -> None:
    """1 vCPU and half a GiB for 100 seconds cost what the card says; a destroyed sandbox costs no more."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        await trio.sleep(100)
        await sandbox.destroy()
        await trio.sleep(100)
        await session.create(order(provider, "m2"))
        await trio.sleep(10)
    assert [charge.usd for charge in provider.vendor.bill()] == [Decimal("0.0011"), Decimal("0.00011")]
    assert [charge.usd for charge in provider.vendor.bill("m2")] == [Decimal("0.00011")]
    assert provider.vendor.owed() == Decimal("0.00121")
    assert ReferenceProvider(rates=None).vendor.owed() is None


# --- identity -------------------------------------------------------------------------------------------


async def test_an_idempotency_key_makes_one_sandbox() -> None:
    """The same order is one sandbox, whenever it is sent; another order under its key is a conflict."""
    provider = ReferenceProvider()
    wanted = order(provider)
    async with provider.connect() as session:
        first = await session.create(wanted)
        again = await session.create(attrs.evolve(wanted, dispatch_by=10.0**12))
        assert (again.id, provider.vendor.creates("m1")) == (first.id, 1)
        with pytest.raises(Conflict):
            await session.create(attrs.evolve(wanted, lifetime=5.0))
        await first.destroy()
        with pytest.raises(SandboxGone):
            await session.create(wanted)
    assert provider.vendor.creates("m1") == 1
    assert [(call.step, call.refused) for call in provider.vendor.log if call.refused] == [("create", "Conflict")]


async def test_a_name_is_taken_until_its_sandbox_ends() -> None:
    """Where the marker is the name, a second create is a conflict while the first sandbox lives."""
    provider = ReferenceProvider(traits=reference_traits(marker="name"))
    async with provider.connect() as session:
        first = await session.create(order(provider))
        with pytest.raises(Conflict):
            await session.create(order(provider))
        await first.destroy()
        assert (await session.create(order(provider))).id != first.id


async def test_metadata_identifies_nothing() -> None:
    """Where the marker is only metadata, two creates are two sandboxes, and find shows both."""
    provider = ReferenceProvider(traits=reference_traits(marker="metadata"))
    async with provider.connect() as session:
        for _ in range(2):
            await session.create(order(provider))
        async with session.find("m1") as found:
            assert len([info async for info in found]) == 2


async def test_a_start_id_starts_once() -> None:
    """The same start is one program; its id is refused for another command; without an id each is its own."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        first = await sandbox.start(command("out", "x", start_id="s"))
        second = await (await session.attach(sandbox.id)).start(command("out", "x", start_id="s"))
        assert (second.id, provider.vendor.starts("s")) == (first.id, 1)
        with pytest.raises(Conflict):
            await sandbox.start(command("out", "y", start_id="s"))
        for _ in range(2):
            await sandbox.start(command("out", "x"))
    assert provider.vendor.starts("m1") == 3


async def test_nothing_is_sent_after_dispatch_by() -> None:
    """A create whose time has passed is refused before the vendor hears of it."""
    provider = ReferenceProvider(one_shot=True)
    async with provider.connect() as session:
        late = order(provider, dispatch_by=trio.current_time())
        assert isinstance(session, OneShot)
        with pytest.raises(ProviderDown):
            await session.create(late)
        with pytest.raises(ProviderDown):
            await session.launch(late, command("out"))
    assert [call.step for call in provider.vendor.log] == ["connect"]


async def test_bad_orders_are_invalid() -> None:
    """A marker out of its alphabet, no lifetime and another account's offer are the caller's mistakes."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        for wrong in (
            order(provider, "Upper"),
            order(provider, "m" * 41),
            order(provider, lifetime=0.0),
            order(ReferenceProvider("other")),
        ):
            with pytest.raises(InvalidSpec):
                await session.create(wrong)


async def test_the_cap_is_enforced() -> None:
    """One sandbox more than the account may have is refused until one ends."""
    provider = ReferenceProvider(traits=reference_traits(max_concurrent=1))
    async with provider.connect() as session:
        first = await session.create(order(provider))
        with pytest.raises(QuotaError):
            await session.create(order(provider, "m2"))
        await first.destroy()
        await session.create(order(provider, "m2"))


# --- losing and finding ---------------------------------------------------------------------------------


async def test_destroy_is_idempotent_and_calls_after_it_are_gone() -> None:
    """A released sandbox can be released again, costs nothing, and answers every other call with SandboxGone."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        process = await sandbox.start(command("sleep", "1"))
        await sandbox.destroy()
        await sandbox.destroy()
        await process.kill()
        with pytest.raises(SandboxGone):
            await sandbox.start(command("out", "x"))
        with pytest.raises(SandboxGone):
            await sandbox.upload("x", chunks(b""))
        with pytest.raises(SandboxGone):
            await read(sandbox, "x")
        with pytest.raises(SandboxGone):
            async with process.events():
                pass
        with pytest.raises(SandboxGone):
            await session.attach("no-such")


@pytest.mark.parametrize("reason", ["deleted", "evicted"])
async def test_losing_the_sandbox_ends_an_open_stream(autojump_clock: MockClock, reason: str) -> None:
    """A reader gets what was written before, then SandboxLost at the time of the loss."""
    provider = ReferenceProvider()
    async with provider.connect() as session, trio.open_nursery() as nursery:
        sandbox = await session.create(order(provider))
        process = await sandbox.start(command("sleep", "50"))

        @nursery.start_soon
        async def _take_away() -> None:
            await trio.sleep(2)
            if reason == "deleted":
                await (await session.attach(sandbox.id)).destroy()
            else:
                provider.vendor.evict(sandbox.id)

        with pytest.raises(SandboxLost, match=reason):
            await collect(process)
        assert trio.current_time() == 2


async def test_find_shows_what_exists_after_the_find_lag(autojump_clock: MockClock) -> None:
    """A sandbox is listed once the lag is over and until it ends; the vendor itself knows at once."""
    provider = ReferenceProvider(traits=reference_traits(find_lag=3.0))

    async def found(marker: str | None) -> list[str | None]:
        async with session.find(marker) as infos:
            return [info.marker async for info in infos]

    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
        assert (await found("m1"), len(provider.vendor.live())) == ([], 1)
        await trio.sleep(3)
        await session.create(order(provider, "m2"))
        assert (await found(None), await found("m1"), await found("m3")) == (["m1"], ["m1"], [])
        await sandbox.destroy()
        assert await found("m1") == []


def test_sessions_share_one_vendor_across_event_loops() -> None:
    """What one router made, another one finds later, in another event loop, with the clock going on."""
    provider = ReferenceProvider()

    async def crash() -> None:
        async with provider.connect() as session:
            await session.create(order(provider, lifetime=100.0))
            await trio.sleep(60)

    async def take_over() -> float:
        async with provider.connect() as session:
            (info,) = provider.vendor.live()
            process = await (await session.attach(info.id)).start(command("sleep", "1000"))
            with pytest.raises(SandboxLost, match="expired"):
                await collect(process)
            return trio.current_time()

    run_virtually(crash)
    assert run_virtually(take_over) == 40.0
    assert [charge.seconds for charge in provider.vendor.bill()] == [100.0]


async def test_a_closed_session_is_of_no_use() -> None:
    """A call after the session's end is a mistake in the caller, and says so."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        sandbox = await session.create(order(provider))
    with pytest.raises(RuntimeError, match="closed"):
        await sandbox.destroy()
    assert len(provider.vendor.live()) == 1


# --- files, one-shot, reconnect -------------------------------------------------------------------------


@given(parts=st.lists(st.binary(max_size=100_000), max_size=4))
@settings(max_examples=20, deadline=None)
def test_files_are_exact(parts: list[bytes]) -> None:
    """What is uploaded in any parts is downloaded byte for byte."""

    async def main() -> bytes:
        provider = ReferenceProvider()
        async with provider.connect() as session:
            sandbox = await session.create(order(provider))
            await sandbox.upload("a/./b", chunks(*parts))
            return await read(sandbox, "a/b")

    assert run_virtually(main) == b"".join(parts)


async def test_files_of_the_spec_are_there_and_missing_ones_are_named() -> None:
    """The spec's files can be read at once; a file that is not there is FileNotFoundError; sandboxes share none."""
    provider = ReferenceProvider()
    async with provider.connect() as session:
        one = await session.create(order(provider, "m1", spec=SandboxSpec(files={"x": b"1"})))
        two = await session.create(order(provider, "m2"))
        assert await read(one, "x") == b"1"
        with pytest.raises(FileNotFoundError):
            await read(two, "x")


async def test_launch_runs_the_program_as_the_sandbox_is_made(autojump_clock: MockClock) -> None:
    """One call gives both, the program starts when the sandbox is ready, and the same launch is the same program."""
    provider = ReferenceProvider(one_shot=True, start_seconds=2.0)
    wanted = order(provider, spec=SandboxSpec(files={"main.py": b"out hi\nsleep 1"}))
    async with provider.connect() as session:
        assert isinstance(session, OneShot)
        _, process = await session.launch(wanted, command("python3", "main.py", start_id="s"))
        assert trio.current_time() == 2
        _, again = await session.launch(wanted, command("python3", "main.py", start_id="s"))
        assert again.id == process.id
        assert await collect(process) == (b"hi\n", b"", Exit(code=0))
        assert trio.current_time() == 3
    assert (provider.vendor.starts("s"), provider.vendor.creates("m1")) == (1, 1)


async def test_a_cancelled_create_may_have_happened(autojump_clock: MockClock) -> None:
    """Cancelling while the sandbox starts leaves one at the vendor, as a real vendor would."""
    provider = ReferenceProvider(start_seconds=5.0)
    async with provider.connect() as session:
        with trio.move_on_after(1):
            await session.create(order(provider))
        assert [info.marker for info in provider.vendor.live()] == ["m1"]


async def test_what_is_not_declared_is_not_there() -> None:
    """Without the option there is no launch, and the offer says so; Reconnect is declared and there."""
    for one_shot in (False, True):
        provider = ReferenceProvider(one_shot=one_shot)
        wanted = order(provider)
        async with provider.connect() as session:
            assert isinstance(session, OneShot) == wanted.offer.can("OneShot") == one_shot
            assert isinstance(await session.create(wanted), Reconnect) == wanted.offer.can("Reconnect")


@given(out=st.integers(0, 12), err=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_reconnect_resumes_at_any_offset(out: int, err: int) -> None:
    """A program taken up again gives exactly the bytes from the offsets on, and its exit."""

    async def main() -> dict[str, bytes]:
        provider = ReferenceProvider()
        got = {"stdout": b"", "stderr": b""}
        async with provider.connect() as session:
            sandbox = await session.create(order(provider, spec=SandboxSpec(files={"p": b"out abc\nerr def\nout ghi\nout j"})))
            started = await sandbox.start(command("run", "p"))
            assert isinstance(sandbox, Reconnect)
            offsets = {"stdout": out, "stderr": err}
            process = await sandbox.process(started.id, offsets)
            async with process.events() as events:
                async for event in events:
                    if isinstance(event, Output):
                        assert event.offset == offsets[event.stream] + len(got[event.stream])
                        got[event.stream] += event.data
            with pytest.raises(LookupError):
                await sandbox.process("another", {})
        return got

    assert run_virtually(main) == {"stdout": b"abc\nghi\nj\n"[out:], "stderr": b"def\n"[err:]}


# --- offers and plugins ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (SandboxSpec(isolation="microvm"), "isolation"),
        (SandboxSpec(network=Network(mode="open")), "network"),
        (SandboxSpec(region="eu"), "region"),
        (SandboxSpec(gpu=Gpu(model="H100")), "gpu"),
        (SandboxSpec(environment=Environment(image="python:3")), "environment"),
    ],
)
def test_what_it_cannot_give_it_declines(spec: SandboxSpec, rule: str) -> None:
    """A control or a machine that it does not have makes it decline, by name."""
    provider = ReferenceProvider(isolation="container", network=("none",), region="us")
    (answer,) = typed(provider).offers(spec, Facts())
    assert isinstance(answer, Declined)
    assert (answer.provider, answer.rule) == ("reference", rule)


def test_it_can_be_told_to_decline() -> None:
    """A test may let it decline everything, by any rule."""
    (answer,) = ReferenceProvider(declines=("closed", "on Sundays")).offers(SPEC, Facts())
    assert answer == Declined(provider="reference", rule="closed", reason="on Sundays")


def test_plugin_for_registers_the_providers() -> None:
    """The plugin object has a name and a marked hook that returns the providers as they are."""
    providers = (ReferenceProvider("a"), ReferenceProvider("b"))
    plugin = plugin_for(*providers, name="two")
    assert (plugin.name, tuple(plugin.sandstorm_providers())) == ("two", providers)
    assert hasattr(plugin.sandstorm_providers, "sandstorm_impl")


def test_neither_pytest_nor_hypothesis_is_needed() -> None:
    """Importing `sandstorm.testing` imports no test framework."""
    code = "import sys, sandstorm.testing; sys.exit(any(name in sys.modules for name in ('pytest', 'hypothesis')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_that_is_exported_is_there() -> None:
    """`__all__` is sorted, has no doubles, and names only what exists."""
    assert testing.__all__ == sorted(set(testing.__all__), key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(testing, name) for name in testing.__all__)


# --- properties -----------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=8)
lines = st.lists(
    st.one_of(
        st.tuples(st.just("out"), words),
        st.tuples(st.just("err"), words),
        st.tuples(st.just("flood"), st.integers(0, 200_000).map(str)),
        st.tuples(st.just("sleep"), st.integers(0, 5).map(str)),
        st.tuples(st.just("cat"), st.just("")),
    ),
    max_size=12,
)


@given(lines=lines, stdin=st.binary(max_size=50), code=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_output_is_exact(lines: list[tuple[str, str]], stdin: bytes, code: int) -> None:
    """Whatever a program writes arrives split, exact, with true offsets, at the time at which it was written."""
    expected = {"out": b"", "err": b""}
    unread = stdin
    for word, rest in lines:
        if word in expected:
            expected[word] += f"{rest}\n".encode()
        elif word == "flood":
            expected["out"] += b"x" * int(rest)
        elif word == "cat":
            expected["out"], unread = expected["out"] + unread, b""
    text = "\n".join([*(f"{word} {rest}" for word, rest in lines), f"exit {code}"])

    async def main() -> tuple[bytes, bytes, Exit, float]:
        return (*await run(text, stdin=stdin, timeout=100.0), trio.current_time())

    seconds = sum(float(rest) for word, rest in lines if word == "sleep")
    assert run_virtually(main) == (expected["out"], expected["err"], Exit(code=code), seconds)


async def test_ten_thousand_sandboxes_are_cheap(autojump_clock: MockClock) -> None:
    """10,000 sandboxes, each with a program that runs, take at most 6 KiB each, and end by themselves."""
    provider = ReferenceProvider()
    spec = SandboxSpec(files={"main.py": b"out hello\nsleep 30\nout bye"})
    (offer,) = provider.offers(spec, Facts())
    assert isinstance(offer, Offer)
    gc.collect()
    tracemalloc.start()
    try:
        async with provider.connect() as session:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(10_000):
                wanted = Order(spec=spec, offer=offer, marker=f"m{number}", dispatch_by=math.inf, lifetime=100.0)
                sandbox = await session.create(wanted)
                await sandbox.start(command("python3", "main.py"))
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(provider.vendor.live()) == 10_000
    assert (after - before) / 10_000 <= 6 * 1024
    await trio.sleep(100)
    assert provider.vendor.live() == ()
    assert provider.vendor.owed() == 10_000 * Decimal("0.0011")
