"""The attacks, one function each: `python3 -I -S _probes.py NAME PARAMETERS`, the same program inside of a sandbox and outside.

Each tries one thing and returns what it got, which `main` prints as JSON: nothing where it got nothing. It imports the
standard library only, runs on Python 3.9 or later, and what could hurt the machine outside has a bound in its parameters.
"""
# ruff: noqa: PTH208, PTH115, PTH118, PTH109 - paths of attacks are text, which goes to the kernel as it is

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import struct
import sys
import time

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
MIB = 1 << 20
CALLS = {
    "x86_64": {"clone": 56, "ptrace": 101, "bpf": 321, "userfaultfd": 323, "keyctl": 250, "process_vm_readv": 310, "capget": 125},
    "aarch64": {
        "clone": 220,
        "ptrace": 117,
        "bpf": 280,
        "userfaultfd": 282,
        "keyctl": 219,
        "process_vm_readv": 270,
        "capget": 90,
    },
}[os.uname().machine]
IO_URING_SETUP, CLONE3, PIDFD_OPEN, PIDFD_GETFD = 425, 435, 434, 438

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    """What a system call returned; raises `OSError`."""
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    returned = libc.syscall(ctypes.c_long(number), *given)
    if returned < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return returned


def attempt(got, name, work, *arguments):
    """Adds what `work` returned to `got`, unless it was refused."""
    try:
        found = work(*arguments)
    except (OSError, ValueError) as error:
        return f"{name}: {error}"
    if found is not None and found is not False:
        got.append(f"{name}: {found}")
    return None


