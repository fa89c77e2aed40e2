"""The levels beside bubblewrap: what each one promises, by probes that succeed without it, and that nothing is left."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from sandstorm import AsyncSandstorm, NoCandidate
from sandstorm.provider import Command, Declined, Environment, Exit, NotSupported, Offer, Order, Output, SandboxSpec
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._cgroup import Limits, find_hierarchy
from sandstorm_provider_local._confinement import Job
from sandstorm_provider_local._gvisor import OVERHEAD, PLATFORMS, Gvisor
from sandstorm_provider_local._ladder import Site, find_gvisor, find_weaker
from sandstorm_provider_local._landlock import NEEDED_ABI, Landlock, landlock_abi
from sandstorm_provider_local._notice import notice
from sandstorm_provider_local._pool import CgroupPool
from sandstorm_provider_local._process import Bounds, LocalProcess
from sandstorm_provider_local._runtimes import find_runtimes, make_etc
from sandstorm_provider_local._seccomp import seccomp_filter
from sandstorm_provider_local._selftest import verify
from sandstorm_provider_local._unconfined import Unconfined

_UID = 64999 if os.geteuid() == 0 else None
LANDLOCK = pytest.mark.skipif(landlock_abi() < NEEDED_ABI, reason="this kernel has no Landlock with rules for TCP (Linux 6.7)")


def runsc_works() -> bool:
    """Whether runsc, left to itself, makes a sandbox: in a container whose /proc is masked it does not."""
    command = ("/usr/bin/runsc", "--rootless", "--network=none", "--ignore-cgroups")
    ways = [[*command, f"--platform={platform}", "do", "true"] for platform in PLATFORMS]
    user = {"user": _UID, "group": _UID, "extra_groups": ()} if _UID else {}
    return any(subprocess.run(way, capture_output=True, timeout=20, check=False, cwd="/", **user).returncode == 0 for way in ways)


GVISOR = pytest.mark.skipif(
    not (Path("/usr/bin/runsc").exists() and runsc_works()), reason="runsc is not installed, or makes no sandbox here"
)
EVERY = [pytest.param("process", marks=LANDLOCK), "none", pytest.param("gvisor", marks=GVISOR)]
CONFINED = [pytest.param("process", marks=LANDLOCK), pytest.param("gvisor", marks=GVISOR)]
PLAIN = [pytest.param("process", marks=LANDLOCK), "none"]


@attrs.frozen(kw_only=True)
class Ran:
    """What came of a program."""

    stdout: str
    stderr: str
    exit: Exit


@attrs.frozen
class Rungs:
    """The levels, with a directory of their own below which everything is theirs."""

    site: Site

    def level(self, name: str) -> Landlock | Unconfined | Gvisor:
        """One of them, untried."""
        site, path = self.site, self.site.runtimes.path
        if name == "none":
            return Unconfined(scratch=site.directory, path=path)
        if name == "gvisor":
            return Gvisor(runsc="/usr/bin/runsc", version="", platform="ptrace", scratch=site.directory, path=path, etc=site.etc)
        seccomp = seccomp_filter(platform.machine(), namespaces=False)
        assert seccomp is not None
        return Landlock(abi=landlock_abi(), scratch=site.directory, path=path, seccomp=seccomp, etc=site.etc)

    def start(self, name: str, *argv: str, timeout: float = 20.0, limit: int = 1 << 20, **job: Any) -> LocalProcess:
        """A program that runs."""
        spawned = self.level(name).spawn(Job(**{"argv": argv, "disk": 16, "uid": _UID, **job}))
        return LocalProcess(spawned, Bounds(deadline=trio.current_time() + timeout, output_limit=limit), lambda: 0)

    async def run(self, name: str, *argv: str, **job: Any) -> Ran:
        """What came of a program; nothing of it may be left."""
        process = self.start(name, *argv, **job)
        try:
            ran = await _collect(process)
        finally:
            await process.kill()
            process.close()
        assert self.programs() == []
        return ran

    def programs(self) -> list[str]:
        """The directories of programs that were not removed."""
        return [path.name for path in self.site.directory.glob("program-*")]


async def _collect(process: LocalProcess) -> Ran:
    streams = {"stdout": b"", "stderr": b""}
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery, process.events() as events:
            nursery.start_soon(process.watch)
            async for event in events:
                if isinstance(event, Output):
                    streams[event.stream] += event.data
                elif isinstance(event, Exit):
                    return Ran(stdout=streams["stdout"].decode(), stderr=streams["stderr"].decode(), exit=event)
    raise AssertionError("no exit")


@pytest.fixture
def rungs() -> Iterator[Rungs]:
    """The levels in a directory that the programs' user gets through to."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o711)
        runtimes = find_runtimes(as_other_user=_UID is not None)
        yield Rungs(Site(directory=directory, etc=make_etc(directory), runtimes=runtimes, pool=None, uid=_UID))


