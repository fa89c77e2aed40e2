"""Programs in real sandboxes: what they write, how they end, and what they cannot do."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from sandstorm.provider import Command, Conflict, Exit, NotSupported, ProviderDown


async def test_output_is_exact_and_split(machine: Any) -> None:
    """Every byte arrives, in the stream it was written to."""
    code = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 4096); sys.stderr.write('err')"
    ran = await machine.run("python3", "-c", code, limit=1 << 24)
    assert (ran.stdout, ran.stderr, ran.exit) == (bytes(range(256)) * 4096, b"err", Exit(code=0))


@pytest.mark.parametrize("argv", [("python3", "main"), ("node", "main"), ("bash", "main")])
async def test_languages_run_their_files(machine: Any, argv: tuple[str, ...]) -> None:
    """Python, JavaScript and bash run a file of the spec."""
    if argv[0] not in machine.facts.data["runtimes"]:
        pytest.skip(f"{argv[0]} is not installed below /usr")
    code = {"python3": "print('hello')", "node": "console.log('hello')", "bash": "echo hello"}[argv[0]]
    ran = await machine.run(*argv, files={"main": code.encode(), "deep/er": b"x"}, memory=512)
    assert (ran.stdout, ran.exit) == (b"hello\n", Exit(code=0)), ran


async def test_input_ends(machine: Any) -> None:
    """A program reads its input to the end, however long."""
    ran = await machine.run("wc", "-c", stdin=b"x" * 300_000)
    assert ran.stdout.strip() == b"300000"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", Exit(code=0)),
        ("exit 3", Exit(code=3)),
        ("kill -TERM $$", Exit(kind="signal", signal=15)),
        ("kill -KILL $$", Exit(kind="signal", signal=9)),
    ],
)
async def test_exits_are_named(machine: Any, script: str, expected: Exit) -> None:
    """Exit codes and signals are told."""
    assert (await machine.run("bash", "-c", script)).exit == expected


async def test_a_missing_program_is_an_exit_and_not_an_error(machine: Any) -> None:
    """A program that is not there ends as it does in a shell."""
    assert (await machine.run("no-such-program")).exit == Exit(code=127)
    assert (await machine.run("/usr")).exit == Exit(code=126)


async def test_the_deadline_ends_daemons_too(machine: Any) -> None:
    """At its deadline the whole tree is killed, sessions of its own included."""
    pause = f"86399.{os.getpid()}"  # a command line that no other process on the machine has
    script = f"setsid sleep {pause} & (setsid bash -c 'sleep {pause}' &) ; sleep {pause}"
    with trio.fail_after(5):
        ran = await machine.run("bash", "-c", script, timeout=0.3)
    assert ran.exit.kind == "deadline"
    assert not [line for line in _command_lines() if pause.encode() in line]


def _command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            yield path.read_bytes()


async def test_a_daemon_that_holds_the_output_does_not_hang_the_run(machine: Any) -> None:
    """When the main program ends, so does everything else."""
    with trio.fail_after(5):
        ran = await machine.run("bash", "-c", "setsid sleep 1235 & echo done")
    assert (ran.stdout, ran.exit) == (b"done\n", Exit(code=0))


async def test_output_is_cut_at_its_limit(machine: Any) -> None:
    """A flood ends exactly at the limit and is named."""
    ran = await machine.run("yes", limit=100_000)
    assert (len(ran.stdout), ran.exit.kind) == (100_000, "output-limit")


async def test_out_of_memory_is_named(machine: Any) -> None:
    """A program that takes more memory than it was given is told apart from one that was killed."""
    if machine.facts.data["level"] != "namespaces+cgroup":
        pytest.skip("memory of a whole sandbox is only limited with control groups, and there are none")
    assert (await machine.run("python3", "-c", "x = bytearray(400 << 20)")).exit.kind == "out-of-memory"
    assert (await machine.run("bash", "-c", "kill -9 $$")).exit.kind == "signal"


async def test_the_disk_is_limited(machine: Any) -> None:
    """The work area of a one-shot run ends at its size, in one file or in many."""
    script = "for i in 1 2 3 4; do head -c 10M /dev/zero > f$i || exit 9; done"
    assert (await machine.run("bash", "-c", script, disk=32, memory=256)).exit == Exit(code=9)


async def test_only_the_named_environment_arrives(machine: Any) -> None:
    """The router's environment stays outside, and what the spec names arrives, off every command line."""
    os.environ["SANDSTORM_TEST_SECRET"] = "leaked"
    try:
        ran = await machine.run("env", env={"WANTED": "yes"})
    finally:
        del os.environ["SANDSTORM_TEST_SECRET"]
    lines = set(ran.stdout.decode().split())
    assert "WANTED=yes" in lines
    assert {line.partition("=")[0] for line in lines} == {"WANTED", "PATH", "HOME", "LANG", "PWD"}


