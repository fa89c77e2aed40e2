"""Prepared environments: made once, kept by what they contain, shared by every router on this machine.

A directory holds one entry for each, named by its key, and a lock file beside it. Whoever makes or removes an entry holds that lock
alone; whoever uses one holds it together with the others. So two routers never make the same twice, nothing in use is removed, and
what a killed router had begun is known by a lock that nobody holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from sandstorm.provider import Environment, InvalidSpec, PreparationFailed
from sandstorm_provider_local._image import REMEDY, image_identity, parse_reference, unpack_image
from sandstorm_provider_local._layers import Allowance
from sandstorm_provider_local._lease import Lease, lock_path, locked
from sandstorm_provider_local._limits import ENVIRONMENTS_DISK, IMAGE_DISK
from sandstorm_provider_local._packages import (
    INSTALLED_BY,
    NO_NPM,
    NO_UV,
    NODE_MODULES,
    PYTHON_PACKAGES,
    Bench,
    InstallLimits,
    OnLine,
    Packages,
    find_npm,
    find_packages,
    find_uv,
    install,
)
from sandstorm_provider_local._removal import remove_tree

_FORMAT = 1
_MIB = 1024 * 1024
_LOOK_AGAIN = 0.05
_RECORD = "environment.json"
_TREE = "tree"


@attrs.frozen(kw_only=True)
class Prepared:
    """An environment as a sandbox uses it.

    Attributes:
        key: Its name.
        binds: Host directories and where they appear inside, read-only.
        env: Environment variables of every program; those of a sandbox's own outrank them.
        paths: Directories inside that come first on the search path of programs.
        root: The host directory of a root file system for `system_arguments`, or None for the host's own.
        workdir: The working directory that the image names, or None. It is not applied.
        lease: Keeps it; to be closed by whoever uses it.
    """

    key: str
    binds: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = attrs.field(factory=dict)
    paths: tuple[str, ...] = ()
    root: str | None = None
    workdir: str | None = None
    lease: Lease


@attrs.frozen(kw_only=True)
class EnvironmentLimits:
    """What environments may take: `total` and `image` in MiB of disk, and the limits of one installation."""

    total: int = ENVIRONMENTS_DISK
    image: int = IMAGE_DISK
    install: InstallLimits = attrs.field(factory=InstallLimits)


def needs_preparation(environment: Environment) -> bool:
    """Whether there is anything to prepare."""
    return environment.image is not None or bool(environment.requirements)


def objections(environment: Environment, installers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each rule that forbids to prepare it here, with its reason and remedy; `installers` is what `find_installers` found."""
    if environment.image is not None and parse_reference(environment.image) is None:
        yield "image", f"{environment.image}: {REMEDY}"
    if environment.image is not None and environment.requirements:
        yield "requirements", "packages are not added to an image; install them in the image, or leave it out"
    elif environment.requirements:
        installer = INSTALLED_BY.get(environment.language or "")
        if installer is None:
            yield "requirements", f"packages of {environment.language or 'no language'} are not installed here; use an image"
        elif installer not in installers:
            yield "requirements", NO_NPM if installer == "npm" else NO_UV


def find_installers(path: str, uv: str | None) -> dict[str, str]:
    """The installers that are there, by name; `path` is the search path of sandboxes, `uv` the setting."""
    found = {"uv": find_uv(uv), "npm": find_npm(path)}
    return {name: place for name, place in found.items() if place is not None}