# --- what runs, and how it ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
async def test_a_program_gets_its_files_its_input_and_its_variables_alone(rungs: Rungs, name: str) -> None:
    """A program starts in its directory with what the job names, and with nothing of the router's environment."""
    code = "import os, sys; print(sys.stdin.read(), open('file').read(), sorted(set(os.environ) - {'TMPDIR', 'LC_CTYPE', 'PWD', 'OLDPWD', '_', 'SHLVL'}))"
    os.environ["SANDSTORM_TEST_SECRET"] = "x"
    try:
        ran = await rungs.run(
            name, "python3", "-c", code, cwd="deep", files={"deep/file": b"content"}, stdin=b"input", env={"A": "1"}
        )
    finally:
        del os.environ["SANDSTORM_TEST_SECRET"]
    assert (ran.stdout, ran.exit) == ("input content ['A', 'HOME', 'LANG', 'PATH']\n", Exit(code=0)), ran


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("sh", "-c", "exit 3"), Exit(code=3)),
        (("sh", "-c", "kill -TERM $$"), Exit(kind="signal", signal=15)),
        (("no-such-program",), Exit(code=127)),
        (("/usr",), Exit(code=126)),
    ],
)
async def test_exits_are_named(rungs: Rungs, name: str, argv: tuple[str, ...], expected: Exit) -> None:
    """Exit codes, signals, and programs that are not there or cannot be executed are told."""
    assert (await rungs.run(name, *argv)).exit == expected


@pytest.mark.parametrize("name", PLAIN)
async def test_a_shim_tells_a_signal_from_a_code(rungs: Rungs, name: str) -> None:
    """A program that exits with 137 was not killed."""
    assert (await rungs.run(name, "sh", "-c", "exit 137")).exit == Exit(code=137)
    assert (await rungs.run(name, "sh", "-c", "kill -KILL $$")).exit == Exit(kind="signal", signal=9)


@pytest.mark.parametrize("name", EVERY)
async def test_deadline_and_output_limit_end_a_program(rungs: Rungs, name: str) -> None:
    """A program that waits ends at its deadline, and one that floods at its limit, with exactly that much output."""
    assert (await rungs.run(name, "sleep", "60", timeout=1.0)).exit.kind == "deadline"
    ran = await rungs.run(name, "yes", limit=10_000)
    assert (ran.exit.kind, len(ran.stdout)) == ("output-limit", 10_000)


@pytest.mark.parametrize("name", EVERY)
async def test_a_work_area_of_its_own_stays(rungs: Rungs, name: str) -> None:
    """Files that a program leaves in the directory of a box are there for the next, unlike those of one-shot programs."""
    work = rungs.site.directory / "work"
    work.mkdir(mode=0o700)
    if _UID is not None:
        os.chown(work, _UID, _UID)
    assert (await rungs.run(name, "sh", "-c", "echo kept > file", work=str(work))).exit == Exit(code=0)
    assert (await rungs.run(name, "cat", "file", work=str(work))).stdout == "kept\n"


