"""A supervisor over its protocol, with real sandboxes and no router: programs, and how they end."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from sandstorm_provider_local._inside._wire import close_all, in_memory


def exit_of(answer):
    return answer[0]["exit"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def host_pids(workshop, name):
    """Processes in the groups of these supervisors that run the program `name`."""
    return [pid for pid in workshop.processes() if name.encode() in shown(pid, "cmdline")]


def shown(pid, name):
    """What the host shows of a process; nothing of one that has ended, or keeps its environment even from its own user."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def wait_until(condition):
    until = time.monotonic() + 10
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.005)
    return found


def write(client, process, data):
    fd = in_memory(data)
    try:
        return client.ask("write", (fd,), process=process)
    finally:
        os.close(fd)


def test_program_gives_its_streams_and_its_code(workshop):
    """What a program reads, writes and exits with arrives exactly."""
    box = workshop.box()
    event, stdout, stderr = box.run("sh", "-c", "cat; echo err >&2; exit 3", stdin=b"a\0b")
    assert (event["exit"], stdout, stderr) == ({"kind": "exited", "code": 3, "signal": None}, b"a\0b", b"err\n")


def test_environment_and_directory_are_those_of_the_request(workshop):
    """A program sees the environment of the box with its own on top, its own directory, and nothing else."""
    box = workshop.box(env={"PATH": "/usr/bin", "SECRET": "s3cret", "A": "1"})
    box.run("mkdir", "sub")
    script = "env | sort; pwd; umask; for fd in 0 1 2 3 4 5 6 7 8 9; do { true >&$fd; } 2>/dev/null && echo -n $fd; done"
    _, stdout, _ = box.run("sh", "-c", script, env={"A": "2"}, cwd="sub")
    *env, where, umask, fds = stdout.splitlines()
    assert env == [b"A=2", b"PATH=/usr/bin", b"PWD=/work/sub", b"SECRET=s3cret"]
    assert (where, umask, fds) == (b"/work/sub", b"0022", b"012")


def test_secrets_stand_in_no_command_line_and_no_environment_of_ours(workshop):
    """The environment of programs cannot be read off the supervisor, bubblewrap or the agent."""
    box = workshop.box(env={"PATH": "/usr/bin", "SECRET": "s3cret-value"})
    box.run("true")
    for pid in [workshop.supervisors[0].pid, *workshop.processes()]:
        for name in ("cmdline", "environ"):
            assert b"s3cret-value" not in shown(pid, name)


@pytest.mark.parametrize(("argv", "code"), [(["no-such-program"], 127), (["/etc/passwd"], 126)])
def test_program_that_cannot_be_run_ends_as_in_a_shell(workshop, argv, code):
    """127 where there is none, 126 where it cannot be executed, with a line on stderr."""
    event, _, stderr = workshop.box().run(*argv)
    assert event["exit"] == {"kind": "exited", "code": code, "signal": None}
    assert stderr.startswith(argv[0].encode())


def test_signals_are_told_from_codes(workshop):
    """A program that a signal ended, and one that exits with 128 + n, are different things."""
    box = workshop.box()
    assert exit_of(box.run("sh", "-c", "kill -TERM $$")) == {"kind": "signal", "code": None, "signal": 15}
    assert exit_of(box.run("sh", "-c", "exit 143")) == {"kind": "exited", "code": 143, "signal": None}


def test_a_signal_goes_to_the_program_itself(workshop):
    """`signal` reaches the program, which may handle it."""
    box = workshop.box()
    process = box.start("sh", "-c", "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.01; done")
    box.wait_output(process, b"ready")
    box.ask("signal", process=process, number=signal.SIGUSR1)
    event, stdout, _ = box.wait(process)
    assert (event["exit"]["code"], stdout) == (5, b"ready\ncaught\n")


def test_programs_start_with_default_signals(workshop):
    """What Python ignores for itself is not ignored by programs: a broken pipe ends them."""
    if not workshop.proc:
        pytest.skip("boxes have no /proc here, which alone shows what is ignored")
    box = workshop.box()
    _, stdout, _ = box.run("grep", "SigIgn", "/proc/self/status")
    assert int(stdout.split()[1], 16) & 0x7FFFFFFF == 0