async def test_a_preload_in_the_environment_reaches_the_program_only(machine: Any) -> None:
    """A loader variable does not run code in bubblewrap, before it confines anything."""
    ran = await machine.run("bash", "-c", "echo in", env={"LD_PRELOAD": "/work/evil.so"})
    assert (ran.stdout, ran.stderr.count(b"evil.so")) == (b"in\n", 1)


async def test_no_file_of_the_host_is_open_inside(machine: Any) -> None:
    """A program inherits its three streams and nothing else."""
    code = "import fcntl\nfor fd in range(1024):\n try: fcntl.fcntl(fd, fcntl.F_GETFD); print(fd)\n except OSError: pass"
    ran = await machine.run("python3", "-I", "-c", code)
    assert ran.stdout == b"0\n1\n2\n"


async def test_the_host_is_out_of_sight(machine: Any) -> None:
    """Homes, the host's /etc and its processes are not there."""
    script = "ls /root /home /var /run /etc/shadow 2>/dev/null; ls /proc | grep -c '^[0-9]'; wc -l < /etc/passwd; touch /usr/x"
    ran = await machine.run("bash", "-c", script)
    numbers = ran.stdout.split()
    assert len(numbers) == 2
    assert int(numbers[0]) <= 4
    assert (int(numbers[1]), ran.exit.code) == (2, 1)


async def test_the_network_is_off(machine: Any) -> None:
    """A listener on the host's loopback cannot be reached, and virtual machine sockets cannot be opened."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 2)"
        ran = await machine.run("python3", "-c", code)
    assert b"ConnectionRefusedError" in ran.stderr
    ran = await machine.run("python3", "-c", "import socket; socket.socket(socket.AF_VSOCK)")
    assert b"Address family not supported" in ran.stderr


async def test_dangerous_system_calls_are_refused(machine: Any) -> None:
    """Namespaces, io_uring, keys, tracing and BPF answer EPERM, and clone3 does not exist."""
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for number in (425, 250, 101, 321, 323, 272, 165, 435):\n"
        "    ctypes.set_errno(0); libc.syscall(number, 0, 0, 0, 0); print(ctypes.get_errno(), end=' ')\n"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    assert (await machine.run("python3", "-c", code)).stdout.split() == [b"1"] * 7 + [b"38"]


async def test_a_fork_bomb_stays_inside(machine: Any) -> None:
    """A fork bomb ends with its deadline, and the next run is not hurt."""
    with trio.fail_after(20):
        ran = await machine.run("bash", "-c", "f() { f | f & }; f; sleep 60", timeout=0.5)
    assert ran.exit.kind in ("deadline", "out-of-memory")
    assert (await machine.run("echo", "ok")).stdout == b"ok\n"


async def test_cancellation_leaves_nothing(machine: Any) -> None:
    """A cancelled run leaves no process and no record; the fixture looks for the rest."""
    started = trio.Event()

    async def run() -> None:
        sandbox, process = await machine.session.launch(machine.order(), Command(argv=("sleep", "1236"), timeout=60))
        try:
            async with process.events() as events:
                started.set()
                async for _ in events:
                    pass
        finally:
            await sandbox.destroy()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await started.wait()
        nursery.cancel_scope.cancel()
    assert machine.processes() == []
    assert list((machine.state / "boxes").iterdir()) == []


async def test_a_program_that_nobody_waits_for_ends_with_the_session(machine: Any) -> None:
    """A run that was never destroyed is killed when the session closes; the fixture looks."""
    await machine.session.launch(machine.order(), Command(argv=("sleep", "1237"), timeout=60))
    await trio.lowlevel.checkpoint()


async def test_kill_is_told(machine: Any) -> None:
    """A killed program has an exit."""
    sandbox, process = await machine.session.launch(machine.order(), Command(argv=("sleep", "60"), timeout=60))
    await process.kill()
    async with process.events() as events:
        assert [event async for event in events] == [Exit(kind="signal", signal=9)]
    await sandbox.destroy()
    await sandbox.destroy()


async def test_a_marker_is_used_once(machine: Any) -> None:
    """The same marker twice is a conflict, and a late dispatch is not sent."""
    order = machine.order()
    sandbox, _ = await machine.session.launch(order, Command(argv=("sleep", "60"), timeout=60))
    with pytest.raises(Conflict):
        await machine.session.launch(order, Command(argv=("true",), timeout=60))
    with pytest.raises(NotSupported):
        await sandbox.start(Command(argv=("true",), timeout=1))
    await sandbox.destroy()


async def test_a_late_order_is_not_sent(machine: Any) -> None:
    """Nothing is made once the time to send it has passed."""
    import attrs

    with pytest.raises(ProviderDown):
        await machine.session.create(attrs.evolve(machine.order(), dispatch_by=trio.current_time()))