# --- the whole tree ends ----------------------------------------------------------------------------------

_DAEMONS = "setsid sleep 321 & setsid setsid sleep 321 & (trap '' TERM HUP; sleep 321) & "


def _alive(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if marker.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.parametrize("name", EVERY)
async def test_daemons_end_with_the_program(rungs: Rungs, name: str) -> None:
    """What a program left in the background, in sessions of its own and with its pipes, is gone when its exit is told."""
    marker = f"sandstorm-ladder-{os.getpid()}"
    with trio.fail_after(20):
        ran = await rungs.run(name, "sh", "-c", _DAEMONS + "echo done", env={"MARKER": marker})
    assert (ran.stdout, _alive(marker)) == ("done\n", [])


@pytest.mark.parametrize("name", EVERY)
async def test_kill_takes_the_whole_tree(rungs: Rungs, name: str) -> None:
    """After a kill no process of the program is left, and nothing of its directory."""
    marker = f"sandstorm-ladder-{os.getpid()}"
    process = rungs.start(name, "sh", "-c", _DAEMONS + "echo up; wait", env={"MARKER": marker})
    try:
        async with process.events() as events:
            assert isinstance(await anext(events), Output)
        assert _alive(marker) or name == "gvisor"
    finally:
        await process.kill()
        process.close()
    assert (_alive(marker), rungs.programs()) == ([], [])


_ROUTER = """
    import os, sys, time
    from pathlib import Path
    from sandstorm_provider_local._confinement import Job
    from sandstorm_provider_local._unconfined import Unconfined
    level = Unconfined(scratch=Path(sys.argv[1]), path="/usr/bin:/bin")
    spawned = level.spawn(Job(argv=("sh", "-c", sys.argv[2] + "echo up; wait"), disk=16, uid=eval(sys.argv[3]), env={"MARKER": sys.argv[4]}))
    while True:
        time.sleep(0.01)
        try:
            os.read(spawned.stdout, 10)
            break
        except BlockingIOError:
            continue
    print("up", flush=True)
    time.sleep(60)
"""


async def test_nothing_survives_its_router(rungs: Rungs) -> None:
    """Once a router is killed with SIGKILL, its programs, their daemons, their shim and their files go."""
    marker = f"sandstorm-orphan-{os.getpid()}"
    argv = [sys.executable, "-c", textwrap.dedent(_ROUTER), str(rungs.site.directory), _DAEMONS, repr(_UID), marker]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as router:  # noqa: ASYNC220 - it is killed before the block ends
        assert router.stdout is not None
        assert await trio.to_thread.run_sync(router.stdout.readline) == b"up\n"
        assert _alive(marker)
        router.kill()
    with trio.fail_after(10):
        while _alive(marker) or rungs.programs():  # noqa: ASYNC110 - nothing tells of the end of others
            await trio.sleep(0.01)


# --- what a level keeps a program from --------------------------------------------------------------------

_READS = "import sys\ntry: print(open(sys.argv[1]).read())\nexcept OSError: print('closed')"
_WRITES = "import sys\ntry: open(sys.argv[1], 'a').close(); print('opened')\nexcept OSError: print('closed')"


@pytest.mark.parametrize("name", CONFINED)
async def test_files_of_the_host_are_closed(rungs: Rungs, name: str) -> None:
    """A secret that everybody on the host may read and write can be neither; without isolation it can."""
    secret = rungs.site.directory / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    for code, without in ((_READS, "secret\n"), (_WRITES, "opened\n")):
        assert (await rungs.run("none", "python3", "-c", code, str(secret))).stdout == without
        assert (await rungs.run(name, "python3", "-c", code, str(secret))).stdout == "closed\n"


@pytest.mark.parametrize("name", CONFINED)
async def test_programs_do_not_see_into_each_other(rungs: Rungs, name: str) -> None:
    """A program cannot read the files of another one of the same user that runs at the same time."""
    other = rungs.start(name, "sh", "-c", "echo mine > file; pwd; sleep 60")
    try:
        async with other.events() as events:
            await anext(events)
        (file,) = rungs.site.directory.glob("program-*/work/file")
        code = _READS.replace("sys.argv[1]", repr(str(file)))
        process = rungs.start(name, "python3", "-c", code)
        assert (await _collect(process)).stdout == "closed\n"
        process.close()
    finally:
        await other.kill()
        other.close()


_CONNECTS = """
import os, socket, sys
def reached(family, kind, address):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(5)
            s.connect(address)
            return True
    except OSError:
        return False
def slipped():
    # One of a pair of datagram sockets can be pointed at another socket.
    try:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.sendto(b"x", sys.argv[2] + "/datagram")
        return True
    except OSError:
        return False
os.chdir("/")
print(reached(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", int(sys.argv[1]))), reached(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 9)),
      reached(socket.AF_UNIX, socket.SOCK_STREAM, sys.argv[2] + "/stream"), reached(socket.AF_UNIX, socket.SOCK_STREAM, "\\0" + sys.argv[3]), slipped())
"""


@pytest.mark.parametrize("name", CONFINED)
async def test_the_network_and_the_sockets_of_the_host_are_off(rungs: Rungs, name: str) -> None:
    """TCP, Unix sockets by path and by name, and datagrams out of a pair reach nothing; without isolation they do."""
    abstract = f"sandstorm-ladder-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_UNIX) as named,
    ):
        for unix, address in ((stream, "stream"), (datagram, "datagram")):
            unix.bind(str(rungs.site.directory / address))
            (rungs.site.directory / address).chmod(0o666)
        named.bind("\0" + abstract)
        for listener in (stream, named):
            listener.listen()
        argv = ("python3", "-c", _CONNECTS, str(tcp.getsockname()[1]), str(rungs.site.directory), abstract)
        assert (await rungs.run("none", *argv)).stdout.split() == ["True"] * 5
        reached = (await rungs.run(name, *argv)).stdout.split()
    # An UDP socket without a network has nowhere to go: with gVisor its loopback is its own.
    assert [reached[0], *reached[2:]] == ["False"] * 4
    assert reached[1] == "False" or name == "gvisor"


