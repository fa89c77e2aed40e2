"""A supervisor over its protocol, with real sandboxes and no router: the box around the programs, and its end."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
import urllib.request

import pytest

from sandstorm_provider_local._cgroup import sweep

KEPT = {"keep": True}


def gone(workshop):
    """Waits until the last supervisor has ended by itself, and says how long that took."""
    begun = time.monotonic()
    workshop.supervisors[-1].wait(10)
    assert workshop.processes() == []
    return time.monotonic() - begun


def fetch(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        return answer.read()


# --- who ends it ----------------------------------------------------------------------------------------------


def test_destroy_is_answered_when_nothing_is_left(workshop):
    """At the answer, processes, groups and the directory are gone, a fork bomb included."""
    box = workshop.box()
    box.start("sh", "-c", "f() { f | f & }; f; sleep 60")
    time.sleep(0.2)
    box.ask("destroy")
    assert (workshop.processes(), workshop.groups(), box.directory.exists()) == ([], [], False)
    assert box.rest()[-1]["reason"] == "destroyed"


def test_box_ends_with_its_leash(workshop):
    """A box that is not kept ends when the connection of its maker closes, detached programs included."""
    box = workshop.box()
    other = workshop.attach(box)
    other.start("sleep", "1000", detached=True)
    box.close()
    assert other.rest()[-1]["reason"] == "leash"
    gone(workshop)


def test_box_whose_maker_was_gone_before_it_came_up_ends(workshop):
    """A leash that closes at once leaves nothing either."""
    workshop.create().close()
    gone(workshop)


def test_kept_box_outlives_its_leash_and_ends_at_its_lifetime(workshop):
    """A kept box is reached again, extended, and gone at the moment that the last extension named."""
    box = workshop.box(**KEPT, lifetime=1.0)
    detached = box.start("sleep", "1000", timeout=1000.0, detached=True)
    attached = box.start("sleep", "1000", timeout=1000.0)
    box.close()
    again = workshop.attach(box)
    assert again.wait(attached)[0]["exit"]["signal"] == signal.SIGKILL
    again.ask("extend", lifetime=1.5)
    begun = time.monotonic()
    assert again.ask("hello")["processes"] == [detached]
    assert again.rest()[-1]["reason"] == "lifetime"
    assert 1.4 < time.monotonic() - begun < 3


def test_box_ends_once_it_is_idle(workshop):
    """Neither a running program nor a paused box is idle; without both, the timeout counts from the last request."""
    box = workshop.box(idle_timeout=0.4)
    assert box.run("sleep", "0.7")[0]["exit"]["code"] == 0
    if box.ask("hello")["abilities"]["pause"]:
        box.ask("pause")
        time.sleep(0.7)
        box.ask("resume")
    for _ in range(4):
        time.sleep(0.2)
        box.ask("touch")
    begun = time.monotonic()
    assert box.rest()[-1]["reason"] == "idle"
    assert 0.3 < time.monotonic() - begun < 1.5


def test_killed_supervisor_leaves_no_process(workshop):
    """Whenever a supervisor is killed, all of its processes end; what is left on disk is swept."""
    chance = random.Random(3)
    for _ in range(12):
        box = workshop.create(**KEPT)
        time.sleep(chance.random() * 0.08)
        try:
            box.start("sh", "-c", "setsid sleep 1000 & sleep 1000", detached=True)
            time.sleep(chance.random() * 0.02)
        finally:
            workshop.supervisors[-1].kill()
            workshop.supervisors[-1].wait()
    until = time.monotonic() + 5
    while workshop.processes():
        assert time.monotonic() < until, workshop.processes()
        time.sleep(0.01)
    if workshop.hierarchy is not None:
        sweep(workshop.hierarchy)
    assert workshop.groups() == []
    workshop.remove_directories()


def test_paused_box_of_a_killed_supervisor_is_swept(workshop):
    """What is frozen cannot die by itself: the sweep thaws and ends it."""
    if workshop.hierarchy is None or workshop.hierarchy.freezer is None:
        pytest.skip("there is no freezer here")
    box = workshop.box(**KEPT)
    box.start("sleep", "1000", detached=True)
    box.ask("pause")
    workshop.supervisors[-1].kill()
    workshop.supervisors[-1].wait()
    until = time.monotonic() + 5
    while workshop.processes() or workshop.groups():
        assert time.monotonic() < until
        sweep(workshop.hierarchy)
        time.sleep(0.01)
    workshop.remove_directories()


# --- what else it can do --------------------------------------------------------------------------------------


def test_work_area_is_handed_out(workshop):
    """The open directory that comes with hello is the programs' own work area."""
    box = workshop.box()
    box.run("sh", "-c", "echo hello > file")
    fd = os.open("file", os.O_RDONLY, dir_fd=box.fds[0])
    with os.fdopen(fd, "rb") as file:
        assert file.read() == b"hello\n"


