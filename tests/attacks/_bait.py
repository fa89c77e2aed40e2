"""What the attacks are after, made for them: a home with a key, a `docker.sock`, listeners, and a process that stands for the router.

All of it lives in a mount namespace of its own, over directories of the machine that nobody else sees covered.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attrs

ROOT = os.geteuid() == 0
USER = 65001 if ROOT else os.geteuid()
"""The unprivileged user of the attacks outside: none that sandboxes get, unless it is the only one."""
PYTHON = "/usr/bin/python3"
DEVICES = ("/dev/fuse", "/dev/kvm", "/dev/kmsg")
PRIVATE = ["unshare", "--mount", "--propagation", "private"]
"""What starts a command in a mount namespace of its own."""
if not ROOT:
    PRIVATE += ["--user", "--map-current-user", "--keep-caps"]
_PRIVATE, _RECURSIVE, _BIND, _DETACH = 1 << 18, 1 << 14, 1 << 12, 2
_AMBIENT, _CLEAR_ALL = 47, 4
_libc = ctypes.CDLL(None, use_errno=True)


def as_user(user: int) -> dict[str, object]:
    """The arguments of `Popen` for a process of this user."""
    return {"user": user, "group": user, "extra_groups": []} if ROOT else {}


def mount(source: str, target: str, kind: str = "tmpfs", flags: int = 0, data: str = "") -> None:
    """Mounts a file system. Raises `OSError`."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


@attrs.frozen
class Bait:
    """What is there to be had.

    Attributes:
        token: What every bait says.
        top: A directory in memory; below it are `work`, for attacks outside, and `state`, for sandboxes.
        port: Of the listener on loopback.
    """

    token: str
    top: Path
    port: int

    @property
    def home(self) -> Path:
        """The home of the router's user."""
        return Path("/home/bait")

    @property
    def pieces(self) -> list[str]:
        """The token, so that it cannot be found where it is handed over."""
        return [self.token[:8], self.token[8:]]

    @property
    def paths(self) -> list[str]:
        """Files with the token that everybody may read, outside."""
        return [f"{self.home}/.ssh/id_ed25519", f"{self.home}/.aws/credentials", str(self.top / "secret")]

    @property
    def addresses(self) -> list[tuple[str, object]]:
        """Sockets with names, which answer with the token."""
        return [("AF_UNIX", "/run/docker.sock"), ("AF_UNIX", "/var/run/docker.sock"), ("AF_UNIX", f"{self.top}/socket")]

    @property
    def abstract(self) -> str:
        """The name of a socket that is in no directory."""
        return f"\0sandstorm-bait-{self.port}"


@contextmanager
def bait() -> Iterator[Bait]:
    """The bait. Call it in a mount namespace of your own."""
    mount("none", "/", "none", _PRIVATE | _RECURSIVE)
    top = Path(tempfile.mkdtemp(prefix="sandstorm-attacks-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, top, ignore_errors=True)
        mount("tmpfs", str(top), data="size=400m,mode=711")
        stack.callback(_libc.umount2, str(top).encode(), _DETACH)
        for place in ("/home", "/run"):
            mount("tmpfs", place, data="size=10m,mode=755")
        token = secrets.token_hex(8)
        made = Bait(token, top, _listen(stack, socket.AF_INET, ("127.0.0.1", 0), token))
        for path in made.paths:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(token)
        for path in (*made.home.rglob("*"), *map(Path, made.paths)):
            path.chmod(0o777 if path.is_dir() else 0o666)
        (top / "shadow").write_text(f"root:{token}:1:0:99999:7:::\n")
        (top / "shadow").chmod(0o644)
        mount(str(top / "shadow"), "/etc/shadow", "none", _BIND)
        _open_devices(top)
        # Who is not root has rights over these mounts alone, and hands them to nobody.
        _libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0)
        for name in ("/run/docker.sock", f"{top}/socket", made.abstract):
            _listen(stack, socket.AF_UNIX, name, token)
        for name in ("work", "state"):
            (top / name).mkdir()
        (top / "work").chmod(0o1777)
        yield made


def _open_devices(top: Path) -> None:
    """Lets everybody open devices that only root may, as far as their modes go. Nobody but root can."""
    for number, path in enumerate(filter(os.path.exists, DEVICES if ROOT else ())):
        node = top / f"device-{number}"
        os.mknod(node, stat.S_IFCHR | 0o666, Path(path).stat().st_rdev)
        node.chmod(0o666)
        mount(str(node), path, "none", _BIND)


def _listen(stack: ExitStack, family: int, address: object, token: str) -> int:
    """Answers whoever connects with the token, in the background; the port, if it has one."""
    listener = stack.enter_context(socket.socket(family))
    listener.bind(address)
    listener.listen()
    if isinstance(address, str) and address.startswith("/"):
        Path(address).chmod(0o666)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.sendall(token.encode())

    threading.Thread(target=serve, daemon=True).start()
    stack.callback(listener.shutdown, socket.SHUT_RDWR)
    return listener.getsockname()[1] if family == socket.AF_INET else 0


@contextmanager
def decoy(bait: Bait, user: int = USER) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the router: its command line and its variables hold the token, and SIGUSR1 ends it."""
    argv = [PYTHON, "-I", "-S", "-c", f"import time; print(1, flush=True); time.sleep(60)  # {bait.token}"]
    process = subprocess.Popen(argv, env={"KEY": bait.token}, cwd="/", stdout=subprocess.PIPE, **as_user(user))
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def datagrams(bait: Bait) -> Iterator[tuple[str, socket.socket]]:
    """A socket like that of a system's log: its path, and itself, which does not block."""
    path = bait.top / "datagrams"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        path.chmod(0o666)
        receiver.setblocking(False)
        try:
            yield str(path), receiver
        finally:
            path.unlink()
