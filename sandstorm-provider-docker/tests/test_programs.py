"""Programs in containers: exact output, how they end, and what is left of them."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import trio

from sandstorm.provider import Command, Conflict, Exit, InvalidSpec, NotSupported, Output


async def shell(machine: Any, box: Any, script: str, **fields: Any) -> Any:
    """What came of a shell script."""
    return await machine.run(box, "sh", "-c", script, **fields)


async def alive(machine: Any, box: Any) -> int:
    """How many processes named `sleep` user 1000 has in the container."""
    script = "n=0; for p in /proc/[0-9]*; do [ -O $p ] && read -r name <$p/comm && [ $name = sleep ] && n=$((n+1)); done; echo $n"
    ran = await machine.run(box, "bash", "-c", script + " 2>/dev/null")
    return int(ran.stdout)


async def test_output_is_exact(machine: Any) -> None:
    """Both streams arrive byte for byte and apart, with stdin, environment, secrets and directory as asked."""
    box = await machine.box(files={"a/b": b"file"}, env={"A": "x y"}, secrets={"S": "it's\n$HOME\n"})
    data = bytes(range(256)) * 400
    ran = await shell(
        machine, box, 'cat; printf \'%s|%s|%s\' "$A" "$S" "$B" >&2; cat b; exit 7', stdin=data, cwd="a", env={"B": "c"}
    )
    assert ran.stdout == data + b"file"
    assert ran.stderr == b"x y|it's\n$HOME\n|c"
    assert ran.exit == Exit(code=7)


async def test_how_programs_end(machine: Any) -> None:
    """A missing program, a signal and a directory that is not there are told apart."""
    box = await machine.box()
    assert (await machine.run(box, "no-such-program")).exit == Exit(code=127)
    assert (await shell(machine, box, "kill -TERM $$")).exit == Exit(kind="signal", signal=15)
    with pytest.raises(InvalidSpec, match="no directory"):
        await machine.run(box, "true", cwd="nowhere")


async def test_a_program_starts_once(machine: Any) -> None:
    """A start that is sent again with its id does not run the program again."""
    box = await machine.box()
    for expected in (True, False):
        command = Command(argv=("sh", "-c", "echo x >> started"), timeout=9, start_id="run/1")
        if expected:
            await machine.collect(await box.start(command))
        else:
            with pytest.raises(Conflict):
                await box.start(command)
    assert (await machine.run(box, "cat", "started")).stdout == b"x\n"


async def test_a_tree_dies_with_its_program_and_no_other(machine: Any) -> None:
    """Daemons in sessions of their own, with an emptied environment, end with their program; another program goes on."""
    box = await machine.box()
    other = await box.start(Command(argv=("sleep", "50"), timeout=60))
    script = "for i in 1 2 3; do setsid env -i sleep 40 & done; (trap '' TERM HUP; setsid sleep 41 &); echo begun"
    assert (await shell(machine, box, script)).stdout == b"begun\n"
    assert await alive(machine, box) == 1
    late = await shell(machine, box, "setsid env -i sleep 42 & sleep 43", timeout=0.5)
    assert late.exit == Exit(kind="deadline", signal=9)
    assert await alive(machine, box) == 1
    await other.kill()
    assert (await machine.collect(other)).exit == Exit(kind="signal", signal=9)
    assert await alive(machine, box) == 0
    await other.kill()


async def test_a_fork_bomb_ends_at_its_deadline(machine: Any) -> None:
    """Where nothing can be forked any more, the tree is killed all the same, and the box is good for the next program."""
    box = await machine.box()
    bomb = await machine.run(box, "bash", "-c", "b() { b | b & }; b; sleep 30", timeout=1.5)
    assert bomb.exit.kind == "deadline"
    assert (await shell(machine, box, "echo fine")).stdout == b"fine\n"
    zombies = await shell(machine, box, "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z '")
    assert zombies.stdout == b"0\n"


async def test_the_limits_hold(machine: Any) -> None:
    """Output, memory and processes end where they are to end, and the memory that ran out is named."""
    box = await machine.box()
    flood = await machine.run(box, "yes", limit=100_000)
    assert (len(flood.stdout), flood.exit) == (100_000, Exit(kind="output-limit", signal=9))
    hog = await machine.run(box, "perl", "-e", '$x = "x" x 400_000_000; sleep 20')
    assert hog.exit == Exit(kind="out-of-memory", signal=9)
    assert (await shell(machine, box, "kill -KILL $$")).exit == Exit(kind="signal", signal=9)
    full = await shell(machine, box, "head -c 40000000 /dev/zero > big; stat -c %s big")
    assert int(full.stdout) == 32 * 1024 * 1024


async def test_what_a_program_may_do(machine: Any) -> None:
    """It has no capabilities, no network, no way to write outside, and can neither signal nor stop the clock of the container."""
    box = await machine.box()
    status = (await machine.run(box, "cat", "/proc/self/status")).stdout.decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["1000"] * 4
    assert {fields[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert (await shell(machine, box, "grep -c : /proc/net/dev")).stdout == b"1\n"
    touched = "for d in / /usr /etc /run; do touch $d/x 2>/dev/null && echo $d; done; touch /tmp/x /work/x && echo ok"
    assert (await shell(machine, box, touched)).stdout == b"ok\n"
    script = "for p in /proc/[0-9]*; do [ -O $p ] || { kill -STOP ${p#/proc/} 2>/dev/null && echo ${p#/proc/}; }; done; echo end"
    assert (await machine.run(box, "bash", "-c", script)).stdout == b"end\n"


async def test_secrets_are_not_in_the_daemons_records(machine: Any) -> None:
    """The daemon's description of a container does not hold the value of a secret."""
    box = await machine.box(secrets={"TOKEN": "hush-hush"}, env={"OPEN": "seen"})
    assert (await shell(machine, box, "echo $TOKEN")).stdout == b"hush-hush\n"
    told = machine.podman.run("inspect", box.id)
    assert "seen" in told
    assert "hush-hush" not in told


