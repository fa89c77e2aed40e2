"""`sandstorm sandbox cp` and `ls`: files into a sandbox, out of it and in it."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest

from sandstorm_cli._copy import Side

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import CommandLine


@pytest.mark.parametrize(
    ("text", "sandbox", "path"),
    [
        ("id:a/b", "id", "a/b"),
        ("id:", "id", ""),
        ("id:a:b", "id", "a:b"),
        ("a", None, "a"),
        ("./a:b", None, "./a:b"),
        ("dir/a:b", None, "dir/a:b"),
        (":a", None, ":a"),
        ("-", None, "-"),
    ],
)
def test_sides(text: str, sandbox: str | None, path: str) -> None:
    """A colon makes a path one in a sandbox, unless a slash or a dot comes before it."""
    assert Side.of(text) == Side(sandbox, path)


def test_files(local: CommandLine, box: str, tmp_path: Path) -> None:
    """A file goes in and out unchanged: by name, into a directory under its own name, and by the standard streams."""
    data = os.urandom(3_000_000)
    (tmp_path / "a:b").write_bytes(data)
    at = f"{box}:files"
    assert local("sandbox", "cp", str(tmp_path / "a:b"), f"{at}/new").returncode == 0
    assert local("sandbox", "cp", str(tmp_path / "a:b"), at).returncode == 0
    assert local("sandbox", "ls", at).stdout == b"a:b\nnew\n"
    assert local("sandbox", "cp", f"{at}/a:b", "-").stdout == data
    (tmp_path / "into").mkdir()
    assert local("sandbox", "cp", f"{at}/new", str(tmp_path / "into")).returncode == 0
    assert (tmp_path / "into" / "new").read_bytes() == data


def test_directories(local: CommandLine, box: str, tmp_path: Path) -> None:
    """A directory becomes DST, or goes into DST where that is there; with /. it is its contents that do."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "empty").mkdir()
    (tree / "a").write_text("a")
    (tree / "sub" / "b").write_text("b")
    at = f"{box}:trees"
    for target in (f"{at}/new", at):
        assert local("sandbox", "cp", str(tree), target).returncode == 0
    assert local("sandbox", "cp", f"{tree}/.", f"{at}/new/sub").returncode == 0
    assert local("sandbox", "cp", f"{tree}/empty", f"{at}/hollow").returncode == 0
    shown = local("sandbox", "ls", "-R", at).stdout.decode().split()
    assert [name for name in shown if name.startswith("new")] == [
        *("new/", "new/a", "new/empty/", "new/sub/", "new/sub/a", "new/sub/b", "new/sub/empty/", "new/sub/sub/", "new/sub/sub/b")
    ]
    assert "hollow/" in shown
    assert [name for name in shown if name.startswith("tree")] == ["tree/", "tree/a", "tree/empty/", "tree/sub/", "tree/sub/b"]
    for _ in range(2):
        assert local("sandbox", "cp", f"{at}/tree", str(tmp_path / "back")).returncode == 0
    for back in (tmp_path / "back", tmp_path / "back" / "tree"):
        assert (back / "sub" / "b").read_text() == "b"
        assert (back / "empty").is_dir()


def test_what_is_left_out_is_said(local: CommandLine, box: str, tmp_path: Path) -> None:
    """A link in the sandbox is not followed and not made here: it is named, with its control characters escaped."""
    local(
        "sandbox",
        "exec",
        box,
        "--",
        "sh",
        "-c",
        "mkdir -p links; cd links; echo x > file; ln -s /etc/passwd \"$(printf 'a\\033b')\"",
    )
    ran = local("sandbox", "cp", f"{box}:links", str(tmp_path / "links"))
    assert ran.returncode == 0
    assert ran.stderr == b"sandstorm: left out: links/a\\x1bb (link)\n"
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["file"]
    assert local("sandbox", "ls", f"{box}:links").stdout == b"a\\x1bb\nfile\n"


def test_devices_are_written_and_not_replaced(local: CommandLine, box: str, tmp_path: Path) -> None:
    """A pipe that stands where a file is copied to gets the bytes, and is still a pipe."""
    local("sandbox", "cp", "-", f"{box}:piped", stdin=b"bytes")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert local("sandbox", "cp", f"{box}:piped", str(tmp_path / "pipe")).returncode == 0
    assert os.read(reader, 100) == b"bytes"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("{box}:no-such", "x", "SRC"),
        ("no-such", "{box}:x", "SRC"),
        ("-", "{box}:", "DST"),
        ("{box}:.", "-", "DST"),
        ("{box}:there", "no/such/place", "DST"),
        ("{box}:../x", "x", "path"),
    ],
)
def test_bad_places(local: CommandLine, box: str, source: str, target: str, said: str) -> None:
    """A place that is not there, or that cannot take it, is named in one line, and nothing is written here."""
    if source.endswith(":there"):
        local("sandbox", "cp", "-", f"{box}:there", stdin=b"x")
    ran = local("sandbox", "cp", source.format(box=box), target.format(box=box))
    assert ran.returncode == 120, ran.stderr
    (line,) = ran.stderr.decode().splitlines()
    assert line.startswith(f"sandstorm: {said}: ")
    assert list(local.work.iterdir()) == []


def test_long_listing(local: CommandLine, box: str) -> None:
    """Permissions, size and time stand before the name; a file alone can be listed; JSON has them as data."""
    local("sandbox", "cp", "-", f"{box}:listed/file", stdin=b"12345")
    header, row = local("sandbox", "ls", "-l", f"{box}:listed/file").stdout.decode().splitlines()
    assert header.split() == ["MODE", "SIZE", "MODIFIED", "NAME"]
    assert row.startswith("-rw-")
    assert row.split()[1] == "5"
    assert row.endswith(" file")
    (entry,) = json.loads(local("sandbox", "ls", "--json", f"{box}:listed").stdout)
    assert (entry["path"], entry["size"], entry["kind"]) == ("listed/file", 5, "file")


def test_progress_of_a_copy(local: CommandLine, box: str, tmp_path: Path) -> None:
    """On a terminal a bar shows the file and the rate, and is gone at the end."""
    (tmp_path / "moved.bin").write_bytes(bytes(5_000_000))
    shown = local.on_terminal("sandbox", "cp", str(tmp_path / "moved.bin"), f"{box}:moved.bin", env={"COLUMNS": "200"})
    assert b"moved.bin" in shown
    assert re.search(rb"[kMG]B/s", shown)
    assert shown.endswith(b"\x1b[2K")
