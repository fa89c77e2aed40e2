"""`sandstorm run` and `sandstorm plan` as separate processes, on the reference provider."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import CommandLine

DENY = """
from sandstorm.policy import Denial, hookimpl

@hookimpl
def sandstorm_admit(request):
    return Denial("no-fridays", "nothing runs on a Friday")
"""

RAISES = """
from sandstorm.policy import hookimpl

@hookimpl
def sandstorm_limits(request):
    raise RuntimeError("out of order")
"""

FAILING = """
from sandstorm.policy import hookimpl
from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider

@hookimpl
def sandstorm_providers():
    return [ChaosProvider(ReferenceProvider("toy"), [Fault(step={step!r}, kind={kind!r}, times=99)])]
"""


def test_output_is_the_programs_alone(sandstorm: CommandLine) -> None:
    """stdout and stderr are passed on exactly, and the explanation follows on stderr in five lines."""
    ran = sandstorm("run", "-c", "out hello\nerr oops")
    assert ran.stdout == b"hello\n"
    first, *rest = ran.stderr.decode().splitlines()
    assert first == "oops"
    assert [line.split()[0] for line in rest] == ["ran", "because", "took", "cost", "isolation"]
    assert "toy" in rest[0]
    assert "microvm" in rest[4]
    assert ran.returncode == 0


def test_quiet_leaves_stderr_to_the_program(sandstorm: CommandLine) -> None:
    """With --quiet nothing of ours is written."""
    ran = sandstorm("run", "--quiet", "-c", "err oops")
    assert (ran.stdout, ran.stderr) == (b"", b"oops\n")


@pytest.mark.parametrize(("program", "status"), [("exit 0", 0), ("exit 7", 7), ("signal 15", 143), ("hog", 137)])
def test_exit_status_is_the_programs(sandstorm: CommandLine, program: str, status: int) -> None:
    """A code is passed on, and a signal is shown as the shell shows it."""
    assert sandstorm("run", "-q", "-c", program).returncode == status


def test_deadline(sandstorm: CommandLine) -> None:
    """A program that is past its deadline gives 124, and its output until then is shown."""
    ran = sandstorm("run", "--timeout", "0.2", "-c", "out before\nsleep 30\nout after")
    assert (ran.returncode, ran.stdout) == (124, b"before\n")
    assert b"deadline" in ran.stderr


def test_stdin_and_files(sandstorm: CommandLine) -> None:
    """--stdin reaches the program byte for byte, and --file puts a file into the work area."""
    data = bytes(range(256))
    (sandstorm.work / "local.bin").write_bytes(data)
    ran = sandstorm("run", "-q", "--stdin", "-", "--file", "in/put=local.bin", "-c", "cat\nread in/put", stdin=data)
    assert ran.stdout == data + data


def test_code_from_a_file_and_from_standard_input(sandstorm: CommandLine) -> None:
    """FILE and - give the same program."""
    (sandstorm.work / "program.py").write_text("out here")
    assert sandstorm("run", "-q", "program.py").stdout == b"here\n"
    assert sandstorm("run", "-q", "-", stdin=b"out here").stdout == b"here\n"


def test_exec_runs_a_command(sandstorm: CommandLine) -> None:
    """With --exec the words are the command, options after -- included."""
    assert sandstorm("run", "-q", "--exec", "--", "out", "--json").stdout == b"--json\n"


def test_language_is_told_by_the_file_name(sandstorm: CommandLine) -> None:
    """--language comes first, then the file name, then python."""
    (sandstorm.work / "program.sh").write_text("out here")
    (sandstorm.work / "program").write_text("out here")

    def language(*args: str) -> str:
        answer = json.loads(sandstorm("plan", "--json", *args).stdout)
        told: str = answer["request"]["task"]["language"]
        return told

    assert language("program.sh") == "bash"
    assert language("program") == "python"
    assert language("--language", "javascript", "program.sh") == "javascript"


def test_outputs_are_written_beneath_the_directory(sandstorm: CommandLine) -> None:
    """A file that was asked for is fetched; one that the program did not make is named."""
    (sandstorm.work / "out").mkdir()
    args = ("--output", "a/b.txt", "--output", "gone.txt", "--output-dir", "out")
    ran = sandstorm("run", *args, "-c", "write a/b.txt text")
    assert (sandstorm.work / "out" / "a" / "b.txt").read_text() == "text"
    assert b"gone.txt" in ran.stderr


def test_outputs_never_leave_the_directory(sandstorm: CommandLine, tmp_path: Path) -> None:
    """Neither a path with .. nor a link in the directory leads outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (sandstorm.work / "link").symlink_to(outside)
    assert sandstorm("run", "--output", "../x", "-c", "write x text").returncode == 120
    ran = sandstorm("run", "--output", "link/x", "-c", "write link/x text")
    assert ran.returncode == 120
    assert b"outputs" in ran.stderr
    assert list(outside.iterdir()) == []


