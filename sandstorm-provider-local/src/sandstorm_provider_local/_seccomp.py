"""The system call filter, as a classic BPF program for `bwrap --seccomp`.

It takes away what a program in a sandbox has no use for and what kernel escapes are made of. The numbers are those of
the kernel's `unistd.h` for each machine.
"""

from __future__ import annotations

import errno
import struct

import attrs

_BY_MACHINE_INDEPENDENT_NUMBER = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "open_tree_attr": 467,
}

_X86_64 = {
    "ptrace": 101,
    "syslog": 103,
    "uselib": 134,
    "sysfs": 139,
    "vhangup": 153,
    "modify_ldt": 154,
    "pivot_root": 155,
    "sysctl": 156,
    "adjtimex": 159,
    "chroot": 161,
    "acct": 163,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "iopl": 172,
    "ioperm": 173,
    "create_module": 174,
    "init_module": 175,
    "delete_module": 176,
    "quotactl": 179,
    "nfsservctl": 180,
    "lookup_dcookie": 212,
    "clock_settime": 227,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "migrate_pages": 256,
    "unshare": 272,
    "move_pages": 279,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
}

_AARCH64 = {
    "lookup_dcookie": 18,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "nfsservctl": 42,
    "chroot": 51,
    "vhangup": 58,
    "quotactl": 60,
    "acct": 89,
    "unshare": 97,
    "kexec_load": 104,
    "init_module": 105,
    "delete_module": 106,
    "clock_settime": 112,
    "syslog": 116,
    "ptrace": 117,
    "reboot": 142,
    "settimeofday": 170,
    "adjtimex": 171,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
    "swapon": 224,
    "swapoff": 225,
    "migrate_pages": 238,
    "move_pages": 239,
    "perf_event_open": 241,
    "fanotify_init": 262,
    "name_to_handle_at": 264,
    "open_by_handle_at": 265,
    "clock_adjtime": 266,
    "setns": 268,
    "process_vm_readv": 270,
    "process_vm_writev": 271,
    "kcmp": 272,
    "finit_module": 273,
    "bpf": 280,
    "userfaultfd": 282,
    "kexec_file_load": 294,
}


@attrs.frozen(kw_only=True)
class _Machine:
    audit_arch: int
    clone: int
    socket: int
    ioctl: int
    denied: dict[str, int]


_MACHINES = {
    "x86_64": _Machine(audit_arch=0xC000003E, clone=56, socket=41, ioctl=16, denied=_X86_64),
    "aarch64": _Machine(audit_arch=0xC00000B7, clone=220, socket=198, ioctl=29, denied=_AARCH64),
}

_CLONE3 = 435
_CLONE_NEW = 0x7E020080
"""CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
_TERMINAL_INJECTION = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: both type into the terminal that the router may share."""
_FAMILIES = (1, 2, 10, 16)
"""Unix, IPv4, IPv6 and netlink. Of the others, AF_VSOCK is not bound to a network namespace at all."""
_HOST_IPC = {
    "x86_64": (29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 220, 240, 241),
    "aarch64": (180, 181, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196),
}
"""System V shared memory, semaphores and queues, and POSIX queues: without a namespace of its own, those of the host."""
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_CONNECTED_TYPES = (1, 5)
"""SOCK_STREAM and SOCK_SEQPACKET. One of a pair of datagram sockets could still send to any other socket by its path."""
_TYPE_MASK = 0xF
_X32 = 0x40000000

_KILL = 0x80000000
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _refuse(error: int) -> bytes:
    return _step(_RETURN, _ERRNO | error)


def seccomp_filter(machine: str, *, namespaces: bool = True) -> bytes | None:
    """The filter for `machine` (as `platform.machine()` names it), or None where there is no table for it.

    Without `namespaces` of its own a program would reach the host's network and IPC: sockets and IPC are refused altogether.
    """
    table = _MACHINES.get(machine)
    if table is None:
        return None
    allow = _step(_RETURN, _ALLOW)
    steps = [_step(_LOAD, _ARCH), _step(_EQUAL, table.audit_arch, 1), _step(_RETURN, _KILL), _step(_LOAD, _NUMBER)]
    if machine == "x86_64":
        steps += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _KILL)]
    families = _FAMILIES if namespaces else ()
    shared = () if namespaces else _HOST_IPC[machine]
    for number in sorted({*table.denied.values(), *_BY_MACHINE_INDEPENDENT_NUMBER.values(), *shared}):
        steps += [_step(_EQUAL, number, 0, 1), _refuse(errno.EPERM)]
    # clone3 hides its flags behind a pointer that a filter cannot follow; C libraries fall back to clone.
    steps += [_step(_EQUAL, _CLONE3, 0, 1), _refuse(errno.ENOSYS)]
    steps += [_step(_EQUAL, table.clone, 0, 4), _step(_LOAD, _ARGUMENT_0), _step(_ANY_BIT, _CLONE_NEW, 0, 1)]
    steps += [_refuse(errno.EPERM), allow]
    steps += [_step(_EQUAL, table.ioctl, 0, 5), _step(_LOAD, _ARGUMENT_1)]
    steps += [_step(_EQUAL, request, 2 - index) for index, request in enumerate(_TERMINAL_INJECTION)]
    steps += [allow, _refuse(errno.EPERM)]
    if not namespaces:
        steps += [_step(_EQUAL, _SOCKETPAIR[machine], 0, 6), _step(_LOAD, _ARGUMENT_1), _step(_AND, _TYPE_MASK)]
        steps += [_step(_EQUAL, kind, 2 - index) for index, kind in enumerate(_CONNECTED_TYPES)]
        steps += [_refuse(errno.EAFNOSUPPORT), allow]
    steps += [_step(_EQUAL, table.socket, 0, len(families) + 2), _step(_LOAD, _ARGUMENT_0)]
    steps += [_step(_EQUAL, family, len(families) - index) for index, family in enumerate(families)]
    steps += [_refuse(errno.EAFNOSUPPORT), allow]
    return b"".join(steps)
