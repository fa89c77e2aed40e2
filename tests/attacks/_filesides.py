"""What file calls are made on: a box, a directory whose guard trusts paths, and what is outside of both."""
# ruff: noqa: PTH116, PTH208 - naive calls are written as one writes them at first

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from _bait import Bait

from sandstorm._async_box import AsyncBox

PATIENCE = 10.0
"""Seconds after which a call of a box hangs; all that is in the work area is tiny."""


class Naive:
    """The calls of a box on a directory, as one would write them at first."""

    def __init__(self, work: Path) -> None:
        self._work = work

    async def _do(self, work: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    async def download(self, path: str) -> bytes:
        def read() -> bytes:
            with Path(f"{self._work}/{path}").open("rb") as file:
                return file.read(1 << 16)

        return await self._do(read)

    async def upload(self, path: str, source: bytes) -> None:
        await self._do(lambda: Path(f"{self._work}/{path}").write_bytes(source))

    async def list(self, path: str, *, recursive: bool = False) -> list[str]:
        place = Path(f"{self._work}/{path}")
        if recursive:
            return await self._do(lambda: [name for _, _, names in os.walk(place) for name in names])
        return await self._do(lambda: os.listdir(place))

    async def stat(self, path: str) -> Any:
        return await self._do(lambda: os.stat(f"{self._work}/{path}").st_size)

    async def make_directory(self, path: str) -> None:
        await self._do(lambda: Path(f"{self._work}/{path}").mkdir(parents=True))

    async def remove(self, path: str) -> None:
        place = Path(f"{self._work}/{path}")
        await self._do(lambda: shutil.rmtree(place.resolve()) if place.is_dir() else place.resolve().unlink())

    async def upload_directory(self, path: str, source: Path) -> None:
        await self._do(lambda: shutil.copytree(source, f"{self._work}/{path}", dirs_exist_ok=True))

    async def download_directory(self, path: str, target: Path) -> None:
        await self._do(lambda: shutil.copytree(f"{self._work}/{path}", target, dirs_exist_ok=True))

    async def cwd(self, path: str) -> bytes:
        def run() -> bytes:
            return subprocess.run(["cat", "secret"], cwd=f"{self._work}/{path}", capture_output=True, check=False).stdout

        return await self._do(run)

    async def outputs(self, path: str) -> bytes:
        return await self.download(path)

    async def watched(self, path: str, change: Callable[[], None]) -> bool:
        place = Path(f"{self._work}/{path}")
        before = await self._do(lambda: set(os.listdir(place)))
        change()
        return await self._do(lambda: set(os.listdir(place))) != before


class Boxed:
    """The calls of a box."""

    def __init__(self, box: AsyncBox) -> None:
        self._box = box

    def __getattr__(self, name: str) -> Any:
        return getattr(self._box, name)

    async def cwd(self, path: str) -> bytes:
        async with self._box.exec("cat", "secret", cwd=path, timeout=PATIENCE) as running:
            return b"".join([output.data async for output in running])

    async def outputs(self, path: str) -> bytes:
        result = await self._box.run(argv=["true"], outputs=[path], timeout=PATIENCE)
        return b"".join(result.outputs.values())

    async def watched(self, path: str, change: Callable[[], None]) -> bool:
        async with self._box.watch(path) as changes:
            change()
            with trio.move_on_after(0.05):
                return [await anext(changes)] != []
        return False


class Outside:
    """A directory beside the work area: what a call gets or changes there."""

    def __init__(self, bait: Bait, patience: float) -> None:
        self.patience = patience
        self.token = bait.token
        self.place = bait.top / "outside"
        self.source = bait.top / "source"
        self.target = bait.top / "target"
        self.source.mkdir()
        (self.source / "stolen").write_text("x")
        self.restore()

    def restore(self) -> None:
        """Makes it what it was."""
        for place in (self.place, self.target):
            shutil.rmtree(place, ignore_errors=True)
        (self.place / "sub").mkdir(parents=True)
        for name in ("secret", f"name-{self.token}"):
            (self.place / name).write_text(self.token)
            (self.place / name).chmod(0o666)
        (self.place / "sub" / "secret").write_text(self.token)
        self.place.chmod(0o777)
        self._was = self._state()

    def _state(self) -> dict[str, str]:
        return {str(path): path.read_text() if path.is_file() else "" for path in self.place.rglob("*")}

    def touch(self) -> None:
        """A change in it that only who watches it sees."""
        (self.place / "passing").touch()
        (self.place / "passing").rename(self.place / "passed")

    @property
    def got(self) -> bool:
        """Whether something of it has arrived in the target."""
        return any(path.is_file() and self.token in path.read_text(errors="replace") for path in self.target.rglob("*"))

    @property
    def changed(self) -> bool:
        """Whether it was changed, by others than `touch`."""
        now = self._state()
        now.pop(str(self.place / "passed"), None)
        return now != self._was