@pytest.mark.parametrize("name", CONFINED)
async def test_processes_of_the_host_cannot_be_signalled(rungs: Rungs, name: str) -> None:
    """A process of the same user outside of the sandbox does not get a signal that it gets without isolation."""
    if name == "process" and landlock_abi() < 6:
        pytest.skip("this kernel's Landlock has no scope for signals (Linux 6.12)")
    code = "import os, sys\ntry: os.kill(int(sys.argv[1]), 0); print('reached')\nexcept OSError: print('refused')"
    victim = rungs.start("none", "sleep", "60")
    try:
        while victim.child_pid is None:
            await trio.sleep(0.005)
            victim._find_init()
        for level, expected in (("none", "reached\n"), (name, "refused\n")):
            process = rungs.start(level, "python3", "-c", code, str(victim.child_pid))
            assert (await _collect(process)).stdout == expected
            process.close()
    finally:
        await victim.kill()
        victim.close()


@LANDLOCK
async def test_ipc_of_the_host_is_off(rungs: Rungs) -> None:
    """A process without namespaces gets no System V shared memory, which without the filter it gets."""
    code = "import ctypes; c = ctypes.CDLL(None); i = c.shmget(0, 4096, 0o1600); print(i >= 0); i < 0 or c.shmctl(i, 0, None)"
    assert (await rungs.run("none", "python3", "-c", code)).stdout == "True\n"
    assert (await rungs.run("process", "python3", "-c", code)).stdout == "False\n"