class Environments:
    """The environments in one directory. `programs` and `path` are those of the runtimes, `uv` is the setting."""

    def __init__(
        self,
        directory: Path,
        *,
        programs: Mapping[str, str],
        path: str,
        uv: str | None = None,
        limits: EnvironmentLimits | None = None,
    ) -> None:
        self._directory = directory
        self._programs = programs
        self._path = path
        self._uv = uv
        self._limits = limits or EnvironmentLimits()

    # --- what there is ------------------------------------------------------------------------------------

    def key(self, environment: Environment) -> str:
        """Its name: a digest of what is asked for, where it comes from and what it is made for. Raises `InvalidSpec`."""
        if environment.image is not None:
            if environment.requirements:
                raise InvalidSpec("requirements: packages are not added to an image; install them in the image")
            parts: list[Any] = ["image", image_identity(environment.image)]
        else:
            packages = self._packages(environment)
            program = Path(packages.program).resolve()
            found = program.stat()
            runtime = [str(program), found.st_size, found.st_mtime_ns]
            parts = [packages.tool, list(packages.requirements), runtime, packages.registry.fingerprint]
        text = json.dumps([_FORMAT, *parts, platform.machine(), os.geteuid()])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def lookup(self, environment: Environment) -> Prepared | None:
        """The environment, held, if it is there. Raises `InvalidSpec`, `PreparationFailed` where it can never be."""
        return self._held(self.key(environment))

    def sizes(self) -> dict[str, int]:
        """Bytes of every environment that is there, by key, the one whose use is longest ago first."""
        used = {}
        for record in self._directory.glob(f"*/{_RECORD}"):
            with suppress(OSError, ValueError, KeyError):
                key = record.parent.name
                used[key] = (lock_path(self._directory, key).stat().st_mtime_ns, int(json.loads(record.read_text())["size"]))
        return {key: size for key, (_, size) in sorted(used.items(), key=lambda item: item[1])}

    def _held(self, key: str) -> Prepared | None:
        lease = locked(self._directory, key, fcntl.LOCK_SH)
        if lease is None:
            return None
        try:
            record = json.loads((self._directory / key / _RECORD).read_text())
            # The kernel's own idea of now is coarse: two uses within a few milliseconds would look the same.
            now = time.time_ns()
            os.utime(lease.fd, ns=(now, now))
            return self._prepared(key, record, lease)
        except (OSError, ValueError, KeyError):
            lease.close()
            return None

    def _prepared(self, key: str, record: Mapping[str, Any], lease: Lease) -> Prepared:
        tree = str(self._directory / key / _TREE)
        if record["kind"] == "image":
            return Prepared(key=key, root=tree, env=record["env"], workdir=record["workdir"], lease=lease)
        inside = NODE_MODULES if record["kind"] == "npm" else PYTHON_PACKAGES
        variable = "NODE_PATH" if record["kind"] == "npm" else "PYTHONPATH"
        programs = f"{inside}/.bin" if record["kind"] == "npm" else f"{inside}/bin"
        return Prepared(key=key, binds=((tree, inside),), env={variable: inside}, paths=(programs,), lease=lease)

    def _packages(self, environment: Environment) -> Packages:
        return find_packages(environment, self._programs, self._path, self._uv)

    # --- how one is made ----------------------------------------------------------------------------------

    async def prepare(
        self, environment: Environment, bench: Callable[[], AbstractContextManager[Bench]], on_line: OnLine | None = None
    ) -> Prepared:
        """The environment, held; made if it is not there, once among all routers of this machine.

        `bench` is entered only where packages are installed. `on_line` gets what the installer says, without credentials.
        Raises `InvalidSpec`, and `PreparationFailed` with whose fault it is.
        """
        key = await trio.to_thread.run_sync(self.key, environment)
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        waits = False
        while True:
            if (prepared := self._held(key)) is not None:
                return prepared
            lock = locked(self._directory, key, fcntl.LOCK_EX)
            if lock is not None:
                try:
                    if not (self._directory / key / _RECORD).exists():
                        await self._make(key, environment, bench, on_line)
                finally:
                    lock.close()
            else:
                if not waits and on_line is not None:
                    await on_line("waiting for another process that prepares the same")
                waits = True
                await trio.sleep(_LOOK_AGAIN)

    async def _make(
        self, key: str, environment: Environment, bench: Callable[[], AbstractContextManager[Bench]], on_line: OnLine | None
    ) -> None:
        await trio.to_thread.run_sync(self._remove_rests, key)
        staging = self._directory / f"{key}.{secrets.token_hex(4)}"
        staging.mkdir(mode=0o711)
        entry = staging / "entry"
        entry.mkdir(mode=0o755)
        try:
            if environment.image is not None:
                record = await self._unpacked(environment.image, entry / _TREE, on_line)
            else:
                with bench() as installing:
                    record = await self._installed(environment, staging, entry / _TREE, installing, on_line)
            await trio.to_thread.run_sync(self._store, key, entry, record)
        except OSError as exc:
            raise PreparationFailed(f"the environment could not be stored: {exc}") from exc
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_discard, staging)
        await trio.to_thread.run_sync(self.evict, key)

    def _store(self, key: str, entry: Path, record: Mapping[str, Any]) -> None:
        size = _seal(entry / _TREE, bits=record["kind"] != "image")
        (entry / _RECORD).write_text(json.dumps({**record, "size": size, "made_at": time.time()}))
        entry.rename(self._directory / key)

    async def _installed(
        self, environment: Environment, staging: Path, tree: Path, bench: Bench, on_line: OnLine | None
    ) -> dict[str, Any]:
        packages = self._packages(environment)
        made = await install(packages, staging, self._directory, bench, self._limits.install, on_line)
        await trio.to_thread.run_sync(_take, made, tree)
        return {"kind": packages.tool, "requirements": packages.requirements}

    async def _unpacked(self, image: str, root: Path, on_line: OnLine | None) -> dict[str, Any]:
        def told(line: str) -> None:
            if on_line is not None:
                trio.from_thread.run(on_line, line)

        allowance = Allowance(size=self._limits.image * _MIB, checkpoint=trio.from_thread.check_cancelled)
        config = await trio.to_thread.run_sync(unpack_image, image, root, allowance, told)
        return {"kind": "image", "image": image, "env": dict(config.env), "workdir": config.workdir, "user": config.user}

    # --- how one goes -------------------------------------------------------------------------------------

    def evict(self, keep: str | None = None) -> None:
        """Removes environments that nobody uses, the longest unused first, until the rest fits; and what killed routers left."""
        sizes = self.sizes()
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= self._limits.total * _MIB:
                break
            if key != keep and self.remove(key):
                total -= size
        for rest in list(self._directory.glob("*.*")):
            key, _, kind = rest.name.partition(".")
            if kind != "lock" and rest.is_dir() and (lock := locked(self._directory, key, fcntl.LOCK_EX)) is not None:
                _discard(rest)
                if not (self._directory / key).exists():
                    lock_path(self._directory, key).unlink(missing_ok=True)
                lock.close()

    def remove(self, key: str) -> bool:
        """Removes an environment; False where it is in use."""
        lock = locked(self._directory, key, fcntl.LOCK_EX)
        if lock is None:
            return False
        try:
            rest = self._directory / f"{key}.{secrets.token_hex(4)}"
            with suppress(FileNotFoundError):
                (self._directory / key).rename(rest)
                _discard(rest)
            lock_path(self._directory, key).unlink(missing_ok=True)
        finally:
            lock.close()
        return True

    def _remove_rests(self, key: str) -> None:
        """Removes what was begun under this key by somebody who is gone."""
        for rest in [place for place in self._directory.glob(f"{key}*") if place.is_dir()]:
            _discard(rest)


def _take(made: Path, tree: Path) -> None:
    if made.is_symlink() or not made.is_dir():
        raise PreparationFailed("the installer left something else than a directory")
    made.rename(tree)


def _seal(tree: Path, *, bits: bool) -> int:
    """Bytes that a tree takes, which from now on is this user's, and with `bits` readable by everybody and writable by nobody.

    What is neither a file, a directory nor a link is removed: an installer has no use for it.
    """
    root, total = os.geteuid() == 0, 0
    for _, names, files, fd in os.fwalk(tree, topdown=False, follow_symlinks=False):
        for name in (*files, *names):
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            total += found.st_blocks * 512
            if root and found.st_uid != 0:
                os.chown(name, 0, 0, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and bits:
                os.chmod(name, 0o444 | (0o111 if found.st_mode & 0o111 else 0), dir_fd=fd)
            elif not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode)):
                os.unlink(name, dir_fd=fd)
        if root and bits:
            os.fchown(fd, 0, 0)
        if bits:
            os.fchmod(fd, 0o555)
    return total


def _discard(top: Path) -> None:
    """Removes a directory; what cannot be removed is left to the next one."""
    with suppress(OSError):
        remove_tree(top)
