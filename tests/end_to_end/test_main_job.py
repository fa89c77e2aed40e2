"""The main job on real input: the command line and the clients over the local provider."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from sandstorm import AsyncSandstorm, Sandstorm

ROOT = Path(__file__).parents[2]
SANDSTORM = Path(sys.executable).parent / "sandstorm"
PROGRAM = "import sys; print(sys.stdin.read().upper(), end=''); print('warned', file=sys.stderr); sys.exit(3)"


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """Every test has a journal and a home of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def sandstorm(*arguments, **options):
    return subprocess.run([SANDSTORM, *arguments], capture_output=True, timeout=60, check=False, **options)


def traces(token):
    """What is left on this machine of a program that carries the token in its command line."""
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if token.encode() in line:
                left.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return left


def groups():
    return {str(path) for path in Path("/sys/fs/cgroup").rglob("*sandstorm*") if path.is_dir()}


def mounts():
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def eventually(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_hello_prints_the_program_and_then_where_why_how_long_cost_and_isolation():
    """Standard output is the program's alone; the explanation is on standard error."""
    done = sandstorm("run", str(ROOT / "docs/examples/hello.py"))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"Hello from a sandbox.\n")
    said = done.stderr.decode().lower()
    for word in ("local", "nothing is charged", "namespaces", "shared host kernel", " s"):
        assert word in said, (word, said)


def test_the_exit_status_is_the_programs_own():
    """A program that exits with 7 makes `run` exit with 7."""
    assert sandstorm("run", "-c", "raise SystemExit(7)").returncode == 7


def test_plan_lists_candidates_exclusions_quotes_order_and_reasons():
    """`plan --json` shows what would be tried in which order and why, and which rule excluded what."""
    done = sandstorm("plan", "-c", "print(1)", "--json")
    plan = json.loads(done.stdout)
    (ranked,) = plan["candidates"]
    assert ranked["candidate"]["offer"]["provider"] == "local"
    assert ranked["candidate"]["quote"]["expected"] == "0"
    assert ranked["reason"]
    refused = json.loads(sandstorm("plan", "-c", "print(1)", "--isolation", "microvm", "--json").stdout)
    assert refused["candidates"] == []
    assert [rule["by"]["rule"] for rule in refused["exclusions"]] == ["isolation-floor"]


def test_the_same_program_gives_the_same_result_from_blocking_code_trio_and_asyncio():
    """Three ways to call, one result."""

    def blocking():
        with Sandstorm() as client:
            return client.run(PROGRAM, "python", stdin=b"hello\n")

    async def awaited():
        async with AsyncSandstorm() as client:
            return await client.run(PROGRAM, "python", stdin=b"hello\n")

    results = [blocking(), trio.run(awaited), asyncio.run(awaited())]
    seen = [(r.stdout, r.stderr, r.exit, r.provider, r.isolation, r.cost, r.outcome, r.plan.reasons) for r in results]
    assert seen[0][:2] == (b"HELLO\n", b"warned\n")
    assert seen[0][2].code == 3
    assert seen[1:] == [seen[0], seen[0]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_router_that_is_stopped_leaves_no_process_mount_or_cgroup(number, tmp_path):
    """Ctrl-C, a polite and an impolite kill of the router end the program and everything that it started."""
    token = f"token{os.getpid()}x{number}"
    before_mounts, before_groups = mounts(), groups()
    code = (
        "import subprocess, sys, time; print('up', flush=True);"
        f"subprocess.Popen(['sleep', '60'], start_new_session=True); sys.argv.append('{token}'); time.sleep(60)"
    )
    router = subprocess.Popen([SANDSTORM, "run", "-c", code, "--", token], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert router.stdout.readline() == b"up\n"
    assert len(traces(token)) > 1
    router.send_signal(number)
    router.communicate(timeout=20)
    assert eventually(lambda: not traces(token)), traces(token)
    assert mounts() == before_mounts
    if number == signal.SIGKILL:
        sandstorm("run", "-c", "pass")  # what a killed router cannot remove, the next one does
    assert eventually(lambda: groups() <= before_groups), groups() - before_groups


def test_cancelling_under_trio_and_asyncio_leaves_nothing():
    """A cancelled run ends its program before the client is closed."""
    before = groups()

    async def cancelled_by_trio():
        async with AsyncSandstorm() as client:
            with trio.move_on_after(0.5):
                await client.run(argv=["sleep", "61.5"])
            assert eventually(lambda: not [t for t in traces("61.5") if "bwrap" not in t])

    async def cancelled_by_asyncio():
        async with AsyncSandstorm() as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.run(argv=["sleep", "61.5"]), 0.5)

    trio.run(cancelled_by_trio)
    asyncio.run(cancelled_by_asyncio())
    assert eventually(lambda: not traces("61.5")), traces("61.5")
    assert groups() <= before


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("option", "field"),
    [(("--max-cost", "cheap"), "max_cost"), (("--strategy", "best"), "strategy"), (("--language", "cobol"), "language")],
)
def test_bad_input_is_one_line_with_its_own_exit_code_and_creates_nothing(command, option, field, tmp_path):
    """A wrong option names the field and what was expected, exits with 120, and leaves not even an empty journal."""
    done = sandstorm(command, "-c", "print(1)", *option)
    assert done.returncode == 120
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert f"{field}: expected" in line
    assert not (tmp_path / "state").exists()
