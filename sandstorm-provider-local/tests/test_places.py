"""Where the state of sandboxes can lie, and who may use one place together."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from sandstorm.provider import Conflict, ProviderDown
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._state import state_directory

ROOT = os.geteuid() == 0


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory on another file system than the rest."""
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system to write to")
    place = Path(tempfile.mkdtemp(prefix="sandstorm-test-", dir="/dev/shm"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place)


async def _works(machine: Any, state: Path) -> None:
    """A one-shot program, a box that another router finds, its files and its copy, all with their state there."""
    async with LocalProvider(state_dir=str(state), warn=False).connect() as session:
        await session.refresh()
        there = attrs.evolve(machine, session=session, state=state)
        assert (await there.run("cat", "f", files={"f": b"once"})).stdout == b"once"
        box = await there.box(keep=True, files={"f": b"kept"})
        copy = await box.fork(machine.order())
        assert (await there.bash(copy, "cat f")).stdout == b"kept"
        await copy.destroy()
    async with LocalProvider(state_dir=str(state), warn=False).connect() as session:
        again = await session.attach(box.id)
        assert (await machine.bash(again, "cat f")).stdout == b"kept"
        await again.destroy()


@pytest.mark.parametrize("name", ["with space", "\u00fc'\"$(x)\\", "x" * 200], ids=["space", "odd", "long"])
async def test_any_name_can_be_that_of_a_state_directory(machine: Any, name: str) -> None:
    """Spaces, what a shell would take for something else, and more bytes than the path of a socket may have."""
    await _works(machine, machine.state / name)


async def test_another_file_system_can_hold_the_state(machine: Any, shared_memory: Path) -> None:
    """Nothing is moved or linked between the state directory and what lies elsewhere."""
    await _works(machine, shared_memory / "state")


@pytest.mark.skipif(ROOT, reason="root's state is never in a runtime directory: others cannot get through one")
def test_a_runtime_directory_counts_only_where_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_RUNTIME_DIR is used; where it names what is not there or not this user's, as after `su`, the state is in /tmp."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state_directory(None) == tmp_path / "sandstorm"
    for other in (tmp_path / "missing", Path("/proc/1")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(other))
        assert state_directory(None) == Path(f"/tmp/sandstorm-{os.geteuid()}")


@pytest.mark.skipif(not ROOT, reason="only root's sandboxes run as another user")
async def test_a_state_directory_that_keeps_others_out_is_named(tmp_path: Path) -> None:
    """Root's sandboxes do not get through a private directory: nothing is offered, and the reason is that directory."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    async with LocalProvider(state_dir=str(private / "state")).connect() as session:
        with pytest.raises(ProviderDown, match=r"cannot get through .*set state_dir to a directory that all users can enter"):
            await session.check()


async def test_routers_share_a_state_directory(machine: Any) -> None:
    """Four routers make, find and end boxes in one place at once: markers are taken once, and none sweeps another's away."""
    async with AsyncExitStack() as stack:
        others = []
        for _ in range(3):
            session = await stack.enter_async_context(LocalProvider(state_dir=str(machine.state), warn=False).connect())
            await session.refresh()
            others.append(session)
        orders = [machine.order() for _ in range(6)]
        made: list[Any] = []
        refused: list[Conflict] = []

        async def create(session: Any, order: Any) -> None:
            try:
                made.append(await session.create(order))
            except Conflict as exc:
                refused.append(exc)

        async with trio.open_nursery() as nursery:
            for number, order in enumerate(orders):
                for session in (others[number % 3], others[(number + 1) % 3]):
                    nursery.start_soon(create, session, order)
        assert sorted(box.id for box in made) == sorted(order.marker for order in orders)
        assert len(refused) == len(orders)
        await machine.session.sweep()
        for box in made:
            assert (await machine.bash(box, "echo on")).stdout == b"on\n"
        async with machine.session.find() as found:
            assert {info.id async for info in found} == {order.marker for order in orders}
    await machine.wait_empty()
