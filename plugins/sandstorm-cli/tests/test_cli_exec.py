"""`sandstorm sandbox exec` and `shell`: streams, signals and terminals, joined to a program in a sandbox."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import pytest

if TYPE_CHECKING:
    from conftest import CommandLine


def test_streams_are_exact(local: CommandLine, box: str) -> None:
    """What is piped in arrives byte for byte; stdout and stderr stay apart; nothing of ours is added."""
    data = bytes(range(256)) * 4096
    ran = local("sandbox", "exec", box, "--", "sh", "-c", "cat; echo oops >&2", stdin=data)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, data, b"oops\n")


def test_stdin_comes_as_it_is_sent(local: CommandLine, box: str) -> None:
    """A line is answered before the input ends, and its end reaches the program."""
    with local.started("sandbox", "exec", box, "--", "cat", stdin=subprocess.PIPE) as process:
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"one\n"
        process.stdin.close()
        assert process.status() == 0


@pytest.mark.parametrize(
    ("args", "script", "status", "stdout"),
    [
        ([], "exit 7", 7, b""),
        ([], "kill -TERM $$", 143, b""),
        (["--timeout", "0.3s"], "echo before; sleep 30", 124, b"before\n"),
        (["-e", "A=b c", "-e", "B=", "--cwd", "deep/er"], 'echo "$A,$B,$PWD"', 0, b"b c,,/work/deep/er\n"),
    ],
)
def test_exit_status_and_options(local: CommandLine, box: str, args: list[str], script: str, status: int, stdout: bytes) -> None:
    """A code, a signal and a deadline are shown as `run` shows them; variables and directory reach the program."""
    if "--cwd" in args:
        local("sandbox", "cp", "-", f"{box}:deep/er/file", stdin=b"")
    ran = local("sandbox", "exec", *args, box, "--", "sh", "-c", script)
    assert (ran.returncode, ran.stdout) == (status, stdout)
    assert (b"deadline" in ran.stderr) == (status == 124)


def test_ctrl_c_is_the_programs(local: CommandLine, box: str) -> None:
    """The first Ctrl-C is a signal for the program, which may go on; the second one kills it."""
    script = "import signal, time; signal.signal(2, lambda *_: print('no', flush=True)); print('up', flush=True)\nwhile 1: time.sleep(9)"
    with local.started("sandbox", "exec", box, "--", "python3", "-c", script) as process:
        assert process.stdout.readline() == b"up\n"
        process.send(signal.SIGINT)
        assert process.stdout.readline() == b"no\n"
        process.send(signal.SIGINT)
        assert process.status() == 137


def test_terminated(local: CommandLine, box: str) -> None:
    """SIGTERM ends the program with the command, and one line says so."""
    with local.started("sandbox", "exec", box, "--", "sh", "-c", "echo up; exec sleep 3141") as process:
        assert process.stdout.readline() == b"up\n"
        process.send(signal.SIGTERM)
        assert process.status() == 130
        assert process.stderr.read().strip() == b"sandstorm: interrupted"
    assert local("sandbox", "exec", box, "--", "pgrep", "-f", "sleep 3141").stdout == b""


def test_closed_pipe_ends_the_program(local: CommandLine, box: str) -> None:
    """When the reader goes away, so does the program, without a word."""
    with local.started("sandbox", "exec", box, "--", "yes", "2718") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.status() == 141
        assert process.stderr.read() == b""


def test_input_without_the_ability(plain: CommandLine) -> None:
    """Where programs take no input while they run, it is read to its end and sent whole; a terminal is refused with the reason."""
    name = plain("sandbox", "create", "-q", "--pin", "plain").stdout.decode().strip()
    assert plain("sandbox", "exec", name, "--", "cat", stdin=b"whole").stdout == b"whole"
    with Terminal.running(plain, "sandbox", "shell", name) as terminal:
        assert b"made so for a test" in terminal.until(b"for a test")
        assert terminal.process.wait(timeout=30) == 120
    assert plain("sandbox", "rm", name).returncode == 0


@attrs.frozen
class Terminal:
    """A command on a terminal of its own."""

    main: int
    other: int
    process: subprocess.Popen[bytes]

    @classmethod
    @contextlib.contextmanager
    def running(cls, command: CommandLine, *args: str, size: tuple[int, int] = (111, 33)) -> Iterator[Terminal]:
        """A command whose terminal has so many columns and rows."""
        main, other = pty.openpty()
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        process = subprocess.Popen(
            command.argv(args),
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=command.work,
            env={**command.env, "TERM": "xterm"},
        )
        try:
            with process:
                try:
                    yield cls(main, other, process)
                finally:
                    process.kill()
        finally:
            os.close(main)
            os.close(other)

    @property
    def modes(self) -> list[object]:
        """How the terminal is set."""
        return termios.tcgetattr(self.other)

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self.main, text.encode())

    def until(self, text: bytes) -> bytes:
        """What is shown up to a text."""
        shown, end = b"", time.monotonic() + 20
        while text not in shown and time.monotonic() < end:
            if select.select([self.main], [], [], 0.2)[0]:
                shown += os.read(self.main, 1 << 16)
        return shown


def test_shell_is_a_terminal(local: CommandLine, box: str) -> None:
    """The shell has the size and kind of this terminal, follows its size, keeps Ctrl-C for its programs, and restores it."""
    with Terminal.running(local, "sandbox", "shell", box, "-e", "PS1=ready> ") as terminal:
        before = terminal.modes
        terminal.until(b"ready> ")
        assert terminal.modes != before
        terminal.type("echo $(stty size) $TERM\r")
        assert b"33 111 xterm" in terminal.until(b"33 111 xterm")
        fcntl.ioctl(terminal.main, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 99, 0, 0))
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.type("until [ \"$(stty size)\" = '44 99' ]; do sleep 0.05; done; echo resized $((6 * 7))\r")
        assert b"resized 42" in terminal.until(b"resized 42")
        terminal.type("sh -c 'echo up $((1 + 1)); exec sleep 3141'\r")
        terminal.until(b"up 2")
        terminal.type("\x03")
        assert b"ready> " in terminal.until(b"ready> ")
        terminal.type("exit 7\r")
        assert terminal.process.wait(timeout=30) == 7
        assert terminal.modes == before


@pytest.mark.parametrize(("end", "status"), [("signal", 130), ("destroy", 122)])
def test_terminal_is_restored(local: CommandLine, box: str, end: str, status: int) -> None:
    """The terminal is as it was before also where the command is told to stop, or the sandbox is ended."""
    name = box if end == "signal" else local("sandbox", "create", "-q").stdout.decode().strip()
    with Terminal.running(local, "sandbox", "exec", "-t", name, "--", "sh", "-c", "echo up; cat") as terminal:
        before = terminal.modes
        terminal.until(b"up\r\n")
        assert terminal.modes != before
        if end == "signal":
            terminal.process.terminate()
        else:
            assert local("sandbox", "rm", name).returncode == 0
        assert b"sandstorm: " in terminal.until(b"sandstorm: ")
        assert terminal.process.wait(timeout=30) == status
        assert terminal.modes == before