def test_same_start_id_starts_once(workshop):
    """A repeated start is answered with the program that the first one started."""
    box = workshop.box()
    first = box.start("sh", "-c", "echo once >> log", start_id="s1")
    box.wait(first)
    assert box.start("sh", "-c", "echo once >> log", start_id="s1") == first
    assert box.run("cat", "log")[1] == b"once\n"


def test_large_requests_arrive_whole(workshop):
    """Arguments that fit into no packet travel as a file."""
    word = "x" * 100_000
    _, stdout, _ = workshop.box().run("printf", "%s", word, output_limit=1 << 20)
    assert stdout == word.encode()


def test_malformed_requests_are_refused_and_nothing_else_happens(workshop):
    """Wrong fields and unknown operations are answered with an error; the box goes on."""
    box = workshop.box()
    for op, fields in [("nothing", {}), ("start", {"argv": []}), ("start", {"argv": ["a\0b"]}), ("follow", {"process": "p9"})]:
        with pytest.raises(Exception, match=r"NotSupported|InvalidInput|FileNotFound"):
            box.ask(op, **{"timeout": 1, "output_limit": 1, **fields})
    assert exit_of(box.run("true"))["code"] == 0


# --- input ----------------------------------------------------------------------------------------------------


def test_interactive_program_is_written_to_until_its_input_is_closed(workshop):
    """Each write arrives, after what stdin held at the start; then the program sees the end."""
    box = workshop.box()
    process = box.start("cat", stdin=b"first ", interactive=True)
    write(box, process, b"second ")
    box.wait_output(process, b"first second ")
    write(box, process, b"third")
    box.ask("close_stdin", process=process)
    event, stdout, _ = box.wait(process)
    assert (event["exit"]["code"], stdout) == (0, b"first second third")


def test_write_waits_for_a_program_that_does_not_read(workshop):
    """A write is answered once all of it is in the pipe, and with an error once it cannot be any more."""
    box = workshop.box()
    process = box.start("sh", "-c", "sleep 0.2; head -c 300000 | wc -c", interactive=True)
    begun = time.monotonic()
    write(box, process, b"x" * 300_000)
    assert time.monotonic() - begun > 0.1
    assert box.wait(process)[1].strip() == b"300000"
    with pytest.raises(Exception, match="Conflict"):
        write(box, process, b"more")


def test_write_to_a_program_that_does_not_read_any_more_fails(workshop):
    """Nothing of ours keeps the other end of stdin: soon after the program has closed it, a write is refused."""
    box = workshop.box()
    script = "exec <&-; echo closed; sleep 60"
    for _ in range(3):
        process = box.start("sh", "-c", script, interactive=True)
        box.wait_output(process, b"closed")
        until = time.monotonic() + 5
        with pytest.raises(Exception, match="Conflict"):
            while time.monotonic() < until:  # its keeper lets go of it while the program runs already
                write(box, process, b"x")


def test_terminal_has_a_size_and_is_resized(workshop):
    """A program with a terminal reads its size, sees it change, and its output is all stdout."""
    box = workshop.box()
    script = "test -t 0 && test -t 2 && stty size; read line; echo got $line >&2; stty size; tty"
    process = box.start("sh", "-c", script, terminal=[80, 24])
    box.wait_output(process, b"24 80")
    box.ask("resize", process=process, columns=100, rows=30)
    write(box, process, b"hello\n")
    event, stdout, stderr = box.wait(process)
    assert event["exit"]["code"] == 0
    assert stdout.split() == [b"24", b"80", b"hello", b"got", b"hello", b"30", b"100", b"/dev/pts/0"]
    assert stderr == b""


def test_interrupt_typed_into_a_terminal_ends_its_program(workshop):
    """Control-C reaches the foreground program, since the terminal is its own."""
    box = workshop.box()
    process = box.start("sh", "-c", "echo ready; exec sleep 100", terminal=[80, 24])
    box.wait_output(process, b"ready")
    write(box, process, b"\x03")
    assert exit_of(box.wait(process)) == {"kind": "signal", "code": None, "signal": 2}


# --- limits ---------------------------------------------------------------------------------------------------


def test_deadline_ends_the_whole_tree(workshop):
    """At its deadline a program dies with its daemons, and the exit names the deadline."""
    box = workshop.box()
    answer = box.run("sh", "-c", "setsid sh -c 'setsid sleep 98765 & sleep 98765' & sleep 98765", timeout=0.4)
    assert exit_of(answer)["kind"] == "deadline"
    wait_until(lambda: not host_pids(workshop, "98765"))