def test_paused_box_stands_still_and_its_deadlines_too(workshop):
    """While paused nothing runs, requests for programs are refused, and a deadline waits."""
    box = workshop.box()
    if not box.ask("hello")["abilities"]["pause"]:
        pytest.skip("there is no freezer here")
    process = box.start("sh", "-c", "for i in $(seq 20); do echo $i; sleep 0.02; done", timeout=1.0)
    box.wait_output(process, b"2\n")
    box.ask("pause")
    before = box.output(process)
    time.sleep(1.1)
    assert box.output(process) == before
    with pytest.raises(Exception, match="Conflict"):
        box.start("true")
    box.ask("resume")
    assert box.wait(process)[0]["exit"]["code"] == 0


def test_paused_box_can_be_killed_and_destroyed(workshop):
    """A kill ends the pause, and a destroy does not wait for a resume."""
    box = workshop.box()
    if not box.ask("hello")["abilities"]["pause"]:
        pytest.skip("there is no freezer here")
    process = box.start("sleep", "1000")
    box.ask("pause")
    box.ask("kill", process=process)
    box.ask("pause")
    box.ask("destroy")
    assert workshop.processes() == []


def test_port_is_reached_from_outside_even_before_the_server_listens(workshop):
    """A connection waits for a server that is just starting, and large answers arrive whole."""
    box = workshop.box()
    box.run("sh", "-c", "head -c 3000000 /dev/zero > index.html")
    box.start("sh", "-c", "sleep 0.3; exec python3 -m http.server 8000")
    port = box.ask("url", port=8000)["port"]
    assert box.ask("url", port=8000)["port"] == port
    assert fetch(port) == bytes(3_000_000)


def test_port_hands_on_the_end_of_each_direction(workshop):
    """Half of a connection can be closed while the other goes on."""
    box = workshop.box()
    script = (
        "import socket; s = socket.create_server(('127.0.0.1', 7000)); c, _ = s.accept(); data = b''\n"
        "while part := c.recv(65536): data += part\n"
        "c.sendall(b'%d' % len(data))"
    )
    box.start("python3", "-c", script)
    with socket.create_connection(("127.0.0.1", box.ask("url", port=7000)["port"]), timeout=10) as connection:
        connection.sendall(bytes(2_000_000))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b"2000000"
        assert connection.recv(100) == b""


def test_network_inside_reaches_no_server_of_the_host(workshop):
    """What listens on the host's loopback is another loopback, though ports lead in."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 1)"
        _, _, stderr = workshop.box().run("python3", "-c", script)
    assert b"refused" in stderr


def test_archive_brings_the_files_to_another_box(workshop):
    """The work area of one box is restored in another, links as links, while its programs stand still and go on."""
    box, other = workshop.box(), workshop.box()
    box.run("sh", "-c", "mkdir d; echo data > d/f; chmod 750 d/f; ln -s /etc/passwd link")
    writer = box.start("sh", "-c", "for i in $(seq 60); do echo $i > count; sleep 0.01; done; echo done")
    with (workshop.state / "archive.tar").open("w+b") as file:
        size = box.ask("archive", (file.fileno(),))["size"]
        assert size == os.fstat(file.fileno()).st_size
        assert box.wait(writer)[1] == b"done\n"
        file.seek(0)
        other.ask("restore", (file.fileno(),))
    _, stdout, _ = other.run("sh", "-c", "cat d/f; stat -c %a d/f; readlink link")
    assert stdout.split() == [b"data", b"750", b"/etc/passwd"]


def test_restore_that_fails_says_why(workshop):
    """What is no archive is refused with tar's own words."""
    box = workshop.box()
    (workshop.state / "bad.tar").write_bytes(b"no archive" * 100)
    with (workshop.state / "bad.tar").open("rb") as file, pytest.raises(Exception, match="tar"):
        box.ask("restore", (file.fileno(),))
    assert box.run("true")[0]["exit"]["code"] == 0