@pytest.mark.parametrize("name", PLAIN)
async def test_a_program_without_a_group_is_limited_for_each_process(rungs: Rungs, name: str) -> None:
    """Without a control group a process gets no more memory than its limit, and no file larger than the disk."""
    ran = await rungs.run(name, "python3", "-c", "bytearray(200 << 20)", memory=100)
    assert "MemoryError" in ran.stderr
    ran = await rungs.run(name, "sh", "-c", "head -c 20000000 /dev/zero > big; ls -l big | cut -d' ' -f5")
    assert ran.stdout.strip() == str(16 << 20)


@pytest.mark.parametrize("name", EVERY)
async def test_a_group_limits_all_of_it(rungs: Rungs, name: str) -> None:
    """In a control group a program is killed beyond its memory, and the whole of it is in the group."""
    hierarchy = find_hierarchy()
    if hierarchy is None:
        pytest.skip("no control groups can be made here")
    pool = CgroupPool(hierarchy)
    group = pool.take(Limits(96 + OVERHEAD, 1.0))
    try:
        level = rungs.level(name)
        job = Job(argv=("python3", "-c", "bytearray(300 << 20)"), disk=16, uid=_UID, join_fds=group.join_fds)
        bounds = Bounds(deadline=trio.current_time() + 20, output_limit=1 << 16)
        process = LocalProcess(level.spawn(job), bounds, lambda: group.oom_kills)
        ran = await _collect(process)
        process.close()
        assert (ran.exit.kind, group.empty) == ("out-of-memory", True)
    finally:
        pool.give_back(group)
        pool.close()


# --- what is reported is what was verified ----------------------------------------------------------------

_LACKING = {
    "process": {"files hidden", "host processes hidden", "system read-only"},
    "none": {"files hidden", "host files closed", "network off", "host processes hidden", "system calls filtered"},
    "gvisor": set[str](),
}


@pytest.mark.parametrize("name", EVERY)
async def test_each_level_verifies_and_says_what_it_does_not_enforce(rungs: Rungs, name: str) -> None:
    """The self-test finds the level to hold, and names what it lacks by design."""
    verdict = await verify(rungs.level(name), rungs.site.runtimes.programs["python3"], None, _UID, rungs.site.directory)
    assert verdict.level == name, verdict
    assert _LACKING[name] <= set(verdict.failed)
    assert {"environment cleared", "ends with all it started"} <= set(verdict.verified)
    assert "memory, processes and CPU limited" in verdict.failed


@LANDLOCK
async def test_a_level_that_leaks_is_no_level(rungs: Rungs) -> None:
    """Without its filter, `process` does not verify: sockets of the host can be reached."""
    allow_all = bytes([6, 0, 0, 0, 0, 0, 255, 127])
    level = rungs.level("process")
    assert isinstance(level, Landlock)
    leaky = attrs.evolve(level, seccomp=allow_all)
    verdict = await verify(leaky, rungs.site.runtimes.programs["python3"], None, _UID, rungs.site.directory)
    assert verdict.level is None
    assert {"network off", "system calls filtered"} <= set(verdict.failed)


@LANDLOCK
async def test_the_stronger_of_the_weaker_levels_is_found(rungs: Rungs) -> None:
    """Where bubblewrap cannot be had, `process` comes before `none`."""
    rung = await find_weaker(rungs.site)
    assert (rung.verdict.level, type(rung.level)) == ("process", Landlock)


@GVISOR
async def test_gvisor_is_found_on_a_platform_that_works(rungs: Rungs) -> None:
    """The platform that this runsc lacks is passed over."""
    rung = await find_gvisor(rungs.site, None)
    assert rung.verdict.level == "gvisor", rung.verdict
    assert rung.level is not None
    assert rung.level.platform in ("systrap", "ptrace")


