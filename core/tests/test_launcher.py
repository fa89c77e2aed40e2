"""The launcher's script with real processes of this machine, under every shell that is here."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launcher_access import LocalExec, conforms

from sandstorm._launcher import LaunchedProcess, Launcher
from sandstorm._launcher._payload import digest, payload
from sandstorm.provider import (
    Ambiguous,
    CapacityError,
    Command,
    Conflict,
    Exit,
    InvalidInput,
    NotSupported,
    Output,
    SandboxLost,
    StreamLost,
)

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


@attrs.frozen
class Bench:
    """A work area with a launcher; `root` is where it keeps its states."""

    home: Path
    shell: Path

    @property
    def root(self) -> Path:
        return self.home / f"launcher-{os.getuid()}"

    @property
    def applets(self) -> bool:
        return "busybox" in str(self.shell.readlink())

    def launcher(self, **access: object) -> Launcher:
        return Launcher(conforms(LocalExec(self.shell, **access)), root=str(self.home / "launcher"), workdir=str(self.home))

    def pids(self) -> list[int]:
        """Every live process that has this work area in its command line, working directory or environment."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                known = (
                    (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes() + os.fsencode((entry / "cwd").readlink())
                )
            except OSError:
                continue
            if os.fsencode(self.home) in known and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def command_lines(self) -> dict[int, bytes]:
        """The argument lists of those processes."""
        lines = {}
        for pid in self.pids():
            try:
                lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
        return lines

    def supervisor(self, start_id: str) -> int:
        return int((self.root / start_id / "gate" / "owner").read_text().split()[0])


def made(home: Path, shell: str) -> Bench:
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "sh").symlink_to(str(shutil.which(shell)))
    return Bench(home, home / "bin" / "sh")


