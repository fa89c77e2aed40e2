"""Prepared environments: packages are installed once, in a sandbox, and used by others without a network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import attrs
import pytest
import trio

from sandstorm.provider import Environment, Exit, InvalidSpec, Output, PreparationFailed
from sandstorm_provider_local._confinement import Confinement, Job
from sandstorm_provider_local._environments import (
    EnvironmentLimits,
    Environments,
    Prepared,
    find_installers,
    needs_preparation,
    objections,
)
from sandstorm_provider_local._packages import Bench, InstallLimits
from sandstorm_provider_local._process import Bounds, LocalProcess
from sandstorm_provider_local._registries import npm_registry, python_registry
from sandstorm_provider_local._rootfs import host_python, system_arguments
from sandstorm_provider_local._runtimes import bwrap_features, find_bwrap, find_runtimes, make_etc
from sandstorm_provider_local._seccomp import seccomp_filter
from sandstorm_provider_local._survey import attempts

ROOT = os.geteuid() == 0
MIB = 1 << 20
RUNTIMES = find_runtimes(as_other_user=ROOT)
INSTALLERS = find_installers(RUNTIMES.path, None)
with_uv = pytest.mark.skipif("uv" not in INSTALLERS, reason="uv is not installed")
with_npm = pytest.mark.skipif("npm" not in INSTALLERS or "node" not in RUNTIMES.programs, reason="npm is not installed")


@attrs.define
class Place:
    """A directory with environments, and what is needed to make and use them."""

    path: Path
    confinement: Confinement
    lines: list[str] = attrs.field(factory=list)
    installs: int = 0

    def environments(self, limits: EnvironmentLimits | None = None) -> Environments:
        return Environments(self.path / "environments", programs=RUNTIMES.programs, path=RUNTIMES.path, limits=limits)

    @contextmanager
    def bench(self) -> Iterator[Bench]:
        self.installs += 1
        yield Bench(confinement=self.confinement, uid=64991 if ROOT else None)

    async def note(self, line: str) -> None:
        self.lines.append(line)

    async def prepare(self, limits: EnvironmentLimits | None = None, **fields: Any) -> Prepared:
        return await self.environments(limits).prepare(Environment(**fields), self.bench, self.note)

    async def run(self, prepared: Prepared, *argv: str, files: Mapping[str, str] | None = None, **fields: Any) -> tuple[str, str]:
        """What a program says that uses an environment, without a network and as another user."""
        job = Job(
            argv=argv,
            env=dict(prepared.env),
            files={name: text.encode() for name, text in (files or {}).items()},
            disk=64,
            uid=64992 if ROOT else None,
            **{"binds": prepared.binds, **fields},
        )
        confinement = self.confinement
        if prepared.root is not None:
            confinement = attrs.evolve(confinement, system=system_arguments(Path(prepared.root)))
        process = LocalProcess(confinement.spawn(job), Bounds(deadline=trio.current_time() + 30, output_limit=MIB), lambda: 0)
        said = {"stdout": b"", "stderr": b""}
        try:
            async with process.events() as events:
                async for event in events:
                    if isinstance(event, Output):
                        said[event.stream] += event.data
                    elif isinstance(event, Exit):
                        break
        finally:
            await process.kill()
            process.close()
        return said["stdout"].decode().strip(), said["stderr"].decode().strip()

    def entries(self) -> list[str]:
        """Names in the directory of environments: of the environments themselves, and of anything left over."""
        names = (path.name for path in (self.path / "environments").iterdir())
        return sorted(name for name in names if not name.endswith(".lock") and not name.startswith("uv-"))


def make_confinement(directory: Path) -> Confinement:
    bwrap = find_bwrap(None, directory)
    features = bwrap_features(bwrap) if bwrap else None
    assert bwrap is not None and features is not None
    strongest = Confinement(
        bwrap=bwrap,
        version=features.version,
        etc=make_etc(directory),
        proc=True,
        seccomp=seccomp_filter(platform.machine()),
        extra=RUNTIMES.extra,
        path=RUNTIMES.path,
        can_disable_userns=features.can_disable_userns,
    )
    return next(tried for tried, _ in attempts(strongest, None) if works(tried))


def works(confinement: Confinement) -> bool:
    """Whether bubblewrap makes a sandbox with these arguments here."""
    return subprocess.run([*confinement.prefix, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place whose packages come from nowhere but this machine, until a test says otherwise."""
    for name in list(os.environ):
        if name.upper().startswith(("UV_", "PIP_", "NPM_CONFIG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # Other users have to get through to it, which they do not in pytest's directories.
    path = Path(tempfile.mkdtemp(prefix="sandstorm-environments-", dir="/tmp"))
    path.chmod(0o755)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(path / "wheels"))
    (path / "wheels").mkdir()
    yield Place(path, make_confinement(path))
    for directory, _, _ in os.walk(path):
        Path(directory).chmod(0o755)
    shutil.rmtree(path)


def wheel(directory: Path, name: str, files: Mapping[str, bytes], version: str = "1.0") -> Path:
    """A wheel that somebody could have uploaded."""
    info = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for file, data in contents.items():
            archive.writestr(file, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


def rootfs(path: Path, size: int = 0, program: str | None = None) -> str:
    """An archive with a root file system: some bytes, and a program with its libraries."""
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("data")
        info.size = size
        archive.addfile(info, io.BytesIO(os.urandom(size)))
        if program is not None:
            listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.split()
            for file in (program, *(word for word in listed if word.startswith("/"))):
                archive.add(os.path.realpath(file), arcname=file)
    return str(path)


class Index:
    """An index on loopback: answers from a table, or only once it is released."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        self.released = Event()
        self.released.set()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                index.tokens.append(self.headers.get("Authorization"))
                index.released.wait(60)
                page = index.pages.get(self.path)
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Length", str(len(page or b"")))
                if self.path.endswith("/"):
                    self.send_header("Content-Type", "text/html")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(page or b"")

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        # What was killed while it waited is not answered any more.
        self.server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    thread = Thread(target=index.server.serve_forever, daemon=True)
    thread.start()
    yield index
    index.released.set()
    index.server.shutdown()
    index.server.server_close()
    thread.join()


def serve_wheel(index: Index, path: Path) -> None:
    index.pages[f"/simple/{path.name.partition('-')[0]}/"] = f'<a href="/files/{path.name}">{path.name}</a>'.encode()
    index.pages[f"/files/{path.name}"] = path.read_bytes()


# --- packages ---------------------------------------------------------------------------------------------------


@with_uv
async def test_a_python_package_is_installed_once_and_imported_without_a_network(place: Place) -> None:
    """The second request finds what the first has made; the package is there, and nobody in the sandbox can change it."""
    script = {
        "greeting.py": b"def hello():\n    return 'hello'\n",
        "greeting-1.0.dist-info/entry_points.txt": b"[console_scripts]\ngreet = greeting:hello\n",
    }
    wheel(place.path / "wheels", "greeting", script)
    first = await place.prepare(language="python", requirements=("greeting",))
    again = await place.prepare(language="python", requirements=("greeting",))
    assert (again.key, place.installs) == (first.key, 1)
    assert any("greeting==1.0" in line for line in place.lines)
    code = "import greeting, os; print(greeting.hello(), greeting.__cached__ and os.path.exists(greeting.__cached__)); open(greeting.__file__, 'w')"
    said, error = await place.run(first, "python3", "-c", code)
    assert said == "hello True"
    assert error.endswith("Read-only file system: '/run/sandstorm/packages/greeting.py'")
    assert (await place.run(first, f"{first.paths[0]}/greet"))[1] == "hello"
    assert place.entries() == [first.key]


@with_npm
async def test_npm_packages_work_with_require_and_import(place: Place, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the configured registry is found both ways; its install script did not run; only the installer had a network."""
    manifest = {"name": "greeting", "version": "1.0.0", "main": "main.js", "scripts": {"postinstall": "touch ran"}}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in (("package.json", json.dumps(manifest)), ("main.js", "module.exports = () => 'hello';")):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data.encode()))
    packed = buffer.getvalue()
    dist = {
        "tarball": f"{index.url}/greeting.tgz",
        "integrity": "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode(),
    }
    index.pages["/greeting.tgz"] = packed
    document = {"name": "greeting", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": {**manifest, "dist": dist}}}
    index.pages["/greeting"] = json.dumps(document).encode()
    monkeypatch.setenv("npm_config_registry", index.url)
    monkeypatch.setenv(f"npm_config_//127.0.0.1:{index.port}/:_authToken", "secret-token")
    prepared = await place.prepare(language="javascript", requirements=("greeting@^1.0",))
    assert "Bearer secret-token" in index.tokens
    assert "secret-token" not in "".join(place.lines)
    files = {"a.js": "console.log(require('greeting')());", "b.mjs": "import hello from 'greeting'; console.log(hello());"}
    for name in files:
        assert await place.run(prepared, "node", name, files=files) == ("hello", "")
    assert (await place.run(prepared, "ls", "/node_modules/greeting"))[0].split() == ["main.js", "package.json"]
    asked = len(index.asked)
    connect = f"""
        const socket = require('net').connect({index.port}, '127.0.0.1', () => {{ console.log('connected'); socket.destroy(); }});
        socket.on('error', error => console.log(error.code));
    """
    assert (await place.run(prepared, "node", "-e", connect))[0] == "ECONNREFUSED"
    assert len(index.asked) == asked


@with_uv
@pytest.mark.parametrize("requirement", ["there-is-none", "greeting==", "greeting==2.0", "-r/etc/passwd", "greeting\n--help"])
async def test_a_requirement_that_does_not_resolve_is_the_callers_mistake(place: Place, requirement: str) -> None:
    """An unknown package or version and what is no requirement, an option for example, end without failover."""
    wheel(place.path / "wheels", "greeting", {"greeting.py": b""})
    with pytest.raises(PreparationFailed) as failed:
        await place.prepare(language="python", requirements=(requirement,))
    assert (failed.value.fault, failed.value.failover) == ("caller", False)
    assert requirement.partition("=")[0] in str(failed.value).encode().decode("unicode_escape")
    assert not (place.path / "environments").exists() or place.entries() == []


@with_uv
async def test_an_index_that_is_down_is_the_providers_and_its_password_stays_hidden(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the index cannot be reached another provider may be tried, and no credential is shown."""
    monkeypatch.delenv("UV_NO_INDEX")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://somebody:pass-word@127.0.0.1:9/simple")
    with pytest.raises(PreparationFailed) as failed:
        await place.prepare(language="python", requirements=("greeting",))
    assert failed.value.fault == "provider"
    assert "127.0.0.1:9" in str(failed.value)
    assert "pass-word" not in str(failed.value) + "".join(place.lines)


@with_npm
async def test_npm_says_whose_fault_it_is(place: Place, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that the registry does not have is the caller's mistake, a registry that is not there is not."""
    monkeypatch.setenv("npm_config_registry", index.url)
    with pytest.raises(PreparationFailed, match="404") as failed:
        await place.prepare(language="javascript", requirements=("there-is-none",))
    assert failed.value.fault == "caller"
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(PreparationFailed, match="ECONNREFUSED") as failed:
        await place.prepare(language="javascript", requirements=("there-is-none",))
    assert failed.value.fault == "provider"
    for requirement, fault in (("--prefix=/", "caller"), ("git+https://127.0.0.1/x", "provider"), ("../x", "provider")):
        with pytest.raises(PreparationFailed) as failed:
            await place.prepare(language="javascript", requirements=(requirement,))
        assert failed.value.fault == fault


@with_uv
async def test_no_code_of_a_package_runs_while_there_is_a_network(place: Place) -> None:
    """A package that would have to be built is not: its build script could do anything with the network and credentials."""
    script = f"open({str(place.path / 'ran')!r}, 'w')".encode()
    with tarfile.open(place.path / "wheels/greeting-1.0.tar.gz", "w:gz") as archive:
        for name, data in (("setup.py", script), ("PKG-INFO", b"Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")):
            info = tarfile.TarInfo(f"greeting-1.0/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(PreparationFailed, match="building from source is disabled") as failed:
        await place.prepare(language="python", requirements=("greeting",))
    assert failed.value.fault == "provider"
    assert not (place.path / "ran").exists()


@with_uv
async def test_no_git_runs_while_there_is_a_network(place: Place, index: Index) -> None:
    """A requirement that names a repository does not get as far as asking for it."""
    with pytest.raises(PreparationFailed, match="Git executable not found") as failed:
        await place.prepare(language="python", requirements=(f"greeting @ git+{index.url}/x",))
    assert failed.value.fault == "provider"
    assert index.asked == []


@with_uv
async def test_an_installation_ends_at_its_limits(place: Place, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much disk or too much time ends it as the provider's fault, and leaves nothing."""
    wheel(place.path / "wheels", "large", {f"large/{number}": os.urandom(MIB) for number in range(6)})
    with pytest.raises(PreparationFailed) as failed:
        await place.prepare(EnvironmentLimits(install=InstallLimits(disk=2)), language="python", requirements=("large",))
    assert failed.value.fault == "provider"
    index.released.clear()
    monkeypatch.delenv("UV_NO_INDEX")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{index.url}/simple")
    with pytest.raises(PreparationFailed, match=r"deadline 0\.3 s") as failed:
        await place.prepare(EnvironmentLimits(install=InstallLimits(seconds=0.3)), language="python", requirements=("late",))
    assert failed.value.fault == "provider"
    assert place.entries() == []


# --- one for all ------------------------------------------------------------------------------------------------

PREPARE = """
import sys, trio
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_environments import Place, make_confinement
place = Place(Path({path!r}), make_confinement(Path(sys.argv[1])))
async def main():
    prepared = await place.prepare(language="python", requirements=("greeting",))
    print(prepared.key, place.installs)
trio.run(main)
"""


def router(place: Place, name: str) -> subprocess.Popen[str]:
    """Another process that prepares the same environment."""
    own = place.path / name
    own.mkdir()
    code = PREPARE.format(tests=str(Path(__file__).parent), path=str(place.path))
    return subprocess.Popen([sys.executable, "-c", code, str(own)], stdout=subprocess.PIPE, text=True)


def commands_with(text: str) -> list[bytes]:
    """Command lines of processes on this machine that have something in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return [command for command in found if text.encode() in command]


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


@with_uv
def test_several_processes_install_the_same_once(place: Place, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three processes that want the same at the same time one installs, and the others get what it has made."""
    serve_wheel(index, wheel(place.path, "greeting", {"greeting.py": b""}))
    monkeypatch.delenv("UV_NO_INDEX")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{index.url}/simple")
    index.released.clear()
    routers = [router(place, f"router-{number}") for number in range(3)]
    wait_until(lambda: index.asked)
    time.sleep(0.5)
    index.released.set()
    told = [process.communicate(timeout=60)[0].split() for process in routers]
    assert sorted(installs for _, installs in told) == ["0", "0", "1"]
    assert len({key for key, _ in told}) == 1
    assert index.asked.count("/simple/greeting/") == 1


@with_uv
async def test_what_a_killed_router_began_is_removed_and_made_anew(
    place: Place, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL in the middle of an installation its installer is gone, and the next router starts over at once."""
    serve_wheel(index, wheel(place.path, "greeting", {"greeting.py": b""}))
    monkeypatch.delenv("UV_NO_INDEX")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{index.url}/simple")
    index.released.clear()
    killed = router(place, "router")
    await trio.to_thread.run_sync(wait_until, lambda: index.asked)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    [rest] = place.entries()
    assert "." in rest, "something was begun"
    index.released.set()
    prepared = await place.prepare(language="python", requirements=("greeting",))
    assert place.entries() == [prepared.key]
    assert commands_with(str(place.path)) == []


async def test_a_cancelled_preparation_leaves_nothing(place: Place) -> None:
    """Who stops waiting leaves no half environment behind, and the lock is free."""
    image = rootfs(place.path / "image.tar", 64 * MIB)
    with trio.move_on_after(0.01):
        await place.prepare(image=image)
    assert len(place.entries()) <= 1
    assert all("." not in name for name in place.entries())
    assert (await place.prepare(image=image)).root is not None


# --- what stays and what goes -----------------------------------------------------------------------------------


async def test_the_longest_unused_is_evicted_and_never_one_in_use(place: Place) -> None:
    """Past the size limit those go whose use is longest ago; one that another process holds stays, until it lets go."""
    images = [rootfs(place.path / f"{name}.tar", 2 * MIB) for name in "abcd"]
    limits = EnvironmentLimits(total=5)
    made = []
    for image in images[:2]:
        prepared = await place.prepare(limits, image=image)
        prepared.lease.close()
        made.append(prepared.key)
    touched = place.environments(limits).lookup(Environment(image=images[0]))
    assert touched is not None and touched.key == made[0]
    touched.lease.close()
    third = await place.prepare(limits, image=images[2])
    assert place.entries() == sorted([made[0], third.key])

    holder = await trio.lowlevel.open_process(["sleep", "60"], pass_fds=[third.lease.fd])
    third.lease.close()
    os.utime(place.path / "environments" / f"{third.key}.lock", (1, 1))
    fourth = await place.prepare(limits, image=images[3])
    assert place.entries() == sorted([third.key, fourth.key])
    assert not place.environments(limits).remove(third.key)
    holder.kill()
    await holder.wait()
    assert place.environments(limits).remove(third.key)
    assert place.environments(limits).lookup(Environment(image=images[2])) is None
    assert list(place.environments(limits).sizes()) == [fourth.key]
    assert not (place.path / "environments" / f"{third.key}.lock").exists()


async def test_an_image_that_fails_leaves_nothing(place: Place) -> None:
    """An image that is too large is refused, and what was unpacked of it is gone."""
    with pytest.raises(InvalidSpec, match="larger than"):
        await place.prepare(EnvironmentLimits(image=1), image=rootfs(place.path / "image.tar", 2 * MIB))
    assert place.entries() == []


@with_uv
def test_a_key_tells_what_is_asked_for_and_where_it_comes_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, repetition and credentials do not matter; packages, index, language and interpreter do."""
    environments = place.environments()

    def key(*requirements: str) -> str:
        return environments.key(Environment(language="python", requirements=requirements))

    first = key("a", "b==1")
    assert key("b==1", " a ", "a") == first
    assert key("a", "b==2") != first
    monkeypatch.setenv("UV_INDEX", "http://u:one@127.0.0.1/simple")
    other = key("a", "b==1")
    assert other != first
    monkeypatch.setenv("UV_INDEX", "http://u:two@127.0.0.1/simple")
    assert key("a", "b==1") == other
    elsewhere = Environments(place.path, programs={"python3": "/bin/sh"}, path=RUNTIMES.path)
    assert elsewhere.key(Environment(language="python", requirements=("a", "b==1"))) != other


# --- images -----------------------------------------------------------------------------------------------------


async def test_a_sandbox_runs_in_an_image_and_our_python_runs_beside_it(place: Place) -> None:
    """In a root without Python its own shell runs, nothing of the host's system is there, and the host's Python runs all the same."""
    prepared = await place.prepare(image=rootfs(place.path / "image.tar", 4, program="/bin/sh"))
    assert prepared.root is not None
    said, _ = await place.run(prepared, "/bin/sh", "-c", "cd /; echo *; echo x > /data")
    assert {"bin", "data"} <= set(said.split()) <= {"bin", "data", "dev", "lib", "lib64", "proc", "tmp", "usr", "work"}
    python = host_python(RUNTIMES.programs["python3"], RUNTIMES.extra)
    code = """
        import ctypes, json, os, subprocess
        shell = subprocess.run(["/bin/sh", "-c", "echo from the image"], capture_output=True, text=True).stdout
        print(json.dumps([os.path.exists("/usr/bin/python3"), shell, os.access("/data", os.W_OK), os.getuid()]))
    """
    said, error = await place.run(prepared, *python.argv, "-I", "-S", "-c", textwrap.dedent(code), binds=python.binds)
    assert error == ""
    assert json.loads(said) == [False, "from the image\n", False, 1000]


# --- what the host says -----------------------------------------------------------------------------------------


def test_the_hosts_pip_configuration_reaches_uv(tmp_path: Path) -> None:
    """Uv gets what `pip.conf` and pip's variables say, local directories are shown to it, and its own variables outrank them."""
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / "index/simple").mkdir(parents=True)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    configured = (
        f"[global]\nindex-url = http://user:hidden-word@127.0.0.1/simple\nextra-index-url =\n  file://{tmp_path}/index/simple\n"
    )
    (tmp_path / ".config/pip/pip.conf").write_text(configured)
    environ = {
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": str(tmp_path / ".config/pip/pip.conf"),
        "https_proxy": "http://p:1",
    }
    registry = python_registry(environ, tmp_path)
    assert registry.env["UV_DEFAULT_INDEX"] == "http://user:hidden-word@127.0.0.1/simple"
    assert registry.env["UV_INDEX"] == f"file://{tmp_path}/index/simple"
    assert registry.env["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert registry.env["https_proxy"] == "http://p:1"
    assert set(registry.places) == {str(wheels), str(tmp_path / "index")}
    assert "hidden-word" not in repr(registry) + registry.masked("at http://user:hidden-word@127.0.0.1 with hidden-word")
    assert python_registry({**environ, "UV_NO_INDEX": "1"}, tmp_path).env.keys().isdisjoint({"UV_DEFAULT_INDEX", "UV_INDEX"})


def test_the_hosts_npm_configuration_reaches_npm(tmp_path: Path) -> None:
    """Registries, scopes and credentials of `.npmrc` become variables, with what they refer to, and a variable outranks the file."""
    lines = [
        "; a comment",
        "registry = http://127.0.0.1:1/",
        "@team:registry=http://127.0.0.1:2/",
        "//127.0.0.1:2/:_authToken=${TEAM_TOKEN}",
        "ignore-scripts=false",
    ]
    (tmp_path / ".npmrc").write_text("\n".join(lines))
    registry = npm_registry({"TEAM_TOKEN": "hidden-word", "NPM_CONFIG_REGISTRY": "http://127.0.0.1:3/"}, tmp_path)
    assert {name: value for name, value in registry.env.items() if "127.0.0.1" in name + value} == {
        "npm_config_registry": "http://127.0.0.1:3/",
        "npm_config_@team:registry": "http://127.0.0.1:2/",
        "npm_config_//127.0.0.1:2/:_authToken": "hidden-word",
    }
    assert "npm_config_ignore-scripts" not in registry.env
    assert registry.masked("token hidden-word") == "token ***"


def test_what_cannot_be_prepared_is_declined_with_the_remedy() -> None:
    """Each reason says what to do instead, before anything is tried."""

    def reasons(installers: dict[str, str], **fields: Any) -> list[str]:
        return [f"{rule}: {reason}" for rule, reason in objections(Environment(**fields), installers)]

    both = {"uv": "/uv", "npm": "/npm"}
    assert reasons(both, language="python", requirements=("a",)) == []
    assert reasons(both, image="oci:/layout:tag") == []
    assert "skopeo copy" in reasons(both, image="python:3.12")[0]
    assert "install uv" in reasons({}, language="python", requirements=("a",))[0]
    assert "install npm" in reasons({}, language="typescript", requirements=("a",))[0]
    assert "use an image" in reasons(both, language="ruby", requirements=("a",))[0]
    assert "in the image" in reasons(both, image="/a.tar", language="python", requirements=("a",))[0]
    assert not needs_preparation(Environment(language="python"))
