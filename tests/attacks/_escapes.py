"""What the command line prints of hostile names and output: `python _escapes.py` prints what was raw, by command, as JSON.

Start it in a mount namespace of its own.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from _bait import Bait, bait

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt\rexe\x08"
PIECES = ("\x1b]0;", "\x1b[2J", "\x07", "\x9b31m", "\u202e", "\x08", "t\re")
PLANT = """
import os, sys
name = sys.argv[1]
os.makedirs(name + "/below")
for path in (name + "/file", "file-" + name):
    open(path, "w").write(name)
os.symlink(name, name + "/link")
os.mkfifo(name + "/pipe")
os.symlink(name, "link-" + name)
"""
SHOUT = "import sys; sys.stdout.write(sys.argv[1]); sys.stderr.write(sys.argv[1])"


class CommandLine:
    """Runs commands, and notes what came out raw."""

    def __init__(self, bait: Bait) -> None:
        self.work = bait.top / "commands"
        self.work.mkdir()
        settings = self.work / "sandstorm.toml"
        settings.write_text(f'store = "sqlite:///{bait.top}/journal.db"\n[plugins.local]\nstate_dir = "{bait.top}/state"\n')
        inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self._env = {**inherited, "HOME": str(self.work), "LANG": "C.UTF-8", "TERM": "xterm-256color"}
        self.raw: dict[str, list[str]] = {}
        self.seen: list[str] = []
        """Commands that told of a hostile name or output at all."""

    def __call__(self, *args: str, program: bool = False) -> tuple[bytes, bytes]:
        """Both streams of a command. `program` is whether they are a program's, which may be raw."""
        done = subprocess.run(self._argv(args), capture_output=True, cwd=self.work, env=self._env, check=False, timeout=60)
        if not program:
            self._judge(args, "piped", done.stdout + done.stderr)
        return done.stdout, done.stderr

    def on_terminal(self, *args: str) -> None:
        """The same with a terminal, where colours and the movements of a progress line are the command's own."""
        master, slave = pty.openpty()
        process = subprocess.Popen(
            self._argv(args), stdin=slave, stdout=slave, stderr=slave, cwd=self.work, env=self._env, start_new_session=True
        )
        os.close(slave)
        data = b""
        try:
            while piece := os.read(master, 65536):
                data += piece
        except OSError:
            pass  # that is how a terminal ends
        finally:
            os.close(master)
            process.wait(60)
        self._judge(args, "terminal", data)

    def _argv(self, args: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "sandstorm_cli", *args]

    def _judge(self, args: tuple[str, ...], how: str, data: bytes) -> None:
        name = f"{' '.join(args)[:60]!a} {how}"
        if b"owned" in data:
            self.seen.append(name)
        if raw := [ascii(piece) for piece in PIECES if piece.encode() in data]:
            self.raw[name] = raw


@contextmanager
def sandbox(line: CommandLine) -> Iterator[str]:
    """The id of a box with hostile names in it."""
    name = line("sandbox", "create", "--memory", "64MiB", "--disk", "16MiB")[0].decode().strip()
    try:
        line("sandbox", "exec", name, "--", "python3", "-c", PLANT, HOSTILE)
        yield name
    finally:
        line("sandbox", "rm", name)


def commands(line: CommandLine, box: str) -> list[tuple[str, ...]]:
    """What tells of names, output and errors."""
    run = line("runs", "list", "--json")[0]
    runs = [row["id"] for row in json.loads(run) if row["title"] != "sandbox"]
    found: list[tuple[str, ...]] = [("runs", "list"), *(("runs", "show", each) for each in runs)]
    found += [("sandbox", "ls", "-l", box), ("sandbox", "ls", "-R", box)]
    found += [
        ("sandbox", "ls", f"{box}:{HOSTILE}"),
        ("sandbox", "ls", f"{box}:link-{HOSTILE}"),
        ("sandbox", "ls", f"{box}:no-{HOSTILE}"),
    ]
    found += [("sandbox", "list", "--cost", "--idle"), ("sandbox", "url", HOSTILE, "80"), ("runs", "show", HOSTILE)]
    found += [("sandbox", "cp", f"{box}:{HOSTILE}", f"copy-{len(found)}"), ("sandbox", "cp", f"{box}:link-{HOSTILE}", "copied")]
    found += [("sandbox", "cp", f"{box}:file-{HOSTILE}", "."), ("sandbox", "cp", "sandstorm.toml", f"{box}:link-{HOSTILE}/x")]
    return [*found, ("run", "--exec", "--output", f"no-{HOSTILE}", "--", "true"), ("run", "--language", HOSTILE, "-c", "x")]


def main() -> None:
    """Prints which commands were raw, which told of something hostile, and whether a program's own output is exact."""
    with bait() as made:
        line = CommandLine(made)
        exact: dict[str, Any] = {}
        shouted = line("run", "-c", SHOUT, "--", HOSTILE, program=True)
        exact["run"] = shouted[0] == HOSTILE.encode()
        line("run", "--exec", "--", f"./{HOSTILE}", program=True)  # so that the list of runs has its name
        with sandbox(line) as box:
            exact["exec"] = (
                line("sandbox", "exec", box, "--", "python3", "-c", SHOUT, HOSTILE, program=True) == (HOSTILE.encode(),) * 2
            )
            tried = commands(line, box)
            for args in tried:
                line(*args)
            for args in tried[1::3] if len(sys.argv) == 1 else tried:
                line.on_terminal(*args)
        print(json.dumps({"raw": line.raw, "seen": line.seen, "exact": exact}))


if __name__ == "__main__":
    main()
