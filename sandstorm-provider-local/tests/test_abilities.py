"""What boxes can do beyond running programs, in real boxes on this machine."""

from __future__ import annotations

import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from sandstorm import AsyncSandstorm, SandboxSpec
from sandstorm.provider import (
    Command,
    Conflict,
    Environment,
    Exit,
    Extend,
    Files,
    Fork,
    InvalidInput,
    InvalidSpec,
    Metered,
    NotSupported,
    Pause,
    Ports,
    Reconnect,
    ResourceInfo,
    SandboxGone,
    Snapshot,
    Watch,
)
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._environments import EnvironmentLimits, Environments


async def fetch(url: str) -> bytes:
    """The body at an address."""

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read()

    return await trio.to_thread.run_sync(get)


async def read(box: Any, path: str) -> bytes:
    """A whole file of a box."""
    async with box.download(path) as data:
        return b"".join([chunk async for chunk in data])


async def test_what_is_offered_is_there(machine: Any) -> None:
    """Each ability that the offer declares usable has its protocol, and each that it does not has a reason."""
    box = await machine.box()
    offer = machine.order().offer
    for protocol in (Reconnect, Files, Watch, Ports, Pause, Snapshot, Fork, Extend, Metered):
        assert isinstance(box, protocol)
        assert offer.can(protocol.__name__) or offer.reason(protocol.__name__)
    assert offer.can("Detach")
    assert offer.extendable
    await box.destroy()


async def test_a_port_is_reached(machine: Any) -> None:
    """A server in the box answers at its address, one that is just starting too, from this machine's loopback only."""
    box = await machine.box(files={"index.html": b"hello"})
    script = "sleep 0.3; exec python3 -m http.server 8000 --bind 127.0.0.1"
    server = await box.start(Command(argv=("bash", "-c", script), timeout=60))
    url = await box.url(8000)
    assert url.startswith("http://127.0.0.1:")
    assert await fetch(url) == b"hello"
    assert await box.url(8000) == url
    await box.upload("big", _pieces(b"x" * 5_000_000))
    assert len(await fetch(f"{url}/big")) == 5_000_000
    await server.kill()
    await box.destroy()
    with pytest.raises(OSError):
        await fetch(url)


async def _pieces(*data: bytes) -> Any:
    for piece in data:
        yield piece


async def test_a_pause_stops_everything(machine: Any) -> None:
    """Nothing runs while a box is paused, deadlines included, and all goes on afterwards."""
    if not machine.facts.data["freezer"]:
        pytest.skip("there is no freezer control group here")
    box = await machine.box()
    script = "for i in 1 2 3 4 5 6; do echo $i >> log; sleep 0.1; done"
    process = await box.start(Command(argv=("bash", "-c", script), timeout=1.5))
    await trio.sleep(0.15)
    await box.pause()
    size = (await box.stat("log")).size
    async with machine.session.find(box.id) as found:
        assert [info.state async for info in found] == ["paused"]
    await trio.sleep(1.5)
    assert (await box.stat("log")).size == size
    with pytest.raises(Conflict):
        await box.start(Command(argv=("true",), timeout=9))
    await box.resume()
    assert (await machine.collect(process)).exit == Exit(code=0)
    assert (await box.stat("log")).size == 12
    await box.pause()
    with trio.fail_after(5):
        await box.destroy()


async def test_a_snapshot_is_restored(machine: Any) -> None:
    """A new box begins with the files of a snapshot, modes and links included, long after the first box is gone."""
    box = await machine.box(disk=16)
    await machine.bash(box, "mkdir -p d; echo data > d/f; chmod 640 d/f; ln -s d/f link; head -c 3M /dev/urandom > big")
    big = await read(box, "big")
    assert await box.snapshot("snap-1", 3600.0) == "snap-1"
    with pytest.raises(Conflict):
        await box.snapshot("snap-1", 3600.0)
    await machine.bash(box, "echo later > d/f")
    await box.destroy()
    stored = machine.state / "snapshots"
    assert stored.stat().st_mode & 0o077 == 0
    assert [path.stat().st_mode & 0o077 for path in stored.iterdir()] == [0, 0]
    order = machine.order(disk=16)
    # The engine hands the id back without the account that stands before it in the spec.
    order = attrs.evolve(order, spec=_with_snapshot(order.spec, "snap-1"))
    again = await machine.session.create(order)
    ran = await machine.bash(again, "cat d/f; stat -c %a d/f; readlink link; stat -c %U big")
    assert ran.stdout == b"data\n640\nd/f\nsandbox\n", ran
    assert await read(again, "big") == big
    await again.destroy()
    async with machine.session.find() as found:
        assert [(info.id, info.kind, info.state) async for info in found] == [("snap-1", "snapshot", "stored")]
    snapshot = await machine.session.attach("snap-1")
    with pytest.raises(NotSupported):
        await snapshot.start(Command(argv=("true",), timeout=9))
    await snapshot.destroy()
    with pytest.raises(InvalidSpec):
        await machine.session.create(attrs.evolve(machine.order(), spec=order.spec))


