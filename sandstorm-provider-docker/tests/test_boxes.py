"""Containers: their files, how they are found, and when they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from sandstorm.provider import (
    CapacityError,
    Command,
    Conflict,
    InvalidInput,
    InvalidSpec,
    NotSupported,
    PreparationFailed,
    ProviderDown,
    SandboxGone,
    SandboxLost,
    StreamLost,
)
from sandstorm_provider_docker import DockerProvider


async def chunks(*data: bytes) -> AsyncIterator[bytes]:
    """The data, one piece after another."""
    for piece in data:
        yield piece


async def read(box: Any, path: str) -> bytes:
    """A whole file of a box."""
    async with box.download(path) as data:
        return b"".join([chunk async for chunk in data])


async def names(box: Any, path: str = ".", *, recursive: bool = False) -> list[str]:
    """What is in a directory, in order."""
    async with box.list(path, recursive=recursive) as found:
        return sorted([info.path async for info in found])


async def test_files_go_in_and_out_exactly(machine: Any) -> None:
    """Bytes of any kind and of more than one frame arrive as they were, and programs and files see each other."""
    box = await machine.box()
    data = bytes(range(256)) * 20_000
    await box.upload("c/d/e", chunks(data, b"", b"end"))
    await box.upload("empty", chunks())
    assert (await machine.run(box, "wc", "-c", "c/d/e", "empty")).stdout.split()[:3] == [b"5120003", b"c/d/e", b"0"]
    assert await read(box, "c/d/e") == data + b"end"
    assert await read(box, "empty") == b""
    with pytest.raises(FileNotFoundError):
        await read(box, "missing")


async def test_no_path_leaves_the_work_area(machine: Any) -> None:
    """Links and pipes that a program planted are refused in every file call, at every depth."""
    box = await machine.box()
    await machine.run(box, "sh", "-c", "echo out > /tmp/out; ln -s /tmp/out file; ln -s /tmp dir; mkfifo pipe; mkdir real")
    for path in ("file", "dir/out", "pipe", "real/../file"):
        with pytest.raises((InvalidSpec, InvalidInput)):
            await read(box, path)
        with pytest.raises((InvalidSpec, InvalidInput)):
            await box.upload(path, chunks(b"stolen"))
    for path in ("dir", "dir/."):
        with pytest.raises(InvalidSpec):
            await names(box, path)
    with pytest.raises(InvalidSpec):
        await box.remove("dir/out")
    with pytest.raises(InvalidSpec):
        await box.make_directory("dir/new")
    for path in ("../etc/passwd", "/etc/passwd", "", "a/../../b"):
        with pytest.raises(InvalidInput):
            await read(box, path)
    assert (await box.stat("dir")).kind == "link"
    assert (await machine.run(box, "sh", "-c", "cat /tmp/out; ls /tmp")).stdout == b"out\nout\n"
    await box.remove("dir")
    assert (await machine.run(box, "cat", "/tmp/out")).stdout == b"out\n"


async def test_files_are_looked_after(machine: Any) -> None:
    """Listing, describing, making and removing work, and no file name can pass for another entry."""
    box = await machine.box(files={"a/b": b"123", "a/c/d": b""})
    forged = "x\n81a4 7 1 forged"
    await box.upload(forged, chunks(b"abc"))
    await box.make_directory("new/deep")
    await box.make_directory("new")
    assert await names(box) == ["a", "new", forged]
    assert await names(box, "a", recursive=True) == ["a/b", "a/c", "a/c/d"]
    info = await box.stat("a/b")
    assert (info.path, info.kind, info.size, info.mode) == ("a/b", "file", 3, 0o644)
    assert abs(info.modified - time.time()) < 60
    assert (await box.stat(".")).kind == "directory"
    await machine.run(box, "chmod", "0", "a/c")
    await box.remove("a")
    await box.remove(forged)
    assert await names(box, recursive=True) == ["new", "new/deep"]
    for call in (box.stat, box.remove, names):
        with pytest.raises(FileNotFoundError):
            await (call(box, "a") if call is names else call("a"))


async def test_a_cut_upload_leaves_nothing(machine: Any) -> None:
    """A file whose source fails half way does not appear, and one that does not fit says so and leaves room."""
    box = await machine.box(disk=4)
    await box.upload("kept", chunks(b"before"))

    async def broken() -> AsyncIterator[bytes]:
        yield b"half" * 100
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        await box.upload("kept", broken())
    with pytest.raises(CapacityError):
        await box.upload("big", chunks(*[b"x" * 1_000_000] * 9))
    with trio.fail_after(5):
        while await names(box) != ["kept"]:  # noqa: ASYNC110 - a daemon has to be asked
            await trio.sleep(0.05)
    assert await read(box, "kept") == b"before"


async def test_a_container_is_found_attached_and_destroyed_twice(machine: Any) -> None:
    """It is known by its marker until it is destroyed; then it is gone for everybody."""
    order = machine.order()
    box = await machine.session.create(order)
    with pytest.raises(Conflict):
        await machine.session.create(order)
    async with machine.again() as other:
        async with other.session.find(order.marker) as found:
            info = [each async for each in found]
        assert [(each.id, each.marker, each.state) for each in info] == [(box.id, order.marker, "running")]
        assert abs(info[0].created_at - time.time()) < 60
        again = await other.session.attach(box.id)
        assert (await other.run(again, "echo", "hi")).stdout == b"hi\n"
    assert (await machine.run(box, "echo", "still")).stdout == b"still\n"
    running = await box.start(Command(argv=("sleep", "30"), timeout=40))
    async with machine.again() as other:
        await (await other.session.attach(box.id)).destroy()
    with pytest.raises(SandboxLost):
        await machine.collect(running)
    await box.destroy()
    await box.destroy()
    with pytest.raises(SandboxGone):
        await machine.session.attach(box.id)
    with pytest.raises(SandboxGone):
        await box.start(Command(argv=("true",), timeout=1))
    assert await machine.containers() == []


async def test_a_kept_container_goes_on_without_its_router(machine: Any) -> None:
    """Files and detached programs of a kept container outlive the session; a detached program ends at its timeout."""
    async with machine.again() as first:
        order = first.order(keep=True)
        box = await first.session.create(order)
        script = "(setsid sleep 99 &); sleep 0.5; echo yes > went-on; sleep 99"
        await box.start(Command(argv=("sh", "-c", script), timeout=2.0, detached=True))
    box = await machine.session.attach(box.id)
    with trio.fail_after(10):
        while await names(box) != ["went-on"]:  # noqa: ASYNC110 - a daemon has to be asked
            await trio.sleep(0.1)
        count = "cat /proc/[0-9]*/comm 2>/dev/null | grep -c sleep"
        # The clock of the lifetime sleeps as well.
        while int((await machine.run(box, "sh", "-c", count)).stdout) > 1:  # noqa: ASYNC110 - a daemon has to be asked
            await trio.sleep(0.1)
    await box.destroy()


_ROUTER = """
import sys, trio
from sandstorm.provider import Command, Order, SandboxSpec
from sandstorm_provider_docker import DockerProvider