def test_usage_counts_what_was_used(workshop):
    """CPU time of programs that have ended, and files in the work area, are in the usage."""
    box = workshop.box()
    box.run("python3", "-c", "import time\nwhile time.process_time() < 0.3: pass\nopen('f', 'wb').write(bytes(5_000_000))")
    usage = box.ask("usage")
    assert 0.25 < usage["cpu_seconds"] < 3
    assert 5_000_000 <= usage["disk"] < 6_000_000
    assert usage["pids"] >= 2


# --- cells ----------------------------------------------------------------------------------------------------


def test_cells_share_one_state(workshop):
    """A cell sees what the one before has left, shows its value, and an exception ends only itself."""
    box = workshop.box()
    assert box.cell("x = 20")[0]["exit"]["code"] == 0
    assert box.cell("x + 1")[1] == b"21\n"
    event, _, stderr = box.cell("1 / 0")
    assert (event["exit"]["code"], b"ZeroDivisionError" in stderr) == (1, True)
    assert box.cell("x")[1] == b"20\n"


def test_cells_wait_for_each_other(workshop):
    """Two cells that are asked for at once run in that order."""
    box = workshop.box()
    first = box.send_cell("import time; time.sleep(0.2); y = 7")
    second = box.send_cell("y")
    assert box.wait(second)[1] == b"7\n"
    assert box.wait(first)[0]["exit"]["code"] == 0


def test_cell_that_is_killed_before_its_turn_never_runs(workshop):
    """A waiting cell is taken back without harm to the one that runs, nor to the state."""
    box = workshop.box()
    first = box.send_cell("v = 1; import time; time.sleep(0.3)")
    second = box.send_cell("v = 2")
    box.ask("kill", process=second)
    assert box.wait(second)[0]["exit"]["kind"] == "signal"
    assert box.wait(first)[0]["exit"]["code"] == 0
    assert box.cell("v")[1] == b"1\n"


def test_artifacts_are_files_of_the_cell(workshop):
    """A rich value becomes a file beside the streams."""
    box = workshop.box()
    event, _, _ = box.cell("class R:\n    def _repr_html_(self): return '<b>x</b>'\nR()")
    assert [(artifact["mime"], artifact["size"]) for artifact in event["artifacts"]] == [("text/html", 8)]
    assert (box.directory / "out" / event["process"] / "artifacts" / "0").read_bytes() == b"<b>x</b>"


def test_cell_past_its_time_ends_the_interpreter(workshop):
    """At its deadline a cell dies with the interpreter and what it started; the next cell begins anew."""
    box = workshop.box()
    box.cell("z = 1")
    event, _, _ = box.cell("import os, time; os.system('sleep 98760 &'); time.sleep(60)", timeout=0.5)
    assert event["exit"]["kind"] == "deadline"
    event, _, stderr = box.cell("z")
    assert b"NameError" in stderr


def test_interrupted_cell_keeps_the_state(workshop):
    """SIGINT ends the cell with 130 and leaves what was there before."""
    box = workshop.box()
    process = box.send_cell("w = 5; print('ready', flush=True); import time; time.sleep(60)")
    box.wait_output(process, b"ready")
    box.ask("signal", process=process, number=signal.SIGINT)
    assert box.wait(process)[0]["exit"]["code"] == 130
    assert box.cell("w")[1] == b"5\n"


def test_interpreter_that_is_ended_by_its_own_code_is_begun_anew(workshop):
    """A cell that exits, kills or deafens the kernel is over, and the next one runs."""
    box = workshop.box()
    assert box.cell("import os; os._exit(9)")[0]["exit"] == {"kind": "exited", "code": 9, "signal": None}
    assert box.cell("import os; os.kill(os.getpid(), 9)")[0]["exit"]["signal"] == 9
    assert box.cell("import os, time; os.closerange(3, 100); time.sleep(60)")[0]["exit"]["kind"] == "signal"
    assert box.cell("1 + 1")[1] == b"2\n"


def test_forged_messages_of_a_kernel_are_not_believed(workshop):
    """Code in a cell holds the kernel's socket: it can end its own cell, and otherwise says nothing that counts."""
    box = workshop.box()
    forged = [
        b"no json",
        b'{"event": "done", "id": "p999", "code": 0}',
        b'{"event": "artifact", "id": "p1", "mime": 5, "name": "../../x"}',
        b'{"event": "done", "id": "p1", "code": "none"}',
        b"[" * 60000,
    ]
    code = f"import socket\ns = socket.socket(fileno=3)\nfor m in {forged!r}: s.send(m)\ns.detach(); import time; time.sleep(0.2); print('alive')"
    event, stdout, _ = box.cell(code)
    assert (event["exit"]["code"], stdout, event["artifacts"]) == (0, b"alive\n", [])