def _with_snapshot(spec: Any, snapshot: str) -> Any:
    """The spec as an adapter sees it."""
    made = attrs.evolve(spec)
    object.__setattr__(made, "snapshot", snapshot)
    return made


async def test_a_run_begins_with_the_files_of_a_snapshot(machine: Any) -> None:
    """A run that names a snapshot gets its files, though it could be a one-shot without."""
    settings = {"store": "sqlite://", "plugins": {"local": {"state_dir": str(machine.state), "warn": False}}}
    async with AsyncSandstorm(settings=settings) as client:
        async with client.sandbox(SandboxSpec(files={"f": b"captured"})) as box:
            snapshot = await box.snapshot()
        ran = await client.run(argv=["cat", "f"], spec=SandboxSpec(snapshot=snapshot))
        assert ran.stdout == b"captured", ran
        await machine.session.sweep()
        for stored in (machine.state / "snapshots").glob("*.json"):
            await (await machine.session.attach(stored.stem)).destroy()


async def test_damaged_and_expired_snapshots_are_refused(machine: Any) -> None:
    """An archive that is not what was captured is not restored, and one past its retention is swept."""
    box = await machine.box(files={"f": b"x"})
    await box.snapshot("snap-2", 3600.0)
    place = machine.state / "snapshots" / "snap-2.tar"
    data = bytearray(place.read_bytes())
    data[600] ^= 1
    place.write_bytes(data)
    order = machine.order()
    with pytest.raises(Exception, match="not what was captured"):
        await machine.session.create(attrs.evolve(order, spec=_with_snapshot(order.spec, "snap-2")))
    await (await machine.session.attach("snap-2")).destroy()
    await box.snapshot("snap-3", 0.01)
    await trio.sleep(0.02)
    await machine.session.sweep()
    assert list((machine.state / "snapshots").iterdir()) == []
    await box.destroy()


async def test_a_fork_has_the_same_files(machine: Any) -> None:
    """A fork begins with the files of its origin, and from then on each has its own; nothing is stored."""
    box = await machine.box(files={"f": b"same"})
    copy = await box.fork(machine.order())
    await machine.bash(copy, "echo other > f")
    assert (await read(box, "f"), await read(copy, "f")) == (b"same", b"other\n")
    assert list((machine.state / "snapshots").iterdir()) == []
    await box.destroy()
    assert (await machine.bash(copy, "cat f")).stdout == b"other\n"
    await copy.destroy()


async def test_lifetime_and_idle_time_end_a_box(machine: Any) -> None:
    """A box ends at its lifetime, which can be moved, and where it was asked for, once nothing happens in it."""
    short = await machine.box(lifetime=0.5)
    longer = await machine.session.create(machine.order(lifetime=0.5))
    await longer.extend(60.0)
    idle = await machine.box(idle_timeout=0.5)
    busy = await machine.box(idle_timeout=0.5)
    working = await busy.start(Command(argv=("sleep", "2"), timeout=9))
    with trio.fail_after(10):
        await short.link.finished.wait()
        await idle.link.finished.wait()
    for gone in (short, idle):
        with pytest.raises(SandboxGone):
            await gone.start(Command(argv=("true",), timeout=9))
    assert (await machine.collect(working)).exit == Exit(code=0)
    assert (await machine.bash(longer, "echo on")).stdout == b"on\n"
    for lifetime in (0.0, -1.0, 8 * 86400.0):
        with pytest.raises(InvalidInput):
            await longer.extend(lifetime)
    await longer.destroy()
    await busy.destroy()


async def test_a_look_at_a_box_is_no_activity(machine: Any) -> None:
    """Boxes are found with the moment of their end, as it was moved, and with their idle time, which nobody's look shortens."""

    async def found() -> ResourceInfo:
        async with machine.session.find(box.id) as infos:
            (info,) = [info async for info in infos]
        assert isinstance(info, ResourceInfo)
        return info

    box = await machine.box(lifetime=60.0)
    assert (await found()).expires_at == pytest.approx(time.time() + 60, abs=10)
    await box.extend(600.0)
    info = await found()
    assert info.expires_at == pytest.approx(time.time() + 600, abs=10)
    assert info.idle is not None
    await trio.sleep(0.3)
    first = (await found()).idle or 0.0
    await trio.sleep(0.1)
    assert (await found()).idle >= first + 0.1 >= 0.4
    process = await box.start(Command(argv=("sleep", "0.9"), timeout=9))
    await trio.sleep(0.2)
    assert (await found()).idle == 0
    await machine.collect(process)
    assert (await found()).idle < 0.4
    await box.snapshot("snap-4", 3600.0)
    async with machine.session.find("snap-4") as infos:
        assert [info.expires_at async for info in infos] == [pytest.approx(time.time() + 3600, abs=10)]
    await (await machine.session.attach("snap-4")).destroy()
    await box.destroy()