def test_json_is_one_document(sandstorm: CommandLine) -> None:
    """With --json the program's output is inside the result, and the status is still the program's."""
    ran = sandstorm("run", "--json", "-c", "out hello\nexit 3")
    result = json.loads(ran.stdout)
    assert (result["stdout"], result["exit"]["code"], result["provider"]) == ("hello\n", 3, "toy")
    assert ran.returncode == 3


def test_plan_runs_nothing(sandstorm: CommandLine) -> None:
    """A plan names the candidates, their quotes and the reasons, and leaves no run behind."""
    answer = json.loads(sandstorm("plan", "--json", "-c", "out hello").stdout)
    (ranked,) = answer["candidates"]
    assert ranked["candidate"]["offer"]["provider"] == "toy"
    assert ranked["candidate"]["quote"]["expected"]
    assert ranked["reason"]
    assert json.loads(sandstorm("runs", "list", "--json").stdout) == []
    assert b"1." in sandstorm("plan", "-c", "out hello").stdout


def test_plan_shows_exclusions(sandstorm: CommandLine) -> None:
    """Where nothing is left the plan still says what ruled each account out."""
    ran = sandstorm("plan", "--gpu", "H100", "-c", "out hello")
    assert ran.returncode == 121
    assert b"excluded" in ran.stdout
    assert b"no accelerators" in ran.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--memory", "2XB"], "memory"),
        (["--memory", "1"], "memory"),
        (["--cpu", "nan"], "cpu"),
        (["--cpu", "many"], "cpu"),
        (["--gpu", "H100:x"], "gpu"),
        (["--network", "some"], "network"),
        (["--network", "none", "--allow-host", "example.org"], "network"),
        (["--allow-cidr", "10.0.0.0/99"], "cidrs"),
        (["--isolation", "strong"], "isolation"),
        (["--env", "NAME"], "env"),
        (["--label", "=x"], "labels"),
        (["--file", "/etc/passwd=/dev/null"], "files"),
        (["--file", "x=/no/such/file"], "files.x"),
        (["--provider-option", "toy.x=nonsense"], "provider_options.toy.x"),
        (["--provider-option", "x=1"], "provider_options"),
        (["--max-cost", "cheap"], "max_cost"),
        (["--timeout", "-1"], "timeout"),
        (["--output-limit", "-1"], "output_limit"),
        (["--effects", "some"], "effects"),
        (["--pin", "a", "--prefer", "b"], "pin"),
        (["--output-dir", "/no/such/directory"], "output_dir"),
        (["--stdin", "/no/such/file"], "stdin"),
        (["--strategy", "dearest"], "strategy"),
        (["--language", "klingon"], "language"),
        (["--settings", "/no/such/file"], "/no/such/file"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_line(sandstorm: CommandLine, args: list[str], said: str) -> None:
    """Every bad value gives one line that names it, status 120, and nothing is run."""
    ran = sandstorm("run", *args, "-c", "out hello")
    assert ran.returncode == 120, ran.stderr
    assert ran.stdout == b""
    (line,) = ran.stderr.decode().splitlines()
    assert said in line


def test_bad_input_stores_nothing(sandstorm: CommandLine) -> None:
    """A value that the options refuse leaves no file behind, not even an empty store."""
    assert sandstorm("run", "--memory", "2XB", "-c", "out hello").returncode == 120
    assert sandstorm.stored == []


@pytest.mark.parametrize("args", [[], ["no-such-file.py"], ["."], ["binary.py"], ["--stdin", "-", "-"], ["--exec"]])
def test_bad_program(sandstorm: CommandLine, args: list[str]) -> None:
    """No program, or one that cannot be read, is bad input."""
    (sandstorm.work / "binary.py").write_bytes(b"\xff\xfe")
    ran = sandstorm("run", *args)
    assert ran.returncode == 120
    assert len(ran.stderr.splitlines()) == 1


def test_errors_in_json(sandstorm: CommandLine) -> None:
    """With --json an error is a document that names the class, the message and the field."""
    ran = sandstorm("run", "--json", "--memory", "2XB", "-c", "out hello")
    error = json.loads(ran.stdout)["error"]
    assert (error["class"], error["field"], error["status"]) == ("InvalidInput", "memory", 120)
    assert error["message"] in ran.stderr.decode()
    usage = json.loads(sandstorm("run", "--json", "--no-such-option").stdout)["error"]
    assert usage["field"] == "--no-such-option"


def test_refused(sandstorm: CommandLine) -> None:
    """No candidate is 121, with the plan in the JSON document; so is a denial, which names its plugin and rule."""
    ran = sandstorm("run", "--json", "--gpu", "H100", "-c", "out hello")
    assert ran.returncode == 121
    error = json.loads(ran.stdout)["error"]
    assert error["class"] == "NoCandidate"
    assert error["plan"]["exclusions"]
    sandstorm.add_plugin("deny", DENY)
    denied = sandstorm("run", "-c", "out hello")
    assert denied.returncode == 121
    assert b"deny (no-fridays)" in denied.stderr


def test_every_candidate_failed(bare: CommandLine) -> None:
    """A provider that cannot create gives 122 and names what failed."""
    bare.add_plugin("toy", FAILING.format(step="create", kind="capacity"))
    ran = bare("run", "-c", "out hello")
    assert ran.returncode == 122, ran.stderr
    assert b"toy" in ran.stderr


def test_outcome_unknown(bare: CommandLine) -> None:
    """A program that may have run, and whose result is lost, gives 123."""
    bare.add_plugin("toy", FAILING.format(step="events", kind="sandbox-lost"))
    ran = bare("run", "-c", "out hello")
    assert ran.returncode == 123, ran.stderr


def test_plugin_failed(sandstorm: CommandLine) -> None:
    """A plugin that raises where it may not gives 125, one line that names it, and no traceback."""
    sandstorm.add_plugin("raises", RAISES)
    ran = sandstorm("run", "-c", "out hello")
    assert ran.returncode == 125
    assert b"raises" in ran.stderr
    assert b"Traceback" not in ran.stderr
    assert b"Traceback" in sandstorm("run", "-c", "out hello", env={"SANDSTORM_TRACEBACK": "1"}).stderr


def _start(command: CommandLine, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command.argv(args), cwd=command.work, env=command.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_output_comes_as_it_is_written(sandstorm: CommandLine) -> None:
    """The first line can be read while the program still runs."""
    with _start(sandstorm, "run", "-q", "-c", "out first\nsleep 30") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def test_ctrl_c(sandstorm: CommandLine) -> None:
    """An interrupt ends the run with 130, and the journal keeps no open attempt."""
    with _start(sandstorm, "run", "-c", "out first\nsleep 30") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted" in stderr
    assert b"Traceback" not in stderr


def test_terminated(sandstorm: CommandLine) -> None:
    """SIGTERM cleans up as Ctrl-C does: the attempt in the journal is released."""
    with _start(sandstorm, "run", "-q", "-c", "out first\nsleep 30") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 130
    (row,) = json.loads(sandstorm("runs", "list", "--json").stdout)
    (attempt,) = json.loads(sandstorm("runs", "show", "--json", row["id"]).stdout)["attempts"]
    assert attempt["state"] == "released"


@pytest.mark.parametrize("args", [["run", "-c", "out hello"], ["plan", "-c", "out hello"], ["--help"]])
def test_full_disk_is_an_error(sandstorm: CommandLine, args: list[str]) -> None:
    """Output that cannot be written is never passed over: one line, and 125."""
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(
            sandstorm.argv(args),
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=sandstorm.work,
            env=sandstorm.env,
            timeout=60,
            check=False,
        )
    assert ran.returncode == 125
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("in_background", [False, True])
def test_closed_pipe_ends_the_run(sandstorm: CommandLine, in_background: bool) -> None:
    """When the reader goes away the program is stopped, also as a shell's background job, which has SIGINT ignored."""
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_background else signal.getsignal(signal.SIGINT)
    try:
        process = _start(sandstorm, "run", "-c", "out first\nsleep 0.3\nout second\nsleep 30")
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(timeout=30)
    assert process.returncode == 141
    assert time.monotonic() - began < 20


def test_progress_disappears(sandstorm: CommandLine) -> None:
    """On a terminal the line that says what is waited for is erased before the program's first byte."""
    shown = sandstorm.on_terminal("run", "-c", "sleep 0.5\nout hello\nsleep 0.2")
    before, _, after = shown.partition(b"hello\r\n")
    assert b"running on toy" in before
    assert b"\x1b[2K" in before.rpartition(b"running on toy")[2]
    assert b"running" not in after


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_terminal_is_decorated(sandstorm: CommandLine, env: dict[str, str]) -> None:
    """On a terminal the explanation has colour, unless NO_COLOR is set."""
    shown = sandstorm.on_terminal("run", "-c", "out hello", stdout=subprocess.DEVNULL, env=env)
    assert b"ran on" in shown
    assert (b"\x1b[1;36m" in shown) == (not env)


def _readme_lines() -> list[str]:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = readme.partition("```console\n")[2].partition("```")[0]
    return [line.removeprefix("$ ") for line in block.splitlines()]


@pytest.mark.parametrize("line", _readme_lines())
def test_readme_examples(sandstorm: CommandLine, line: str) -> None:
    """Every line of the README is a valid command line: it runs a program, or answers."""
    for name in ("hello.py", "report.py"):
        (sandstorm.work / name).write_text("print('hello')")
    (sandstorm.work / "data.csv").write_text("1,2\n")
    shell = f'sandstorm() {{ "{sys.executable}" -m sandstorm_cli "$@"; }}; {line}'
    ran = subprocess.run(
        ["sh", "-c", shell],
        cwd=sandstorm.work,
        env=sandstorm.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    # `--exec -- sh` is a command that the toy language does not have: 127 is then the program's own status.
    assert ran.returncode == (127 if "--exec" in line else 0), ran.stderr
    assert b"sandstorm: " not in ran.stderr
