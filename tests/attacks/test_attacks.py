"""Attacks on sandboxes of this machine: each succeeds without one, and fails in every one that promises so. README.md says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from _bait import PRIVATE, ROOT  # noqa: E402
from _escapes import HOSTILE, PIECES  # noqa: E402
from _filecalls import CALLS  # noqa: E402
from _scenes import SCENES, UNREST  # noqa: E402
from _table import controls, promised, rows  # noqa: E402

COLUMNS = rows()[0][2:]
DEADLY = {"memory", "memory-kept", "memory-of-many", "disk", "disk-elsewhere", "one-file", "forks", "flood"}
"""Attacks for which a program is killed, so that it does not report."""
KILLS = {"out-of-memory", "output-limit", "disk-limit", "signal"}


@cache
def _lock(*script: str) -> Lock:
    return Lock()


def played(*script: str) -> Any:
    """What a script of this folder printed, run once, in a mount namespace of its own."""
    with _lock(*script):
        return _played(*script)


@cache
def _played(script: str, *args: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "VIRTUAL_ENV", "TMPDIR")}
    command = [*PRIVATE, sys.executable, str(HERE / f"{script}.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LANES = (
    # In one lane, since they have one user, whose processes are counted together.
    (("_range", "user"), ("_range", "process"), ("_range", "noproc"), ("_range", "root")),
    (("_range", "one-shot"), ("_range", "box"), ("_range", "cell"), ("_range", "terminal")),
    (("_escapes",), ("_filecalls", "naive"), ("_filecalls", "sandbox"), *(("_scenes", scene) for scene in SCENES)),
)


def mounts() -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point in ("/home", "/run", "/tmp", "/etc/shadow") or "sandstorm" in point]


@pytest.fixture(scope="module", autouse=True)
def range_is_open(request):
    """Where all is tested, the scripts run side by side. No mount of the machine is touched and no directory left by them."""
    before = mounts()
    with ThreadPoolExecutor(len(LANES)) as pool:
        if sum(item.path == request.path for item in request.session.items) > 100:
            for lane in LANES:
                pool.submit(lambda lane=lane: [played(*script) for script in lane if ROOT or script != ("_range", "root")])
        yield
    assert mounts() == before
    assert not list(Path("/tmp").glob("sandstorm-attacks-*"))


@pytest.mark.parametrize(("attack", "user"), controls().items())
def test_an_attack_succeeds_outside(attack, user):
    """Without a sandbox the same program gets what it is after: as the user, or where only root can, as root."""
    if user == "root" and not ROOT:
        pytest.skip("only root succeeds with it outside, and this is not root")
    found = played("_range", user)["attacks"][attack]
    assert found["got"], found


@pytest.mark.parametrize(("column", "attack"), [(column, attack) for column in COLUMNS for attack in promised(column)])
def test_an_attack_fails_inside(column, attack):
    """In a sandbox it gets nothing, by its own report and by what is seen outside; it was tried, or killed for trying.

    Ordinary users get no bpf, no packet sockets, no devices and no kernel settings on this kernel anyway. So devices are made
    accessible first, and bpf is asked for what a kernel refuses with another error than the filter does; of the other two,
    failing inside says only that the sandbox gives no right that its user has not got.
    """
    tried = played("_range", column)
    if attack == "memory-of-many" and not tried["level"].endswith("+cgroup"):
        pytest.skip(f"the level {tried['level']} limits the memory of each process only: this user has no control group")
    found = tried["attacks"][attack]
    assert found["got"] == [], found
    assert found["reported"] or (attack in DEADLY and found["exit"] in KILLS), found


def test_file_calls_that_trust_paths_get_out():
    """Every call, on links and `..` and during a swap, reads or changes what is outside of a directory that nobody guards."""
    found = played("_filecalls", "naive")
    assert {call for call, _ in found["swept"]} == set(CALLS)
    assert len({call for call, _ in found["raced"]}) >= 3


@pytest.mark.parametrize("call", CALLS)
def test_no_file_call_leaves_the_work_area(call):
    """Whatever a program has planted, a call reads, lists, makes, changes and removes nothing outside, and does not hang."""
    found = played("_filecalls", "sandbox")
    assert found["honest"][call], "the call does not work at all"
    assert [path for name, path in found["swept"] if name == call] == []


def test_no_file_call_leaves_the_work_area_while_it_is_swapped():
    """A program that swaps directories and files for links, as fast as it can, changes nothing of that; calls go on to work."""
    found = played("_filecalls", "sandbox")
    assert found["raced"] == []
    assert found["read while swapped"] > 0
    assert found["refused while swapped"] > 0, "nothing was swapped"


def test_files_of_a_spec_stay_in_the_work_area():
    """Files of a spec are refused where their path climbs, and do not follow the links of a snapshot that they are put on."""
    assert played("_filecalls", "sandbox")["specified"] == []


def test_secrets_are_in_programs_alone():
    """A secret stands in the variables of programs that were given it, and nowhere else on the machine; nobody else sees it."""
    found = played("_scenes", "secrets")
    assert "python3 cmdline" in found["on a command line"]
    assert found["as root"] == ["sleep environ"]
    assert found["as another user"] == [] or not ROOT


def test_neighbours_are_out_of_reach():
    """A program that knows where another box and its output are gets nothing of it, and cannot hurt it; root outside can."""
    found = played("_scenes", "neighbours")
    assert found["as root"] or not ROOT
    assert found["inside"] == {"read": [], "custodians": []}
    assert found["lives"]


@pytest.mark.parametrize("unrest", UNREST)
def test_a_box_outlives_unrest(unrest):
    """Whatever a program stops, kills or takes in its box, the next one runs or ends at its deadline, and so does the box."""
    found = played("_scenes", "unrest")[unrest]
    # While it goes on, nothing else may get anywhere, and still ends in time.
    assert found["next"] if "forever" in unrest else found["next"] == "exited", found
    assert found["seconds"] < 6, found
    assert found["ended"]


def test_hostile_text_is_printed_escaped():
    """Listings, errors, names and stored output have no byte of it that a terminal obeys, on a terminal as in a pipe."""
    found = played("_escapes")
    assert found["raw"] == {}
    assert len(found["seen"]) >= 15, "commands do not tell of the hostile names at all"


def test_output_of_programs_is_exact():
    """What a program writes arrives byte by byte, escapes included: the same text that is escaped elsewhere."""
    assert all(piece in HOSTILE for piece in PIECES)
    assert played("_escapes")["exact"] == {"run": True, "exec": True}
