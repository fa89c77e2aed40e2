"""What a container takes away, and that sandboxes are made in one all the same: less isolated, and loudly so."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandstorm_provider_local import LocalProvider

IN_CONTAINER = """
import json, sys, trio
from pathlib import Path
from sandstorm.provider import Command, Declined, Exit, Order, Output, SandboxSpec
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._supervisor._tree import tree

def commands(box):
    found = []
    for pid in tree(box.native.agent_pid):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return sum(command.startswith(b"sleep\\0") for command in found)

async def outcome(process):
    said = b""
    async with process.events() as events:
        async for event in events:
            said += event.data if isinstance(event, Output) else b""
    return [said.decode(), event.kind]

async def main(state):
    provider = LocalProvider(state_dir=state)
    async with provider.connect() as session:
        facts = await session.refresh()
        spec = SandboxSpec(memory=128, disk=32, files={"f": b"content"})
        offer = provider.offers(spec, facts)[0]
        told = {"level": facts.data["level"], "detail": getattr(offer, "isolation_detail", str(offer))}
        declined = provider.offers(SandboxSpec(isolation="namespaces"), facts)[0]
        told["namespaces"] = isinstance(declined, Declined)
        def order(marker):
            return Order(spec=spec, offer=offer, marker=marker, dispatch_by=trio.current_time() + 60, lifetime=120.0)
        look = Command(argv=("sh", "-c", "cat f; ls /proc 2>/dev/null; unshare -U true 2>/dev/null || echo refused"), timeout=20)
        sandbox, process = await session.launch(order("once"), look)
        told["once"] = await outcome(process)
        await sandbox.destroy()
        box = await session.create(order("box"))
        told["box"] = await outcome(await box.start(look))
        script = "setsid sleep 60 & (setsid sh -c 'sleep 60 & sleep 60' &); echo up; sleep 60"
        process = await box.start(Command(argv=("sh", "-c", script), timeout=60))
        with trio.fail_after(10):
            while commands(box) < 4:
                await trio.sleep(0.01)
        await process.kill()
        told["killed"] = commands(box)
        told["after"] = await outcome(await box.start(look))
        await box.destroy()
    print(json.dumps(told))

trio.run(main, *sys.argv[1:])
"""
MASK = 'mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec "$@"'
"""What container engines do to `/proc`, besides more of the same: a fresh one cannot be mounted any more."""
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_REFUSED = 0x00050000 | 1
_ALLOWED = 0x7FFF0000
_SETHOSTNAME = {"x86_64": 170, "aarch64": 161}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_a_hostname() -> None:
    """The default filter of container engines refuses `sethostname` to whoever was started without privileges."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SETHOSTNAME[platform.machine()]
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, _REFUSED), (0x06, 0, 0, _ALLOWED)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    assert libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0


def told(machine: Any, *prefix: str, filtered: bool) -> tuple[dict[str, Any], str]:
    """What comes of the provider there, and its standard error."""
    state = machine.state / "contained"
    command = [*prefix, sys.executable, "-c", IN_CONTAINER, str(state)]
    prepare = refuse_a_hostname if filtered else None
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=prepare)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), ran.stderr


@pytest.mark.skipif(platform.machine() not in _SETHOSTNAME, reason="the number of sethostname is not known for this machine")
async def test_a_filter_that_refuses_host_names_costs_no_isolation(machine: Any) -> None:
    """Where only the host name cannot be set, the level is the one that it is without that."""
    found, said = told(machine, filtered=True)
    assert found["level"] == machine.facts.data["level"]
    assert found["once"][1] == found["box"][1] == "exited"
    assert said.count("sandstorm: local:") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mask /proc as a container engine does")
@pytest.mark.parametrize("filtered", [False, True], ids=["masked", "masked-and-filtered"])
async def test_a_container_with_a_masked_proc_gives_what_it_can(machine: Any, filtered: bool) -> None:
    """One-shots, boxes and the kill of a whole tree work without a `/proc`; user namespaces stay refused, and it is told loudly."""
    masked = ("unshare", "--mount", "--propagation", "private", "sh", "-c", MASK, "sh")
    found, said = told(machine, *masked, filtered=filtered)
    assert found["level"] == "namespaces-noproc", found
    assert "no /proc" in found["detail"]
    assert found["namespaces"], "who asks for namespaces gets no less"
    assert found["once"] == found["box"] == found["after"] == ["contentrefused\n", "exited"]
    assert found["killed"] == 0
    assert "WARNING: weak isolation (namespaces-noproc): SHARED HOST KERNEL" in said


async def test_a_failed_climb_names_every_reason(machine: Any) -> None:
    """Where no namespaces can be made, each reason is told once, since the first may not be the one that counts."""
    bwrap = failing_bwrap(machine.state)
    async with LocalProvider(state_dir=str(machine.state), bwrap=bwrap, warn=False).connect() as session:
        facts = await session.refresh()
    why = facts.data["without_namespaces"]
    assert (why.count("no proc"), why.count("no more")) == (1, 1), why


def failing_bwrap(place: Path) -> str:
    """A program that fails with `/proc` for one reason, and without for another."""
    program = place / "bwrap"
    cases = "*--version*) echo 1.0;; *--proc*) echo no proc >&2; exit 1;; *) echo no more >&2; exit 1;;"
    program.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    program.chmod(0o755)
    return str(program)
