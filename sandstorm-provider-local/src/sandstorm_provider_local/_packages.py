"""How packages are installed: by uv or npm, in a sandbox that has a network for that step alone.

No code of a package runs in that step, since the sandbox shares the host's network then, and knows the credentials of its
indexes: uv builds nothing from source, npm runs no scripts, and neither finds a git that could be told to.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from sandstorm.provider import Environment, Exit, Output, PreparationFailed, ProviderDown
from sandstorm_provider_local._confinement import WORKDIR, Confinement, Job
from sandstorm_provider_local._process import Bounds, LocalProcess
from sandstorm_provider_local._registries import CA_INSIDE, Registry, certificates, npm_registry, python_registry
from sandstorm_provider_local._runtimes import make_etc, reachable

INSTALLED_BY = {"python": "uv", "javascript": "npm", "typescript": "npm"}
"""The installer of each language that has one here."""
NO_UV = "install uv (`pip install 'sandstorm-provider-local[requirements]'`, or set `uv` to its path)"
NO_NPM = "install npm where sandboxes see it (for example `apt install npm`)"
PYTHON_PACKAGES = "/run/sandstorm/packages"
NODE_MODULES = "/node_modules"
"""Above `/work`, so that `import` finds it as `require` does."""

_UV_INSIDE = "/run/sandstorm/uv"
_OUTPUT_LIMIT = 16 * 1024 * 1024
_DISK_CHECK = 0.5
_SAID = 2000
"""Characters of the installer's own words in an error."""
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NPM_SPEC = re.compile(r"(@[\w.~-]+/)?[\w.~-]+(@(npm:(@[\w.~-]+/)?[\w.~-]+(@[\w.^~<>=|*+ -]+)?|[\w.^~<>=|*+ -]+))?")
_NPM_CALLER = re.compile(
    r"code (E404|ETARGET|ENOVERSIONS|EINVALIDTAGNAME|EINVALIDPACKAGENAME|ERESOLVE|EBADPLATFORM|EUNSUPPORTEDPROTOCOL)\b"
)
_UV_CALLER = ("No solution found", "Failed to parse", "Distribution not found")
_UV_OURS = (
    "building from source is disabled",
    "could not be queried",
    "authentication",
    "network was disabled",
    "wheels with a matching",
)

OnLine = Callable[[str], Awaitable[None]]


@attrs.frozen(kw_only=True)
class Bench:
    """What an installer runs with; of a session.

    Attributes:
        confinement: How its programs are confined.
        uid: The user id to run as, or None for the caller's own.
        join_fds: Open `cgroup.procs` files of a group that limits its memory.
        memory: MiB for each process, where there is no such group.
        max_tasks: Processes and threads of the user id, likewise.
        oom_kills: How often the group has run out of memory.
    """

    confinement: Confinement
    uid: int | None = None
    join_fds: Sequence[int] = ()
    memory: int | None = None
    max_tasks: int | None = None
    oom_kills: Callable[[], int] = lambda: 0


@attrs.frozen(kw_only=True)
class InstallLimits:
    """What ends an installation early: seconds, and MiB of disk, downloads included."""

    seconds: float = 600.0
    disk: int = 2048