async def test_a_program_is_talked_to(machine: Any) -> None:
    """Stdin stays open until it is closed, and signals reach the program itself."""
    box = await machine.box()
    process = await box.start(Command(argv=("cat",), timeout=20, interactive=True, stdin=b"one "))
    await process.write(b"two ")
    await process.write(b"three")
    await process.close_stdin()
    ran = await machine.collect(process)
    assert (ran.stdout, ran.exit) == (b"one two three", Exit(code=0))
    process = await box.start(
        Command(argv=("sh", "-c", "trap 'echo got; exit 4' USR1; echo up; while :; do sleep 0.05; done"), timeout=20)
    )
    async with process.events() as events:
        assert (await anext(events)).data == b"up\n"
        await process.signal(signal.SIGUSR1)
        rest = [event async for event in events]
    assert rest == [Output("stdout", b"got\n", 3), Exit(code=4)]
    with pytest.raises(NotSupported):
        await process.write(b"late")


async def test_a_terminal_has_a_size(machine: Any) -> None:
    """A program with a terminal sees its size, also after a change, and its input ends by the character that means it."""
    box = await machine.box()
    script = "stty size; read x; stty size; cat; echo end"
    process = await box.start(Command(argv=("sh", "-c", script), timeout=20, terminal=(99, 33)))
    seen = b""
    async with process.events() as events:
        async for event in events:
            if isinstance(event, Exit):
                assert event == Exit(code=0)
                break
            assert event.stream == "stdout"
            if seen == b"":
                await process.resize(70, 20)
                await process.write(b"\n")
            seen += event.data
            if seen.endswith(b"20 70\r\n"):
                await process.close_stdin()
    assert seen.split() == [b"33", b"99", b"20", b"70", b"end"]


async def test_programs_run_at_the_same_time(machine: Any) -> None:
    """Several programs of one box have their own streams and ends."""
    box = await machine.box()
    results = {}

    async def one(number: int) -> None:
        results[number] = await shell(machine, box, f"sleep 0.2; echo {number}; exit {number}")

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, number)
    assert {number: (ran.stdout, ran.exit.code) for number, ran in results.items()} == {
        number: (f"{number}\n".encode(), number) for number in range(5)
    }


async def test_what_was_looked_at_is_what_was_asked(machine: Any) -> None:
    """A container that is less confined than its offer is not handed out, and is removed."""
    options = {"docker": {"HostConfig": {"PidsLimit": 100_000}}}
    with pytest.raises(Exception, match="its processes are not limited"):
        await machine.box(provider_options=options)
    assert json.loads(machine.podman.run("ps", "--all", "--format", "json")) == []