async def main():
    provider = DockerProvider(socket=sys.argv[1], images={"bash": sys.argv[2]})
    async with provider.connect() as session:
        spec = SandboxSpec(memory=128, disk=32)
        offer = provider.offers(spec, await session.refresh())[0]
        order = Order(spec=spec, offer=offer, marker="test-killed", dispatch_by=trio.current_time() + 60, lifetime=60)
        box = await session.create(order)
        await box.start(Command(argv=("sh", "-c", "setsid sleep 50 & sleep 50"), timeout=60))
        print("up", flush=True)
        await trio.sleep(60)

trio.run(main)
"""


async def test_a_container_dies_with_its_killed_router(machine: Any) -> None:
    """A router that is killed with SIGKILL takes its containers with it, programs and all."""
    image = machine.provider.images["bash"]
    command = [sys.executable, "-c", _ROUTER, machine.podman.socket, image]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as router:  # noqa: ASYNC220 - it starts at once
        assert router.stdout is not None
        assert await trio.to_thread.run_sync(router.stdout.readline) == b"up\n"
        assert await machine.containers() == ["test-killed"]
        router.send_signal(signal.SIGKILL)
    await machine.wait_gone("test-killed", 5)


@pytest.mark.parametrize("keep", [False, True])
async def test_a_container_ends_with_its_lifetime(machine: Any, keep: bool) -> None:
    """It ends by itself and is removed, and whoever follows a program in it is told that it was lost."""
    order = machine.order(keep=keep, lifetime=2.0)
    box = await machine.session.create(order)
    process = await box.start(Command(argv=("sleep", "50"), timeout=60))
    with trio.fail_after(10):
        with pytest.raises(SandboxLost):
            await machine.collect(process)
        await machine.wait_gone(order.marker, 5)


async def test_a_paused_container_keeps_its_state(machine: Any) -> None:
    """A program that was paused does nothing meanwhile, and goes on where it was."""
    box = await machine.box()
    process = await box.start(Command(argv=("sh", "-c", "while :; do echo x >> ticks; sleep 0.05; done"), timeout=30))
    await box.pause()
    await box.pause()
    with pytest.raises(Conflict):
        await box.start(Command(argv=("true",), timeout=1))
    await box.resume()
    await box.resume()
    before = await read(box, "ticks")
    await trio.sleep(0.3)
    assert len(await read(box, "ticks")) > len(before)
    await process.kill()


_SERVER = (
    "use IO::Socket::INET; $s = IO::Socket::INET->new(LocalPort => 8000, Listen => 5) or die $!; print qq(up\\n); $| = 1; print q();"
    "while ($c = $s->accept) { <$c>; print $c qq(HTTP/1.0 200 OK\\r\\n\\r\\nhello); close $c }"
)


async def test_a_port_is_reached_from_this_machine(machine: Any) -> None:
    """What listens on a port of the spec answers at its address, which is a loopback one; other ports have none."""
    box = await machine.box(network="open", ports=(8000,))
    process = await box.start(Command(argv=("perl", "-e", f"$| = 1; {_SERVER}"), timeout=30))
    async with process.events() as events:
        assert (await anext(events)).data == b"up\n"
        url = await box.url(8000)
        host, _, port = url.removeprefix("http://").partition(":")
        assert host == "127.0.0.1"
        async with await trio.open_tcp_stream(host, int(port)) as connection:
            await connection.send_all(b"GET / HTTP/1.0\r\n\r\n")
            got = b""
            while data := await connection.receive_some(1000):
                got += data
        assert got.endswith(b"hello")
        await process.kill()
    with pytest.raises(NotSupported):
        await box.url(8001)


async def test_an_image_that_is_nowhere(machine: Any) -> None:
    """An image that cannot be pulled is a failed preparation, and nothing is left of the create."""
    from sandstorm.provider import Environment

    with pytest.raises(PreparationFailed) as caught:
        await machine.box(environment=Environment(image="localhost:1/nowhere:latest"))
    assert caught.value.fault == "provider"
    assert await machine.containers() == []


async def test_a_daemon_that_is_away(machine: Any, tmp_path: Any) -> None:
    """Without a socket the provider is down, with the remedy; a daemon that is killed cuts the streams."""
    async with DockerProvider(socket=str(tmp_path / "none")).connect() as session:
        with pytest.raises(ProviderDown, match="podman system service"):
            await session.check()
    box = await machine.box()
    process = await box.start(Command(argv=("sleep", "30"), timeout=40))
    machine.podman.kill()
    with pytest.raises((StreamLost, SandboxLost)):
        await machine.collect(process)
    with pytest.raises(ProviderDown):
        await box.start(Command(argv=("true",), timeout=1))
    await trio.to_thread.run_sync(machine.podman.start)
    await box.destroy()