@pytest.fixture(params=SHELLS)
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A work area for each shell, in which nothing is left running."""
    yield from _cleaned(made(tmp_path / "w", request.param))


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Bench]:
    """A work area for the first shell alone, where the shell does not matter."""
    yield from _cleaned(made(tmp_path / "w", SHELLS[0]))


def _cleaned(bench: Bench) -> Iterator[Bench]:
    yield bench
    sweep(bench)


def sweep(bench: Bench) -> None:
    """Ends what a test has left in its own work area."""
    for pid in bench.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def finish(process: LaunchedProcess) -> tuple[bytes, bytes, Exit]:
    """Both streams and the exit; offsets must join up."""
    streams = {"stdout": b"", "stderr": b""}
    with trio.fail_after(20):
        async with process.events() as events:
            async for event in events:
                if isinstance(event, Exit):
                    return streams["stdout"], streams["stderr"], event
                assert isinstance(event, Output)
                assert event.offset == len(streams[event.stream])
                streams[event.stream] += event.data
    raise AssertionError("no exit")


async def until(path: Path) -> None:
    with trio.fail_after(10):
        while not await trio.Path(path).exists():  # noqa: ASYNC110 - another process makes it
            await trio.sleep(0.01)


def sh(script: str, **more: object) -> Command:
    return Command(**{"argv": ("sh", "-c", script), "timeout": 20.0, **more})


async def test_streams_are_split_and_exact(bench: Bench) -> None:
    """Any bytes come back as they were, also where a program reopens its own stderr, and the exit code with them."""
    data = bytes(range(256)) * 40
    command = sh("cat; echo one >/dev/stderr; echo two >/dev/stderr; exit 7", stdin=data)
    assert await finish(await bench.launcher().start(command)) == (data, b"one\ntwo\n", Exit(code=7))


async def test_arguments_variables_and_directories_are_exact(bench: Bench) -> None:
    """Quotes, newlines, bytes that are no text, names that the script uses itself: all arrive, and the umask is as it was.

    INT is not ignored either, except where busybox's own `env` cannot undo what its shell does to background programs.
    """
    (bench.home / "a b").mkdir()
    script = "import os,sys,signal;print([os.fsencode(a) for a in sys.argv[1:]],os.environ['dir'],os.environ['IFS'],os.getcwd());"
    script += "print(oct(os.umask(0)),signal.getsignal(2) is signal.default_int_handler,os.environ['SANDSTORM_START'])"
    words = ("it's", "a\nb", "\udcff\\n", "", "$(id)")
    command = Command(
        argv=(sys.executable, "-c", script, *words),
        env={"dir": "/nowhere", "IFS": "x", "id": "1"},
        cwd="a b",
        timeout=20,
        start_id="s",
    )
    stdout, stderr, ended = await finish(await bench.launcher().start(command))
    mask = os.umask(0o22)
    os.umask(mask)
    expected = f"{[os.fsencode(word) for word in words]} /nowhere x {bench.home / 'a b'}\n{oct(mask)} {not bench.applets} s\n"
    assert (stdout.decode(), stderr, ended) == (expected, b"", Exit(code=0))


@pytest.mark.parametrize(
    ("script", "more", "expected"),
    [
        ("kill -TERM $$", {}, Exit(kind="signal", signal=15)),
        ("sleep 60 & sleep 60", {"timeout": 0.4}, Exit(kind="deadline")),
        ("exec no-such-program", {}, Exit(code=127)),
    ],
)
async def test_every_end_has_its_name(bench: Bench, script: str, more: dict[str, object], expected: Exit) -> None:
    """A signal, a deadline and a program that is not there are told apart, and a deadline leaves nothing running."""
    assert (await finish(await bench.launcher().start(sh(script, **more))))[2] == expected
    await trio.sleep(0.3)
    assert bench.pids() == []


@pytest.mark.parametrize("script", ["yes", "yes 1>&2", "head -c 60001 /dev/zero"])
async def test_the_output_limit_holds(bench: Bench, script: str) -> None:
    """The limit ends the tree, also by one byte; not a byte more is delivered, nor much more kept on the disk."""
    process = await bench.launcher().start(sh(script, output_limit=60_000, start_id="big"))
    stdout, stderr, ended = await finish(process)
    assert (len(stdout + stderr), ended) == (60_000, Exit(kind="output-limit"))
    assert sum((bench.root / "big" / stream).stat().st_size for stream in ("stdout", "stderr")) <= 2 * 60_512


async def test_output_as_large_as_the_limit_is_no_offence(one: Bench) -> None:
    """A program may write exactly what it is allowed, and large output travels in many bounded pieces."""
    stdout, _, ended = await finish(await one.launcher().start(sh("head -c 3000000 /dev/zero", output_limit=3_000_000)))
    assert (len(stdout), ended) == (3_000_000, Exit(code=0))


async def test_output_resumes_at_an_offset(bench: Bench) -> None:
    """Another launcher takes the program up by its id, at any offset of each stream, while it runs and after."""
    started = await bench.launcher().start(sh("printf 0123456789; printf abcdef >&2; sleep 0.3; printf X", start_id="r"))
    for _ in range(2):
        again = await bench.launcher().process("r", {"stdout": 4, "stderr": 6})
        async with again.events() as events:
            seen = [event async for event in events]
        assert b"".join(event.data for event in seen if isinstance(event, Output)) == b"456789X"
        assert seen[-1] == Exit(code=0)
    assert started.id == "r"


async def test_a_daemon_does_not_hold_up_the_end_and_dies_by_kill(bench: Bench) -> None:
    """The program's end is its own; `kill` then finds what left its session, its parent and its streams, but for its environment."""
    script = "setsid sh -c 'echo $$ >daemon.tmp; mv daemon.tmp daemon; exec sleep 300' & while [ ! -e daemon ]; do sleep 0.01; done; echo up"
    process = await bench.launcher().start(sh(script))
    assert await finish(process) == (b"up\n", b"", Exit(code=0))
    daemon = int((bench.home / "daemon").read_text())
    assert daemon in bench.pids()
    await process.kill()
    await trio.sleep(0.05)
    assert daemon not in bench.pids()


async def test_kill_ends_the_whole_tree(bench: Bench) -> None:
    """Children that ignore signals, clear their environment or leave the session die with it, and nobody else does."""
    launcher = bench.launcher()
    other = await launcher.start(sh("sleep 300", start_id="kk"))
    script = "trap '' TERM; env -i sleep 301 & setsid sleep 302 & (sleep 303 & sleep 304 & wait) & touch up; wait; touch survived"
    process = await launcher.start(sh(script, start_id="k"))
    await until(bench.home / "up")
    await process.kill()
    assert (await finish(process))[2] == Exit(kind="signal", signal=9)
    assert (await launcher.state("k")).why == "killed"
    assert (await launcher.state("kk")).state == "started"
    assert not (bench.home / "survived").exists()
    await other.kill()
    await other.kill()
    await trio.sleep(0.3)
    assert bench.pids() == []