def in_child(work):
    """Whether `work` succeeds in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno & 255 or 1)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if status:
        raise OSError(os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EPERM, f"the child ended with {status}")
    return "done"


def contents(path):
    with pathlib.Path(path).open("rb") as file:
        return file.read(1 << 16).decode(errors="replace")


def processes():
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


# --- what others have -------------------------------------------------------------------------------------------------


def read(paths, token, **_):
    """Files of the host, by every way to its root that there may be."""
    got, roots = [], ["", "/proc/self/root", "/proc/1/root", "/proc/1/cwd/..", f"/proc/{os.getppid()}/root", "../../../../../.."]
    for path in paths:
        for root in roots:
            attempt(got, root + path, lambda place: contents(place) if token in contents(place) else None, root + path)
    return got


def environment(token, **_):
    """Variables: its own, and those of every process that it may look into."""
    got = [f"{name}={value}" for name, value in os.environ.items() if token in value]
    for pid in processes():
        attempt(got, f"process {pid}", lambda pid: token if token in contents(f"/proc/{pid}/environ") else None, pid)
    return got


def command_lines(token, **_):
    """Processes of the host, by their command lines."""
    got = []
    for pid in processes():
        attempt(got, f"process {pid}", lambda pid: token if token in contents(f"/proc/{pid}/cmdline") else None, pid)
    return got


def see(pid, token, **_):
    """A process of the host by its number."""
    got = []
    attempt(got, "stat", lambda: token in contents(f"/proc/{pid}/cmdline") or None)
    return got


def connect(addresses, token, **_):
    """Sockets of the host; who listens there answers with the token."""
    got = []

    def greet(kind, address):
        with socket.socket(getattr(socket, kind)) as probe:
            probe.settimeout(2)
            probe.connect(tuple(address) if isinstance(address, list) else address)
            return token if token in probe.recv(100).decode() else None

    for kind, address in addresses:
        attempt(got, f"{kind} {address!r}", greet, kind, address)
    return got


def datagram(address, token, **_):
    """A datagram socket of the host, to which nobody need be connected: whoever listens there tells whether it came."""
    got = []

    def throw(pair):
        near = pair[0]
        near.sendto(token.encode(), address)
        return "sent"

    attempt(got, "socket", lambda: throw([socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)]))
    attempt(got, "pair", lambda: throw(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)))
    return got


def kill(pid, **_):
    """Ends a process of the host by its number; whether it ended is seen from outside."""
    got = []
    attempt(got, "kill", lambda: os.kill(pid, signal.SIGUSR1) or "sent")

    def through_descriptor():
        fd = call(PIDFD_OPEN, pid, 0)
        signal.pidfd_send_signal(fd, signal.SIGUSR1)
        return "sent"

    attempt(got, "pidfd", through_descriptor)
    return []


# --- the kernel -------------------------------------------------------------------------------------------------------


def namespaces(**_):
    """A user namespace, in which one has all capabilities."""
    got = []

    def unshare():
        if libc.unshare(NEW_USER) != 0:
            raise OSError(ctypes.get_errno(), "unshare")

    def clone():
        pid = call(CALLS["clone"], NEW_USER | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def clone3():
        arguments = struct.pack("=8Q", NEW_USER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
        pid = call(CLONE3, arguments, len(arguments))
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    for work in (unshare, clone, clone3):
        attempt(got, work.__name__, in_child, work)
    return got


def mount(**_):
    """A file system over /tmp, which would be everybody's."""
    got = []

    def plainly():
        if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) != 0:
            raise OSError(ctypes.get_errno(), "mount")

    def in_namespace():
        if libc.unshare(NEW_USER | NEW_MOUNTS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        plainly()

    for work in (plainly, in_namespace):
        attempt(got, work.__name__, in_child, work)
    return got


def io_uring(**_):
    """The interface of which most of the kernel's escapes were made."""
    got = []
    attempt(got, "io_uring_setup", lambda: call(IO_URING_SETUP, 4, ctypes.create_string_buffer(120)))
    return got


def userfaultfd(**_):
    """Faults that stop the kernel halfway, for whoever exploits a race; also in the form for user space alone."""
    got = []
    for flags in (0, 1):
        attempt(got, f"flags {flags}", lambda flags: call(CALLS["userfaultfd"], flags), flags)
    return got


def trace(**_):
    """Another process of the same user, stopped and read."""
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    got = []
    attempt(got, "attach", lambda: call(CALLS["ptrace"], 16, child, 0, 0) == 0)
    buffer = ctypes.create_string_buffer(8)
    near = struct.pack("=QQ", ctypes.addressof(buffer), 8)
    attempt(got, "read", lambda: call(CALLS["process_vm_readv"], child, near, 1, near, 1, 0))

    def take():
        fd = call(PIDFD_OPEN, child, 0)
        return call(PIDFD_GETFD, fd, 1, 0)

    attempt(got, "descriptor", take)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return got


def bpf_is_there():
    """Whether the kernel answers at all, even if only that nobody has attributes of a megabyte."""
    try:
        call(CALLS["bpf"], 0, bytes(MIB), MIB)
    except OSError as error:
        return error.errno != errno.EPERM and os.strerror(error.errno)
    return True


def bpf(**_):
    """A program or a map in the kernel."""
    got, attributes = [], struct.pack("=5I", 2, 4, 8, 1, 0) + bytes(100)
    try:
        got.append(f"map {call(CALLS['bpf'], 0, attributes, len(attributes))}")
    except OSError:
        # Where only the rights are missing, the kernel looks at the size of the attributes before it looks at them.
        attempt(got, "refused by the kernel", bpf_is_there)
    return got


def keyring(**_):
    """Keys of the user, which are in no namespace."""
    got = []
    attempt(got, "keyctl", lambda: call(CALLS["keyctl"], 0, -3, 1))
    return got


def sockets(families, **_):
    """Families of sockets that are in no namespace, or of much attacked code."""
    got = []

    def make(family):
        with socket.socket(
            family,
            socket.SOCK_STREAM
            if family == 40
            else socket.SOCK_RAW
            if family == 17
            else socket.SOCK_SEQPACKET
            if family == 38
            else socket.SOCK_DGRAM,
        ):
            return "made"

    for family in families:
        attempt(got, str(family), make, family)
    return got


def unfiltered(**_):
    """What the kernel says of this process: whether it is not filtered, may gain rights, or has some."""
    sets = (ctypes.c_uint32 * 6)(*[1] * 6)
    call(CALLS["capget"], (ctypes.c_uint32 * 2)(0x20080522, 0), sets)
    wanted = {
        "filter": (libc.prctl(21, 0, 0, 0, 0), 2),
        "no new rights": (libc.prctl(39, 0, 0, 0, 0), 1),
        "rights": (any((*sets[0:2], *sets[3:5])), False),
    }
    return [f"{name}: {found}" for name, (found, right) in wanted.items() if found != right]


def terminal_input(**_):
    """Typing into a terminal: the one that it has, and one of its own."""
    got = []

    def type_into(fd):
        fcntl.ioctl(fd, 0x5412, b"x")
        return "typed"

    def own():
        slave = os.openpty()[1]
        os.setsid()
        fcntl.ioctl(slave, 0x540E, 0)
        type_into(slave)

    attempt(got, "standard input", type_into, 0)
    attempt(got, "own", in_child, own)
    return got


def devices(paths, **_):
    """Devices of the host, and devices that are made here."""
    got = []

    def look(path):
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return "opened"

    def make(name, kind, major, minor):
        os.mknod(name, kind | 0o600, os.makedev(major, minor))
        try:
            return look(name)
        finally:
            pathlib.Path(name).unlink()

    for path in paths:
        attempt(got, path, look, path)
    attempt(got, "log", make, "log", 0o020000, 1, 11)
    attempt(got, "disk", make, "disk", 0o060000, 254, 0)
    return got


def settings(**_):
    """Files with which the kernel, the control groups or the system are changed; they are opened and not written."""
    got, places = [], ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/etc/passwd"]
    for top, _, names in os.walk("/sys/fs/cgroup"):
        places += [f"{top}/{name}" for name in names if name in ("cgroup.procs", "release_agent", "memory.limit_in_bytes")]
        if len(places) > 50:
            break
    for path in places:
        attempt(got, path, lambda path: os.close(os.open(path, os.O_WRONLY)) or "opened", path)
    for path in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/run", "/run/sandstorm"):
        attempt(got, path, lambda path: os.close(os.open(path, os.O_TMPFILE | os.O_WRONLY)) or "written", path)
    return got


# --- more than its share ----------------------------------------------------------------------------------------------


def hold(megabytes):
    data = bytearray(megabytes * MIB)
    for page in range(0, len(data), 4096):
        data[page] = 1
    return data


def memory(megabytes, seconds, **_):
    """Memory in one process, for a while."""
    try:
        held = hold(megabytes)
    except MemoryError:
        return []
    time.sleep(seconds)
    return [f"{len(held) // MIB} MiB"]


def memory_of_many(megabytes, children, seconds, **_):
    """Memory in many processes at once, each of which has little."""
    pids = []
    for _ in range(children):
        pid = os.fork()
        if pid == 0:
            held = hold(megabytes)
            time.sleep(seconds)
            os._exit(0 if held else 1)
        pids.append(pid)
    ended = [os.waitpid(pid, 0)[1] for pid in pids]
    return [f"{children} x {megabytes} MiB"] if not any(ended) else []


def fill(directory, files, size):
    """Bytes that files of `size` bytes take in a directory, until there is no more room; they are removed again."""
    written, made = 0, []
    try:
        for number in range(files):
            path = os.path.join(directory, f"attack-{os.getpid()}-{number}")
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            made.append(path)
            try:
                while size > os.fstat(fd).st_size:
                    written += os.write(fd, bytes(min(size, 1 << 16)))
            finally:
                os.close(fd)
    except OSError:
        pass
    finally:
        for path in made:
            pathlib.Path(path).unlink()
    return written


def disk(files, directories=("",), **_):
    """Disk by many files of one megabyte each."""
    return [f"{place or 'work'}: {files} MiB" for place in directories if fill(place or os.getcwd(), files, MIB) >= files * MIB]


def one_file(megabytes, **_):
    """Disk by a single file, also where it has holes."""
    got = []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if fill(os.getcwd(), 1, megabytes * MIB) >= megabytes * MIB:
        got.append("written")
    return got


def forks(processes, **_):
    """Processes, all of them at once."""
    pids = []
    try:
        while len(pids) < processes:
            pids.append(os.posix_spawn("/bin/sleep", ["sleep", "20"], {}))
    except OSError:
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [f"{len(pids)} processes"] if len(pids) == processes else []


def flood(megabytes, **_):
    """Output; how much of it arrives is seen from outside."""
    for _ in range(megabytes):
        os.write(1, b"x" * MIB)
    return []


def daemons(name, **_):
    """Programs that leave their parent, their session and their group, ignore signals and keep the output open."""
    for number in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv("/bin/sh", [name, "-c", f"trap '' TERM HUP INT; sleep 30; : {number}"])
            os._exit(0)
    sys.stdout.write("they run\n")
    sys.stdout.flush()
    time.sleep(20)
    return []


# --- what runs it -----------------------------------------------------------------------------------------------------


def custodians(pid, pids=None, **_):
    """The processes that look after it, and the router: their memory, files, variables and directories."""
    got = []
    for each in pids or sorted({1, pid, *processes(), os.getppid()} - {0, os.getpid()}):
        place = f"/proc/{each}"
        attempt(got, f"{each} memory", lambda place: os.close(os.open(f"{place}/mem", os.O_RDWR)) or "opened", place)
        attempt(got, f"{each} variables", lambda place: len(contents(f"{place}/environ")) or "none", place)
        attempt(got, f"{each} root", lambda place: os.readlink(f"{place}/root"), place)
        attempt(got, f"{each} files", lambda place: os.listdir(f"{place}/fd"), place)
        attempt(got, f"{each} map", lambda place: contents(f"{place}/maps")[:40] or None, place)

        def take(target):
            fd = call(PIDFD_OPEN, target, 0)
            return [number for number in range(64) if call(PIDFD_GETFD, fd, number, 0) >= 0]

        attempt(got, f"{each} descriptor", take, each)
    return got


def inherited(**_):
    """Open files beyond the standard ones, over which orders or lies could be sent."""
    return [
        f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}"
        for fd in range(3, 256)
        if pathlib.Path(f"/proc/self/fd/{fd}").exists() and opened(fd)
    ]


def opened(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


PROBES = {
    work.__name__.replace("_", "-"): work
    for work in (
        read,
        environment,
        command_lines,
        see,
        connect,
        datagram,
        kill,
        namespaces,
        mount,
        io_uring,
        userfaultfd,
        trace,
        bpf,
        keyring,
        sockets,
        unfiltered,
        terminal_input,
        devices,
        settings,
        memory,
        memory_of_many,
        disk,
        one_file,
        forks,
        flood,
        daemons,
        custodians,
        inherited,
    )
}


def main(name, parameters):
    """Prints what the attack got. What it looks for comes in pieces, so that it does not find its own command line."""
    given = json.loads(parameters)
    got = PROBES[name](**{**given, "token": "".join(given.get("token", ()))})
    sys.stdout.write("\n" + json.dumps({"got": [str(each) for each in got]}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