@attrs.frozen(kw_only=True)
class Packages:
    """A set of packages of one language, and what installs it.

    Attributes:
        language: The language.
        requirements: In the language's own notation.
        program: The runtime for which they are meant, by its path inside.
        installer: The path of uv on the host, or of npm's program inside.
        registry: Where they come from.
    """

    language: str
    requirements: tuple[str, ...]
    program: str
    installer: str
    registry: Registry

    def __attrs_post_init__(self) -> None:
        for requirement in self.requirements:
            if not requirement or requirement.startswith("-") or re.search(r"[\0\r\n]", requirement):
                raise PreparationFailed(f"requirements: {requirement!r} is no requirement", fault="caller")
            if self.tool == "npm" and not _NPM_SPEC.fullmatch(requirement):
                reason = "only packages of a registry are installed here, not addresses and repositories"
                raise PreparationFailed(f"requirements: {requirement!r}: {reason}")

    @property
    def tool(self) -> str:
        """`uv` or `npm`."""
        return INSTALLED_BY[self.language]

    @property
    def folder(self) -> str:
        """The directory with the packages, below the one that is written to."""
        return "node_modules" if self.tool == "npm" else "packages"

    def argv(self) -> tuple[str, ...]:
        """The installer's command line, as a sandbox sees it."""
        if self.tool == "npm":
            flags = "install --ignore-scripts --no-audit --no-fund --no-save --no-package-lock --loglevel http --color false"
            return (self.program, self.installer, *flags.split(), "--prefix", WORKDIR, "--", *self.requirements)
        flags = "pip install --no-config --no-build --no-python-downloads --link-mode hardlink --compile-bytecode --color never"
        target = ("--target", f"{WORKDIR}/{self.folder}", "--python", self.program)
        return (_UV_INSIDE, *flags.split(), *target, "--", *self.requirements)

    def env(self) -> dict[str, str]:
        """The installer's environment, with the credentials of its indexes."""
        cache = f"{WORKDIR}/.cache"
        if self.tool == "npm":
            # Git can be told by a package to run a program; npm takes another one from its settings.
            own = {"npm_config_git": "/bin/false", "npm_config_cache": cache, "npm_config_userconfig": f"{WORKDIR}/.npmrc"}
            return {**self.registry.env, **own, "npm_config_update_notifier": "false", "npm_config_logs_max": "0"}
        return {**self.registry.env, "UV_CACHE_DIR": cache, "UV_NO_PROGRESS": "1", "PATH": "/run/sandstorm"}

    def binds(self, tools: Path, uid: int | None) -> tuple[tuple[str, str], ...]:
        """What the installer's sandbox shows beside the system."""
        places = tuple((place, place) for place in self.registry.places)
        return places if self.tool == "npm" else (*places, (_visible(Path(self.installer), tools, uid), _UV_INSIDE))

    def failure(self, said: str, disk: int) -> PreparationFailed:
        """The error for what the installer said, in its own words, with whose fault it is."""
        lines = [
            line for line in said.splitlines() if line.strip() and not line.startswith(("Using CPython", "npm http", "npm warn"))
        ]
        words = "\n".join(lines)[-_SAID:]
        if self.tool == "npm":
            caller = bool(_NPM_CALLER.search(said))
        else:
            caller = any(text in said for text in _UV_CALLER) and not any(text in said for text in _UV_OURS)
        if "No space left" in said or "ENOSPC" in said:
            words = f"more than {disk} MiB: {words}"
        return PreparationFailed(
            f"{self.tool} could not install the requirements: {words}", fault="caller" if caller else "provider"
        )


def find_packages(environment: Environment, programs: Mapping[str, str], path: str, uv: str | None) -> Packages:
    """The packages that an environment asks for. Raises `PreparationFailed` where they cannot be installed here."""
    language = environment.language or ""
    if language not in INSTALLED_BY:
        raise PreparationFailed(f"packages of {language or 'no language'} are not installed here; use an image")
    npm = INSTALLED_BY[language] == "npm"
    program = programs.get("node" if npm else "python3")
    installer = find_npm(path) if npm else find_uv(uv)
    if program is None or installer is None:
        raise PreparationFailed(NO_NPM if npm else NO_UV)
    registry = (npm_registry if npm else python_registry)(os.environ, Path.home())
    requirements = tuple(sorted({requirement.strip() for requirement in environment.requirements}))
    return Packages(language=language, requirements=requirements, program=program, installer=installer, registry=registry)


def find_uv(setting: str | None) -> str | None:
    """The uv to use: the one that is set, else the one of the `uv` package, else the one on the path; None for none."""
    if setting is not None:
        return setting if os.access(setting, os.X_OK) else None
    beside = Path(sysconfig.get_path("scripts"), "uv")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("uv")


def find_npm(path: str) -> str | None:
    """Npm's program on the search path of sandboxes; None for none."""
    found = shutil.which("npm", path=path)
    return str(Path(found).resolve()) if found else None


def _visible(program: Path, tools: Path, uid: int | None) -> str:
    """A path at which a sandbox's user gets through to a program: its own, or that of a copy."""
    real = program.resolve()
    if uid is None or reachable(real, as_other_user=True):
        return str(real)
    found = real.stat()
    copy = tools / f"{real.name}-{found.st_size:x}-{found.st_mtime_ns:x}"
    if not copy.exists():
        fresh = copy.with_name(f"{copy.name}.{os.getpid()}")
        shutil.copyfile(real, fresh)
        fresh.chmod(0o755)
        fresh.rename(copy)
    return str(copy)