async def test_secrets_leave_no_trace(one: Bench) -> None:
    """A value is in the program's environment and nowhere else: no argument list, no file, once the program runs."""
    secret = secrets.token_hex(16)
    process = await one.launcher().start(sh("touch up; sleep 300", env={"TOKEN": secret}, start_id="t"))
    await until(one.home / "up")
    lists = list(one.command_lines().values())
    assert lists
    assert not any(secret.encode() in line for line in lists)
    kept = [path for path in one.root.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in kept)
    assert (one.root.stat().st_mode & 0o777, {path.stat().st_mode & 0o077 for path in kept}) == (0o700, {0})
    await process.kill()


async def test_a_burned_gate_never_starts(bench: Bench) -> None:
    """Once burned, a start is refused for ever, and a start that won first is not burned."""
    launcher = bench.launcher()
    assert (await launcher.burn("b")).state == "burned"
    assert (await launcher.burn("b")).state == "burned"
    with pytest.raises(Conflict, match="burned"):
        await launcher.start(sh("touch ran", start_id="b"))
    with pytest.raises(Conflict):
        await launcher.process("b", {})
    process = await launcher.start(sh("exit 3", start_id="c"))
    assert (await launcher.burn("c")).state in {"started", "done"}
    assert (await finish(process))[2] == Exit(code=3)
    assert (await launcher.burn("c")).state == "done"
    assert not (bench.home / "ran").exists()


async def test_one_id_means_one_program(bench: Bench) -> None:
    """The same start is harmless when repeated, before and after the end; another program or limit under its id is refused."""
    launcher = bench.launcher()
    for _ in range(3):
        assert (await finish(await launcher.start(sh("echo x >>ran", start_id="i"))))[2] == Exit(code=0)
    for other in (sh("echo y >>ran", start_id="i"), sh("echo x >>ran", start_id="i", output_limit=1)):
        with pytest.raises(Conflict, match="something else"):
            await launcher.start(other)
    assert (bench.home / "ran").read_text() == "x\n"
    assert [path.name for path in bench.root.glob("up.*")] == []


async def test_starts_and_burns_race_to_one_winner(bench: Bench) -> None:
    """Of many starts and burns at the same moment one wins: the program ran once, or never and everybody is told so."""
    for number in range(4):
        outcomes: list[str] = []

        async def act(*, burning: bool, name: str = f"race{number}", outcomes: list[str] = outcomes) -> None:
            launcher = bench.launcher()
            if burning:
                outcomes.append((await launcher.burn(name)).state)
                return
            try:
                ended = (await finish(await launcher.start(sh(f"echo x >>{name}", start_id=name))))[2]
                outcomes.append(ended.kind)
            except (Conflict, CapacityError):  # both say that it never starts
                outcomes.append("burned")

        async with trio.open_nursery() as nursery:
            for burning in (False, True, False) if number % 2 else (True, False, False):
                nursery.start_soon(lambda burning=burning: act(burning=burning))
        ran = bench.home / f"race{number}"
        if "burned" in outcomes:
            assert set(outcomes) == {"burned"}
            assert not ran.exists()
        else:
            assert ran.read_text() == "x\n"


async def test_a_late_supervisor_finds_the_gate_taken(bench: Bench) -> None:
    """One that was held up between staging and the lock while the gate was burned starts nothing."""
    launcher = bench.launcher()
    image = await launcher.probe()
    wanted = payload(sh("touch ran"), str(bench.home))
    file = await launcher.place(wanted.data)
    assert (await launcher.burn("late")).state == "burned"
    await trio.Path(file).rename(bench.root / "late" / "payload")
    await trio.run_process([str(bench.shell), image.file, "supervise", "late", "-", str(wanted.head), "20", "1000", "none"])
    assert not (bench.home / "ran").exists()
    assert (await launcher.state("late")).state == "burned"


async def test_a_damaged_payload_is_not_staged(bench: Bench) -> None:
    """A payload that is not what was sent starts nothing and leaves the gate open."""
    launcher = bench.launcher()
    wanted = payload(sh("touch ran"), str(bench.home))
    file = await launcher.place(wanted.data + b"x")
    words = (file, await launcher.hashed(wanted.data), str(wanted.head), "20", "1000", "none")
    assert (await launcher.ask("start", "damaged", *words)).state.state == "unstaged"
    assert (await launcher.state("damaged")).state == "absent"
    assert not (bench.home / "ran").exists()