async def test_use_is_metered(machine: Any) -> None:
    """The CPU time of programs is counted, and the time of the box with what is set aside for it."""
    if machine.facts.data["groups"] is None:
        pytest.skip("there are no control groups here")
    box = await machine.box()
    await machine.bash(box, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    used = await box.usage()
    with trio.fail_after(5):
        while used["cpu"] < 0.02:
            await trio.sleep(0.01)
            used = await box.usage()
    assert used["cpu"] < 20
    assert used["memory"] == pytest.approx(used["sandbox"] * 128 / 1024)
    await box.destroy()


async def test_cells_keep_their_state(machine: Any) -> None:
    """A cell sees what the one before it made, shows its value, and hands rich results out; another language is refused."""
    box = await machine.box()
    limits = Command(argv=(), timeout=20.0)

    async def cell(code: str) -> Any:
        return await machine.collect(await box.run_cell(code, "python", limits))

    assert (await cell("x = 20")).exit == Exit(code=0)
    assert (await cell("x += 1; x * 2")).stdout == b"42\n"
    rich = await cell("class Picture:\n    def _repr_png_(self): return b'\\x89PNG' * 50_000\nPicture()")
    (picture,) = [artifact for artifact in rich.artifacts if artifact.mime == "image/png"]
    assert picture.data == b"\x89PNG" * 50_000
    failed = await cell("1/0")
    assert (failed.exit, b"ZeroDivisionError" in failed.stderr) == (Exit(code=1), True)
    assert (await cell("x")).stdout == b"21\n"
    with pytest.raises(NotSupported):
        await box.run_cell("1", "javascript", limits)
    await box.destroy()


def make_wheel(directory: Path) -> None:
    """The package `greeting` in a file that an installer takes."""
    info = "greeting-1.0.dist-info"
    with zipfile.ZipFile(directory / "greeting-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("greeting.py", "text = 'hello from a package'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def greeting(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """An environment with the package, which is found on this machine alone."""
    wheels = machine.state / "wheels"
    wheels.mkdir(mode=0o755)
    make_wheel(wheels)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    return Environment(language="python", requirements=("greeting",))


async def test_packages_are_there_in_every_kind_of_run(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of the spec are found by one-shot programs, programs in boxes and cells, and are held while a box has them."""
    if "uv" not in machine.facts.data["installers"]:
        pytest.skip("uv, which installs packages, is not installed")
    wanted = greeting(machine, monkeypatch)
    key = await machine.session.prepare(wanted, "prepared-1")
    code = "import greeting; print(greeting.text)"
    ran = await machine.run("python3", "-c", code, environment=wanted)
    assert ran.stdout == b"hello from a package\n", ran
    box = await machine.box(environment=wanted)
    ran = await machine.collect(await box.start(Command(argv=("python3", "-c", code), timeout=20)))
    assert ran.stdout == b"hello from a package\n", ran
    ran = await machine.collect(await box.run_cell(code, "python", Command(argv=(), timeout=20)))
    assert ran.stdout == b"hello from a package\n", ran
    environments = machine.session._environments(machine.session._ground)
    assert not environments.remove(key)
    await box.destroy()
    with trio.fail_after(5):
        while not environments.remove(key):  # noqa: ASYNC110 - the supervisor lets go of it with its last breath
            await trio.sleep(0.01)


async def test_a_kept_box_holds_its_environment_without_its_router(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kept box uses is not evicted after its router has gone, and can be once the box has ended."""
    if "uv" not in machine.facts.data["installers"]:
        pytest.skip("uv, which installs packages, is not installed")
    wanted = greeting(machine, monkeypatch)
    order = machine.order(keep=True, environment=wanted)
    async with LocalProvider(state_dir=str(machine.state)).connect() as router:
        box = await router.create(order)
    runtimes = machine.session._ground.runtimes
    limits = EnvironmentLimits(total=0)
    environments = Environments(machine.state / "environments", programs=runtimes.programs, path=runtimes.path, limits=limits)
    environments.evict()
    assert list(environments.sizes()) == [environments.key(wanted)]
    box = await machine.session.attach(order.marker)
    ran = await machine.bash(box, "python3 -c 'import greeting; print(greeting.text)'")
    assert ran.stdout == b"hello from a package\n", ran
    await box.destroy()
    with trio.fail_after(5):
        while environments.sizes():
            environments.evict()
            await trio.sleep(0.01)