async def test_no_runsc_is_a_reason(rungs: Rungs) -> None:
    """Without runsc there is no level and a remedy."""
    rung = await find_gvisor(rungs.site, "/nonexistent/runsc")
    assert rung.level is None
    assert "install gVisor" in rung.verdict.failed[0]


def test_a_shared_kernel_is_told_once() -> None:
    """One line on stderr says what the sandbox is not: once in a process, loudly for weak levels, never for gVisor."""
    told = "from sandstorm_provider_local._notice import tell_once\ntell_once('namespaces-noproc', ['total memory'])\n"
    said = subprocess.run([sys.executable, "-c", 2 * told], capture_output=True, text=True, check=True).stderr
    assert said.count("WARNING: weak isolation (namespaces-noproc): SHARED HOST KERNEL") == 1
    assert "NO ISOLATION" in str(notice("none", []))
    assert str(notice("namespaces", [])).startswith("sandstorm: local: isolation namespaces: shared host kernel")
    assert notice("gvisor", []) is None


# --- offers -----------------------------------------------------------------------------------------------


@LANDLOCK
async def test_without_namespaces_only_who_names_less_gets_it(rungs: Rungs) -> None:
    """Without bubblewrap the default floor is declined with the fix, and `process` runs programs and boxes for who names it."""
    provider = LocalProvider(state_dir=str(rungs.site.directory / "state"), bwrap="/nonexistent/bwrap", warn=False)
    async with provider.connect() as session:
        facts = await session.refresh()
        (declined,) = provider.offers(SandboxSpec(), facts)
        assert isinstance(declined, Declined)
        assert declined.rule == "isolation-floor"
        assert "apt install bubblewrap" in declined.reason
        assert 'isolation="process"' in declined.reason
        for floor in ("process", "none"):
            (offer,) = provider.offers(SandboxSpec(isolation=floor), facts)
            assert isinstance(offer, Offer)
            assert offer.isolation == "process"
            assert "NOT enforced: files hidden" in offer.isolation_detail
            await _try_out(session, offer)


@LANDLOCK
async def test_what_a_weaker_level_does_not_declare_is_refused(rungs: Rungs) -> None:
    """At the level `process` each ability without support is refused at once, and what needs it has no candidate."""
    local = {"state_dir": str(rungs.site.directory / "state"), "bwrap": "/nonexistent/bwrap", "warn": False}
    spec = SandboxSpec(isolation="process")
    async with AsyncSandstorm(settings={"store": "sqlite://", "plugins": {"local": local}}) as client:
        async with client.sandbox(spec) as box:
            assert box.isolation == "process"
            calls = [box.pause, box.resume, box.snapshot, partial(box.url, 80), partial(box.extend, 60.0)]
            calls += [partial(box.run, "1", "python", keep_state=True)]
            for call in calls:
                with pytest.raises(NotSupported, match="have no supervisor"):
                    await call()
            for opening in (box.fork(), box.exec("cat", interactive=True), box.exec("cat", terminal=(80, 24))):
                with pytest.raises(NotSupported, match="have no supervisor"):
                    async with opening:
                        pass
            await box.upload("f", b"content")
            ran = await box.run(argv=["sh", "-c", 'cat f; test "$PWD" = "$HOME"'])
            assert (ran.stdout, ran.exit) == (b"content", Exit(code=0))
        for lacking in ({"ports": (80,)}, {"idle_timeout": 9.0}, {"snapshot": "local/s"}):
            with pytest.raises(NoCandidate):
                await client.run(argv=["true"], spec=attrs.evolve(spec, **lacking))
        with pytest.raises(NoCandidate):
            await client.detach(argv=["true"], spec=spec)
        with pytest.raises(NotSupported):
            await client.prepare(Environment(language="python"), spec=spec)