async def test_a_burn_waits_for_who_may_have_won(one: Bench) -> None:
    """A gate without an owner is undecided while a contender lives, and burned once all are dead."""
    launcher = one.launcher()
    await launcher.probe()
    async with trio.open_nursery() as nursery:
        contender = await nursery.start(partial(trio.run_process, ["sleep", "60"], check=False))
        began = (await trio.Path(f"/proc/{contender.pid}/stat").read_text()).rpartition(") ")[2].split()[19]
        (one.root / "w" / "gate").mkdir(parents=True)
        await trio.Path(one.root / "w" / "sup.1").write_text(f"{contender.pid} {began}\n")
        assert (await launcher.burn("w")).state == "locked"
        contender.kill()
    assert (await launcher.burn("w")).state == "burned"


async def test_output_after_the_end_is_waited_for_a_moment(bench: Bench) -> None:
    """What a child writes just after the program has ended belongs to the output."""
    assert await finish(await bench.launcher().start(sh("(sleep 0.2; echo late) &"))) == (b"late\n", b"", Exit(code=0))


async def test_a_dead_supervisor_is_a_lost_process(bench: Bench) -> None:
    """Without a status the end is unknown: what was written is delivered, then `SandboxLost`; `kill` still ends the tree."""
    process = await bench.launcher().start(sh("echo out; touch up; sleep 300", start_id="l"))
    await until(bench.home / "up")
    os.kill(bench.supervisor("l"), signal.SIGKILL)
    seen = b""
    with pytest.raises(SandboxLost, match="without a status"):
        async with process.events() as events:
            async for event in events:
                assert isinstance(event, Output)
                seen += event.data
    assert seen == b"out\n"
    await process.kill()
    await trio.sleep(0.3)
    assert not any(b"sleep\x00300" in line for line in bench.command_lines().values())
    assert (await bench.launcher().state("l")).state == "lost"


async def test_the_deadline_holds_without_a_supervisor(one: Bench) -> None:
    """A program whose supervisor and router are both gone still ends by its deadline."""
    await one.launcher().start(sh("touch up; sleep 300", start_id="d", timeout=0.8))
    await until(one.home / "up")
    os.kill(one.supervisor("d"), signal.SIGKILL)
    await trio.sleep(1.2)
    assert not any(b"sleep\x00300" in line for line in one.command_lines().values())


async def test_a_torn_status_is_no_status(one: Bench) -> None:
    """A status whose checksum does not fit is never taken for an end."""
    launcher = one.launcher()
    await finish(await launcher.start(sh("exit 4", start_id="torn")))
    status = one.root / "torn" / "status"
    status.write_bytes(status.read_bytes().replace(b"4 exited", b"0 exited"))
    assert (await launcher.state("torn")).state == "lost"


async def test_input_arrives_once_and_in_order(bench: Bench) -> None:
    """Pieces of stdin are written while it runs, by one launcher and then another, through an exec that repeats itself."""
    launcher = bench.launcher(chance=0.3, random=random.Random(1))
    process = await launcher.start(sh("cat", stdin=b"0\n", interactive=True, start_id="in"))
    await process.write(b"1\n")
    again = await bench.launcher().process("in", {})
    await again.write(b"2\n")
    await again.close_stdin()
    assert await finish(again) == (b"0\n1\n2\n", b"", Exit(code=0))


async def test_a_signal_reaches_the_program(one: Bench) -> None:
    """The program alone gets it, and may handle it."""
    process = await one.launcher().start(sh("trap 'echo got; exit 5' INT; touch up; while :; do sleep 0.02; done"))
    await until(one.home / "up")
    await process.signal(signal.SIGINT)
    assert await finish(process) == (b"got\n", b"", Exit(code=5))


async def test_a_poor_image_is_served_or_named(tmp_path: Path) -> None:
    """Without base64, sha256sum and setsid it still is exact; without a tool that it needs it says which one."""
    needed = "cat chmod cut dd grep id ls mkdir mkfifo mv rm sleep tail tr nohup od cksum env"
    home = made(tmp_path / "w", SHELLS[0]).home
    for tool in needed.split():
        (home / "bin" / tool).symlink_to(str(shutil.which(tool)))
    access = LocalExec(home / "bin" / "sh", only=True)
    launcher = Launcher(access, root=str(home / "launcher"), workdir=str(home))
    image = await launcher.probe()
    assert (image.encoding, image.hash, image.session, image.missing) == ("od", "cksum", "shared", "")
    data = bytes(range(256)) * 100
    process = await launcher.start(sh("cat; sleep 300 & sleep 0.1; exit 2", stdin=data))
    assert await finish(process) == (data, b"", Exit(code=2))
    await process.kill()
    (home / "bin" / "mkfifo").unlink()
    with pytest.raises(NotSupported, match="mkfifo"):
        await Launcher(access, root=str(home / "launcher")).start(sh("true"))


