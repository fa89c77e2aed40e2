"""Runs as a process of its own, `python3 -I -S _shim.py FD`: starts one program and takes all of its tree down with it.

Bubblewrap's namespaces do that in the kernel. Where there are none the shim adopts what the program leaves behind
(`PR_SET_CHILD_SUBREAPER`), and ends everything once the program has ended or the leash, a pipe that its router holds, is let go.
It imports the standard library only, and little of it: its start-up is part of every run.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import resource
import select
import signal
import sys
from typing import Any

_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SECCOMP, _SUBREAPER, _DUMPABLE = 1, 38, 22, 36, 4
_FILTER = 2
_RESTRICT_SELF = 446
"""`landlock_restrict_self`, the same number on every machine."""
_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR)
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main(order_fd: int) -> None:
    """Runs the one program of the order, a marshalled dict in the file `order_fd`; `_shimmed.py` says what it holds."""
    with os.fdopen(order_fd, "rb") as file:
        order = marshal.load(file)  # noqa: S302 - written by the router that started this process
    for fd in (order["status"], order["leash"], *order["join"], *order["ruleset"]):
        os.set_inheritable(fd, False)
    _check(_libc.prctl(_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")
    # A program of the same user must not be able to look into it or to trace it.
    _check(_libc.prctl(_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    alarm, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    program, told = _start(order)
    # Its pipes are the program's alone from here on.
    nowhere = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    if told is None:
        _report(order, "child-pid", program)
        told = _attend(program, order["leash"], alarm, order["exact"])
    end_all()
    for directory in order["remove"]:
        _remove(directory)
    _report(order, *told)


def _report(order: dict[str, Any], key: str, value: int | str) -> None:
    text = (
        repr(value) if isinstance(value, int) else '"' + "".join(c if c.isalnum() or c in " ./:_-" else "?" for c in value) + '"'
    )
    try:
        os.write(order["status"], f'{{"{key}": {text}}}\n'.encode())
    except BrokenPipeError:
        return  # the router is gone


# --- the program ------------------------------------------------------------------------------------------


def _start(order: dict[str, Any]) -> tuple[int, tuple[str, int | str] | None]:
    """The program's process id, and what is to be told already where it could not be started."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    program = os.fork()
    if program == 0:
        _become(order, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as failure:
        said = failure.read().decode(errors="replace")
    if not said:
        return program, None
    stage, _, number = said.partition("=")
    if stage == "exec":
        return program, ("exited", 127 if int(number) in _NOT_FOUND else 126)
    return program, ("failed", said)


def _become(order: dict[str, Any], failure: int) -> None:
    stage = "setup"
    try:
        _confine(order)
        stage = "exec"
        os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606 - running code is the point
    except OSError as exc:
        os.write(failure, f"exec={exc.errno}".encode() if stage == "exec" else f"{stage}: {exc}".encode())
    finally:
        os._exit(127)


def _confine(order: dict[str, Any]) -> None:
    for name in ("SIGPIPE", "SIGXFSZ", "SIGCHLD"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.setsid()
    for fd in order["join"]:
        os.write(fd, b"0")
    for kind, amount in order["limits"]:
        hard = resource.getrlimit(kind)[1]
        allowed = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (allowed, allowed))
    if order["uid"] is not None:
        os.setgroups(())
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
    # After the change of user, which clears it: should the shim be killed, the program goes at least.
    _check(_libc.prctl(_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0), "PR_SET_PDEATHSIG")
    os.umask(0o022)
    for path, data in order["files"].items():
        _put(path, data)
    os.chdir(order["cwd"])
    _check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    for ruleset in order["ruleset"]:
        _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    if order["seccomp"] is not None:
        steps = ctypes.create_string_buffer(order["seccomp"], len(order["seccomp"]))
        program = _Program(len(order["seccomp"]) // 8, ctypes.addressof(steps))
        _check(_libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0), "PR_SET_SECCOMP")


def _put(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - pathlib would double the time to start
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _check(returned: int, call: str) -> None:
    if returned != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


# --- its end ----------------------------------------------------------------------------------------------


def _attend(program: int, leash: int, alarm: int, exact: bool) -> tuple[str, int]:
    """Returns how the program ended, or that it was killed when the leash was let go. What it orphans is reaped meanwhile."""
    poll = select.poll()
    poll.register(leash, 0)  # a hang-up is always told
    poll.register(alarm, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if alarm in ready:
            os.read(alarm, 4096)
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == program:
                return _ended(status, exact)
            if pid == 0:
                break
        if leash in ready:
            return ("signal", int(signal.SIGKILL))


def _ended(status: int, exact: bool) -> tuple[str, int]:
    if os.WIFSIGNALED(status):
        return ("signal", os.WTERMSIG(status))
    return ("exited" if exact else "exit-code", os.WEXITSTATUS(status))


def end_all() -> None:
    """Ends every descendant of this process: holds them still until no new one appears, then kills them. Reaps them all."""
    while _has_children():
        held: set[int] = set()
        while new := descendants() - held:
            _signal(new, signal.SIGSTOP)
            held |= new
        _signal(held, signal.SIGKILL)
        select.select([], [], [], 0.001)


def _has_children() -> bool:
    """Whether any lives, and with that any descendant: those whose parent ended became this process's own."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def descendants() -> set[int]:
    """Process ids of all that this process started, and that those started, and so on; as far as they live."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib would double the time to start
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:  # noqa: PTH123
                    fields = stat.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] != b"Z":
                parents[int(name)] = int(fields[1])
    found, generation = set[int](), {os.getpid()}
    while generation := {pid for pid, parent in parents.items() if parent in generation} - found:
        found |= generation
    return found


def _remove(directory: str) -> None:
    import shutil

    for place, names, _ in os.walk(directory):
        for name in names:
            path = f"{place}/{name}"
            if not os.path.islink(path):  # noqa: PTH114
                os.chmod(path, 0o700)  # noqa: PTH101 - the program may have taken its own permissions away
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