def test_output_limit_ends_the_flood(workshop):
    """What is kept is exactly the limit, stdout and stderr together; a program that writes just as much is let be."""
    box = workshop.box()
    event, stdout, stderr = box.run("sh", "-c", "yes & yes >&2", output_limit=100_000)
    assert event["exit"]["kind"] == "output-limit"
    assert len(stdout) + len(stderr) == 100_000
    assert exit_of(box.run("head", "-c", "100000", "/dev/zero", output_limit=100_000))["kind"] == "exited"


def test_memory_of_one_program_is_limited(workshop):
    """A program that takes more than the memory of its box is killed, and the exit says why; the box goes on."""
    if workshop.hierarchy is None:
        pytest.skip("no control groups can be made here")
    box = workshop.box(limits={"memory": 64})
    # A program that starts while the kernel still takes the last one down is not at fault, whenever somebody looks.
    for milliseconds in range(0, 200, 20):
        answer = box.run("python3", "-c", f"import time; time.sleep({milliseconds / 1000}); x = b'x' * (300 << 20)")
        assert exit_of(answer) == {"kind": "out-of-memory", "code": None, "signal": 9}
        assert exit_of(box.run("sleep", "0.05")) == {"kind": "exited", "code": 0, "signal": None}


def test_memory_that_the_kernel_grants_for_files_is_no_memory_for_programs(workshop):
    """Within the kernel's limit, which covers files too, the watch ends a program that uses more than its memory."""
    if workshop.hierarchy is None:
        pytest.skip("no control groups can be made here")
    box = workshop.box(limits={"memory": 64, "disk": 256})
    answer = box.run("python3", "-c", "import time; x = b'x' * (150 << 20); time.sleep(60)")
    assert exit_of(answer)["kind"] == "out-of-memory"
    assert exit_of(box.run("dd", "if=/dev/zero", "of=file", "bs=1M", "count=150", "status=none"))["code"] == 0


def test_many_files_fill_the_disk_and_no_more(workshop):
    """The work area ends at its size, however many files it is spread over."""
    script = "for i in $(seq 100); do head -c 1000000 /dev/zero > f$i || exit 9; done"
    event, _, stderr = workshop.box(limits={"disk": 8}).run("sh", "-c", script)
    assert event["exit"]["code"] == 9
    assert b"No space left" in stderr


def test_fork_bomb_is_killed(workshop):
    """A tree that multiplies as fast as it can is killed whole, and the box can be used afterwards."""
    box = workshop.box()
    assert exit_of(box.run("sh", "-c", "f() { f | f & }; f & exec sleep 60", timeout=0.5))["kind"] == "deadline"
    assert exit_of(box.run("true"))["code"] == 0


def test_limit_of_processes_is_the_boxs_own(workshop):
    """Without groups, a box may have so many processes and no more, however many there are in other boxes of the same user."""
    if release() < (5, 14):
        pytest.skip("this kernel (before 5.14) counts the processes of a user together, whatever their namespace")
    crowd = "for i in $(seq 40); do sleep 98761 & done; jobs -p | wc -l"
    first = workshop.box(cgroup=None, max_tasks=60)
    assert first.run("bash", "-c", crowd)[1].split() == [b"40"]
    second = workshop.box(cgroup=None, max_tasks=30)
    assert exit_of(second.run("true"))["code"] == 0
    _, _, stderr = second.run("bash", "-c", crowd, timeout=5.0)
    assert b"Resource temporarily unavailable" in stderr
    assert len(workshop.commands(second, b"sleep")) < 30
    assert len(workshop.commands(first, b"sleep")) == 40


def release():
    """The version of the kernel."""
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


# --- the end --------------------------------------------------------------------------------------------------


def test_background_children_live_on_and_a_kill_ends_them(workshop):
    """A daemon delays no exit, though it holds the pipes; `kill` of its program ends it at once, and waits for that."""
    box = workshop.box()
    process = box.start("sh", "-c", "setsid sleep 98764 & echo started")
    begun = time.monotonic()
    event, stdout, _ = box.wait(process)
    assert (event["exit"]["code"], stdout) == (0, b"started\n")
    assert time.monotonic() - begun < 5
    wait_until(lambda: host_pids(workshop, "98764"))
    box.ask("kill", process=process)
    assert host_pids(workshop, "98764") == []