async def test_what_cannot_be_passed_on_is_refused(one: Bench) -> None:
    """A terminal, an id that is a path, a name that no shell exports: refused before anything is sent."""
    launcher = one.launcher()
    with pytest.raises(NotSupported):
        await launcher.start(sh("true", terminal=(80, 24)))
    with pytest.raises(InvalidInput):
        await launcher.start(sh("true", start_id="../x"))
    with pytest.raises(InvalidInput):
        await launcher.start(sh("true", env={"a.b": "1"}))
    with pytest.raises(InvalidInput):
        await launcher.start(sh("a\0b"))
    process = await launcher.start(sh("true"))
    with pytest.raises(NotSupported):
        await process.write(b"x")


async def test_no_answer_is_never_an_end(one: Bench) -> None:
    """A start whose answers are all lost may have happened, and a stream that cannot be read any more is lost."""
    launcher = one.launcher()
    process = await launcher.start(sh("sleep 300", start_id="n"))
    launcher._access._chance, launcher._access._random = 1.0, _Always("lost")  # type: ignore[attr-defined]

    async def start() -> None:
        with pytest.raises(Ambiguous):
            await launcher.start(sh("sleep 300", start_id="m"))

    async def follow() -> None:
        with pytest.raises(StreamLost):
            await finish(process)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        nursery.start_soon(follow)
    launcher._access._chance = 0.0  # type: ignore[attr-defined]
    for name in ("n", "m"):
        await (await launcher.process(name, {})).kill()


class _Always(random.Random):
    """Draws one fault every time."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._fault = fault

    def choice(self, seq: object) -> str:
        return self._fault


@settings(max_examples=9, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), size=st.integers(0, 60_000), code=st.integers(0, 100))
def test_a_bad_exec_changes_nothing(tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, code: int) -> None:
    """However an exec loses, cuts, delays, repeats and overlaps, the program runs once and its output is exact."""
    bench = made(tmp_path_factory.mktemp("bad") / "w", SHELLS[seed % len(SHELLS)])
    data = random.Random(seed).randbytes(size)

    async def main() -> None:
        launcher = bench.launcher(chance=0.4, random=random.Random(seed))
        process = await launcher.start(sh(f"echo x >>ran; cat; exit {code}", stdin=data))
        assert await finish(process) == (data, b"", Exit(code=code))

    try:
        trio.run(main)
    finally:
        sweep(bench)
    assert (bench.home / "ran").read_text() == "x\n"


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(delay=st.floats(0.0, 0.05), everything=st.booleans(), shell=st.sampled_from(SHELLS))
def test_death_at_any_moment_has_an_answer(
    tmp_path_factory: pytest.TempPathFactory, delay: float, everything: bool, shell: str
) -> None:
    """Killed anywhere between the exec and the status, a start is burned (and never runs), or known to have begun."""
    bench = made(tmp_path_factory.mktemp("dead") / "w", shell)
    command = sh("echo x >>ran", start_id="z")

    async def main() -> None:
        launcher = bench.launcher()
        image = await launcher.probe()
        wanted = payload(command, str(bench.home))
        file = await launcher.place(wanted.data)
        words = [file, digest(wanted.data, image.hash), str(wanted.head), "20.000", str(command.output_limit), wanted.input]
        async with trio.open_nursery() as nursery:
            arguments = [str(bench.shell), image.file, "start", "z", *words]
            nursery.start_soon(partial(trio.run_process, arguments, check=False, capture_stdout=True))
            await trio.sleep(delay)
            for pid, line in bench.command_lines().items():
                if everything or b"supervise" in line:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        state = await launcher.burn("z")
        reached[state.state] = reached.get(state.state, 0) + 1
        assert state.state in {"burned", "started", "done", "lost"}
        try:
            again = (await finish(await launcher.start(command)))[2]
        except Conflict:
            assert state.state == "burned"
        except SandboxLost:
            assert state.state in {"started", "lost"}
        else:
            assert again == Exit(code=0)
            assert (bench.home / "ran").read_text() == "x\n"
        assert state.state != "burned" or not (bench.home / "ran").exists()
        assert not (bench.home / "ran").exists() or (bench.home / "ran").read_text() == "x\n"

    try:
        trio.run(main)
    finally:
        sweep(bench)


reached: dict[str, int] = {}


def test_the_deaths_struck_at_every_step() -> None:
    """The moments above were early and late enough: some starts were prevented, some were lost, some had ended."""
    assert {"burned", "lost", "done"} <= set(reached), reached