def make_network_etc(staging: Path) -> str:
    """The `/etc` of an installer: that of every sandbox, with name servers and the authorities that the host trusts."""
    etc = Path(make_etc(staging))
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    for name in ("resolv.conf", "hosts"):
        with suppress(OSError):
            (etc / name).write_text(Path("/etc", name).read_text())
    trusted = certificates(os.environ)
    inside = etc / Path(CA_INSIDE).relative_to("/etc")
    inside.parent.mkdir(parents=True)
    if trusted is not None:
        shutil.copyfile(trusted, inside)
    for place in (etc / "resolv.conf", etc / "ssl", etc / "ssl/certs", inside):
        if place.exists():
            place.chmod(0o755 if place.is_dir() else 0o644)
    return str(etc)


async def install(
    packages: Packages, staging: Path, tools: Path, bench: Bench, limits: InstallLimits, on_line: OnLine | None
) -> Path:
    """The directory with the packages, below `staging`. Raises `PreparationFailed`, in the installer's own words."""
    work = staging / "work"
    work.mkdir(mode=0o700)
    if bench.uid is not None:
        os.chown(work, bench.uid, bench.uid)
    etc = await trio.to_thread.run_sync(make_network_etc, staging)
    job = Job(
        argv=packages.argv(),
        env=packages.env(),
        work=str(work),
        disk=limits.disk,
        uid=bench.uid,
        join_fds=bench.join_fds,
        memory=bench.memory,
        max_tasks=bench.max_tasks,
        binds=await trio.to_thread.run_sync(packages.binds, tools, bench.uid),
        network=True,
    )
    try:
        spawned = attrs.evolve(bench.confinement, etc=etc).spawn(job)
    except OSError as exc:
        raise PreparationFailed(f"the installer could not be started: {exc}") from exc
    bounds = Bounds(deadline=trio.current_time() + limits.seconds, output_limit=_OUTPUT_LIMIT)
    process = LocalProcess(spawned, bounds, bench.oom_kills)
    try:
        ended, said = await _followed(process, packages.registry, lambda: _used(work) > limits.disk << 20, on_line)
    except ProviderDown as exc:
        raise PreparationFailed(str(exc)) from exc
    if ended.kind != "exited":
        bound = {"deadline": f"{limits.seconds:g} s", "disk-limit": f"{limits.disk} MiB"}.get(ended.kind, "")
        raise PreparationFailed(f"{packages.tool} was ended: {ended.kind} {bound}".rstrip())
    if ended.code != 0:
        raise packages.failure(said, limits.disk)
    if await trio.to_thread.run_sync(_used, work) > limits.disk << 20:
        # It was faster than the looks at it.
        raise PreparationFailed(f"{packages.tool} has written more than {limits.disk} MiB")
    made = work / packages.folder
    # Nothing to install leaves no directory.
    made.mkdir(exist_ok=True)
    return made


async def _followed(
    process: LocalProcess, registry: Registry, full: Callable[[], bool], on_line: OnLine | None
) -> tuple[Exit, str]:
    """How the installer ended and what it said, without credentials and control characters."""
    said, rest = "", {"stdout": b"", "stderr": b""}
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.watch, _DISK_CHECK, full)
            async with process.events() as events:
                async for event in events:
                    if isinstance(event, Output):
                        *lines, rest[event.stream] = (rest[event.stream] + event.data).split(b"\n")
                        for line in _shown(lines, registry):
                            said = (said + line + "\n")[-_OUTPUT_LIMIT:]
                            if on_line is not None:
                                await on_line(line)
                    elif isinstance(event, Exit):
                        said += "\n".join(_shown(rest.values(), registry))
                        nursery.cancel_scope.cancel()
                        return event, said
    except* ProviderDown as group:
        raise group.exceptions[0] from None
    finally:
        with trio.CancelScope(shield=True):
            await process.kill()
            process.close()
    raise PreparationFailed("the installer ended without a status")


def _shown(lines: Iterable[bytes], registry: Registry) -> list[str]:
    return [_CONTROL.sub("", registry.masked(line.decode(errors="replace"))) for line in lines]


def _used(top: Path) -> int:
    """Bytes that what is below a directory takes; a file with several names counts once."""
    sizes: dict[int, int] = {}
    for _, _, files, fd in os.fwalk(top, follow_symlinks=False):
        for name in files:
            with suppress(OSError):
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())