def test_killed_program_has_ended_when_the_answer_comes(workshop):
    """A kill is answered when the whole tree is dead, and the exit is a kill; a second one succeeds as well."""
    box = workshop.box()
    process = box.start("sh", "-c", "sleep 98763 & sleep 98763")
    wait_until(lambda: len(host_pids(workshop, "98763")) >= 2)
    box.ask("kill", process=process)
    assert host_pids(workshop, "98763") == []
    assert exit_of(box.wait(process)) == {"kind": "signal", "code": None, "signal": 9}
    box.ask("kill", process=process)


def test_program_that_kills_its_keeper_gains_nothing(workshop):
    """Whoever ends what looks after him ends himself, and what he left behind."""
    box = workshop.box()
    for number in ("9", "19"):
        answer = box.run("sh", "-c", f"setsid sleep 98762 & kill -{number} $PPID; sleep 98762", timeout=1.0)
        assert exit_of(answer)["signal"] == 9
    wait_until(lambda: not host_pids(workshop, "98762"))
    assert exit_of(box.run("true"))["code"] == 0


def test_agent_cannot_be_killed_or_read_from_inside(workshop):
    """No program can signal the first process of its box, nor look into it."""
    box = workshop.box()
    script = "for s in 1 2 9 15 19; do kill -$s 1; done; cat /proc/1/environ; ls /proc/1/fd; ls /proc/$PPID/fd"
    _, stdout, stderr = box.run("sh", "-c", script)
    assert (stdout, stderr.count(b"ermission denied")) == (b"", 3 if workshop.proc else 0)
    assert exit_of(box.run("true"))["code"] == 0


def test_attached_programs_end_with_their_connection(workshop):
    """A second connection's program dies when it closes; a detached one goes on, and is followed from elsewhere."""
    box = workshop.box()
    other = workshop.attach(box)
    attached = other.start("sh", "-c", "sleep 98761 & sleep 98761")
    detached = other.start("sh", "-c", "sleep 0.5; echo done", detached=True)
    other.close()
    assert exit_of(box.wait(attached)) == {"kind": "signal", "code": None, "signal": 9}
    wait_until(lambda: not host_pids(workshop, "98761"))
    assert box.wait(detached)[1] == b"done\n"


def test_agent_that_dies_is_told(workshop):
    """Where the sandbox ends by itself, every router hears of it and nothing is left."""
    box = workshop.box()
    os.kill(box.ask("hello")["agent_pid"], signal.SIGKILL)
    assert box.rest()[-1]["reason"] == "lost"


def test_sandbox_that_does_not_come_up_says_why(workshop):
    """What bubblewrap complains about reaches the router."""
    box = workshop.create(fds=[], rlimits=[[7, 5]])
    with pytest.raises(EOFError):
        box.ask("hello")
    assert "did not come up" in box.events[-1]["error"]


def test_directory_is_for_its_owner_only_and_its_record_names_the_supervisor(workshop):
    """Nobody else gets in, and whoever finds the box can tell whether its supervisor lives."""
    box = workshop.box()
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (box.directory, box.directory / "out")] == [0, 0]
    record = json.loads((box.directory / "record.json").read_text())
    assert record["pid"] == workshop.supervisors[0].pid
    assert f"-{record['pid']}-" in record["owner"]


def test_what_writes_nothing_has_no_files(workshop):
    """A silent program costs no file, nor does one that could not be started, and both leave the box as it was."""
    box = workshop.box()
    event, *_ = box.run("true")
    assert event["exit"] == {"kind": "exited", "code": 0, "signal": None}
    with pytest.raises(Exception, match="InvalidInput"):
        box.start("true", terminal=["wide", "high"])
    assert list((box.directory / "out").iterdir()) == []
    assert box.run("sh", "-c", "echo late >&2")[1:] == (b"", b"late\n")


def test_old_output_is_dropped_beyond_a_size(workshop):
    """Of what ended programs wrote, the oldest goes once it is more than 256 MiB together."""
    box = workshop.box()
    first = box.start("head", "-c", "200M", "/dev/zero", output_limit=1 << 30)
    box.ask("follow", process=first)
    box.event("exit", first)
    second = box.start("head", "-c", "100M", "/dev/zero", output_limit=1 << 30)
    box.ask("follow", process=second)
    box.event("exit", second)
    assert box.ask("hello")["finished"] == [second]
    assert not (box.directory / "out" / first).exists()
    close_all(box.fds)
    box.fds = []
