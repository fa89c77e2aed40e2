"""The attacks, and where they must fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from _bait import DEVICES, Bait

TABLE = """
attack             outside   one-shot  box      cell     terminal  noproc   process
home               user      blocked   blocked  blocked  blocked   blocked  blocked
shadow             user      blocked   blocked  blocked  blocked   blocked  blocked
environment        user      blocked   blocked  blocked  blocked   blocked  blocked
command-lines      user      blocked   blocked  blocked  blocked   blocked  blocked
see-router         user      blocked   blocked  blocked  blocked   blocked  blocked
signal-router      user      blocked   blocked  blocked  blocked   blocked  blocked
docker-socket      user      blocked   blocked  blocked  blocked   blocked  blocked
abstract-socket    user      blocked   blocked  blocked  blocked   blocked  blocked
datagram           user      blocked   blocked  blocked  blocked   blocked  blocked
loopback           user      blocked   blocked  blocked  blocked   blocked  blocked
families           root      blocked   blocked  blocked  blocked   blocked  blocked
namespaces         user      blocked   blocked  blocked  blocked   blocked  blocked
mount              user      blocked   blocked  blocked  blocked   blocked  blocked
io-uring           user      blocked   blocked  blocked  blocked   blocked  blocked
userfaultfd        user      blocked   blocked  blocked  blocked   blocked  blocked
trace              user      blocked   blocked  blocked  blocked   blocked  blocked
bpf                root      blocked   blocked  blocked  blocked   blocked  blocked
keyring            user      blocked   blocked  blocked  blocked   blocked  blocked
unfiltered         user      blocked   blocked  blocked  blocked   blocked  blocked
terminal-input     root      blocked   blocked  blocked  blocked   blocked  blocked
devices            root      blocked   blocked  blocked  blocked   blocked  blocked
settings           root      blocked   blocked  blocked  blocked   blocked  blocked
memory             user      blocked   blocked  blocked  blocked   blocked  blocked
memory-kept        user      blocked   blocked  blocked  blocked   blocked  blocked
memory-of-many     user      blocked   blocked  blocked  blocked   -        -
disk               user      blocked   blocked  blocked  blocked   blocked  -
disk-elsewhere     user      blocked   blocked  blocked  blocked   blocked  blocked
one-file           user      blocked   blocked  blocked  blocked   blocked  blocked
forks              user      blocked   blocked  blocked  blocked   blocked  blocked
flood              user      blocked   blocked  blocked  blocked   blocked  blocked
daemons            user      blocked   blocked  blocked  blocked   blocked  blocked
custodians         user      -         blocked  blocked  blocked   -        blocked
inherited          user      blocked   blocked  -        blocked   blocked  blocked
"""
"""`outside` names the user as whom the attack succeeds without a sandbox. `-` is not promised: see README.md, which says why."""

MEMORY, DISK, OUTPUT = 64, 16, 1 << 20
"""MiB of memory and of disk that sandboxes get, and bytes of output."""
OPEN_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm", "/dev", "/dev/mqueue", "/dev/pts", "/run", "/run/sandstorm", "/", "/usr")
"""Where a program might find room besides its work area."""


@attrs.frozen
class Attack:
    """One attack: its probe, its parameters, and those that differ outside."""

    probe: str
    parameters: Callable[[Bait], dict[str, Any]]
    outside: Callable[[Bait], dict[str, Any]] = lambda _: {}
    timeout: float = 10.0


def _same(**parameters: Any) -> Callable[[Bait], dict[str, Any]]:
    return lambda _: parameters


ATTACKS = {
    "home": Attack("read", lambda bait: {"paths": bait.paths}),
    "shadow": Attack("read", _same(paths=["/etc/shadow"])),
    "environment": Attack("environment", _same()),
    "command-lines": Attack("command-lines", _same()),
    "see-router": Attack("see", _same()),
    "signal-router": Attack("kill", _same()),
    "docker-socket": Attack("connect", lambda bait: {"addresses": bait.addresses}),
    "abstract-socket": Attack("connect", lambda bait: {"addresses": [("AF_UNIX", bait.abstract)]}),
    "datagram": Attack("datagram", _same()),
    "loopback": Attack(
        "connect",
        lambda bait: {"addresses": [("AF_INET", ("127.0.0.1", bait.port)), ("AF_INET6", ("::ffff:127.0.0.1", bait.port))]},
    ),
    "families": Attack("sockets", _same(families=[17, 38, 40, 44, 15])),  # packets, kernel crypto, vsock, XDP, key
    "namespaces": Attack("namespaces", _same()),
    "mount": Attack("mount", _same()),
    "io-uring": Attack("io-uring", _same()),
    "userfaultfd": Attack("userfaultfd", _same()),
    "trace": Attack("trace", _same()),
    "bpf": Attack("bpf", _same()),
    "keyring": Attack("keyring", _same()),
    "unfiltered": Attack("unfiltered", _same()),
    "terminal-input": Attack("terminal-input", _same()),
    "devices": Attack("devices", _same(paths=["/dev/mem", "/dev/vda", "/dev/sda", *DEVICES])),
    "settings": Attack("settings", _same()),
    "memory": Attack("memory", _same(megabytes=256, seconds=0)),
    "memory-kept": Attack("memory", _same(megabytes=100, seconds=1.5)),
    "memory-of-many": Attack("memory-of-many", _same(megabytes=44, children=5, seconds=1.5)),
    "disk": Attack("disk", _same(files=50)),
    "disk-elsewhere": Attack(
        "disk", _same(files=80, directories=OPEN_DIRECTORIES), lambda bait: {"directories": [str(bait.top / "work")]}
    ),
    "one-file": Attack("one-file", _same(megabytes=50)),
    "forks": Attack("forks", _same(processes=256)),
    "flood": Attack("flood", _same(megabytes=20)),
    "daemons": Attack("daemons", lambda bait: {"name": f"daemon-{bait.token}"}, timeout=2.0),
    "custodians": Attack("custodians", _same()),
    "inherited": Attack("inherited", _same()),
}


def rows() -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the cells of each row."""
    header, *lines = (line.split() for line in TABLE.strip().splitlines())
    return header, lines


def promised(column: str) -> list[str]:
    """The attacks that must fail in a column."""
    header, lines = rows()
    place = header.index(column)
    return [line[0] for line in lines if line[place] == "blocked"]


def controls() -> dict[str, str]:
    """The user as whom each attack succeeds outside."""
    return {line[0]: line[1] for line in rows()[1]}