@LANDLOCK
async def test_commands_that_need_a_supervisor_are_refused(rungs: Rungs) -> None:
    """A box without one does not take an interactive, a terminal's or a detached program for another."""
    provider = LocalProvider(state_dir=str(rungs.site.directory / "state"), bwrap="/nonexistent/bwrap", warn=False)
    async with provider.connect() as session:
        spec = SandboxSpec(isolation="process")
        (offer,) = provider.offers(spec, await session.refresh())
        assert isinstance(offer, Offer)
        order = Order(spec=spec, offer=offer, marker="plain", dispatch_by=trio.current_time() + 60, lifetime=300.0)
        box = await session.create(order)
        for fields in ({"interactive": True}, {"terminal": (80, 24)}, {"detached": True}):
            command = Command(argv=("cat",), timeout=9.0, **fields)
            with pytest.raises(NotSupported):
                await box.start(command)
        await box.destroy()


@GVISOR
async def test_gvisor_is_an_offer_of_its_own_for_who_wants_it(rungs: Rungs) -> None:
    """Only with the setting there is an offer `gvisor`, which satisfies its floor, runs programs and boxes, and no higher floor."""
    state = str(rungs.site.directory / "state")
    async with LocalProvider(state_dir=state, warn=False).connect() as session:
        assert (await session.refresh()).data["gvisor"] is None
    provider = LocalProvider(state_dir=state, gvisor=True, warn=False)
    async with provider.connect() as session:
        facts = await session.refresh()
        declined, offer = provider.offers(SandboxSpec(isolation="gvisor"), facts)
        assert isinstance(declined, Declined)
        assert isinstance(offer, Offer)
        assert (offer.id, offer.isolation) == ("gvisor", "gvisor")
        assert all(isinstance(answer, Declined) for answer in provider.offers(SandboxSpec(isolation="microvm"), facts))
        await _try_out(session, offer)


BELOW_USR = """
import json, sys, trio
from sandstorm.provider import Command, Order, SandboxSpec
from sandstorm_provider_local import LocalProvider

async def main(state):
    provider = LocalProvider(state_dir=state, gvisor=True, warn=False)
    async with provider.connect() as session:
        facts = await session.refresh()
        spec = SandboxSpec(isolation="gvisor")
        offer = provider.offers(spec, facts)[-1]
        order = Order(spec=spec, offer=offer, marker="once", dispatch_by=trio.current_time() + 60, lifetime=300.0)
        sandbox, process = await session.launch(order, Command(argv=("touch", "/usr/src/new"), timeout=20.0))
        async with process.events() as events:
            *_, exit = [event async for event in events]
        await sandbox.destroy()
    print(json.dumps([facts.data["gvisor"]["level"], exit.code]))

trio.run(main, sys.argv[1])
"""


@GVISOR
@pytest.mark.skipif(_UID is None, reason="only root can mount")
def test_gvisor_shows_what_is_mounted_below_usr(rungs: Rungs) -> None:
    """A file system that is mounted below `/usr` does not keep gVisor from starting, and is as read-only as the rest."""
    mount = 'mount -t tmpfs -o mode=1777 tmpfs /usr/src && exec "$@"'
    state = str(rungs.site.directory / "state")
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh", sys.executable, "-c", BELOW_USR, state]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == '["gvisor", 1]\n', ran.stderr


async def _try_out(session: Any, offer: Offer) -> None:
    """A one-shot program and a box with a file."""
    spec = SandboxSpec(isolation=offer.isolation, files={"file": b"content"})
    order = Order(spec=spec, offer=offer, marker="once", dispatch_by=trio.current_time() + 60, lifetime=300.0)
    command = Command(argv=("cat", "file"), timeout=20.0, output_limit=1000)
    sandbox, process = await session.launch(order, command)
    assert (await _collect(process)).stdout == "content"
    await sandbox.destroy()
    box = await session.create(attrs.evolve(order, marker="box"))
    assert (await _collect(await box.start(command))).stdout == "content"
    await box.destroy()
    async with session.find() as found:
        assert [info.id async for info in found] == []
