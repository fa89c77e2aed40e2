"""100 MB into a box and out of it, beside `cp` of the same bytes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import BinaryIO

import attrs
import trio
from _boxes import Bench, with_bench
from _local import client, open_up
from _measure import Figure, Pairs, in_turns, interleaved, process_seconds, timed

SIZE = 100_000_000
CHUNK = 1024 * 1024
TARGET = 2.0
MEMORY = "/dev/shm"
"""A file system in memory, as the work area of a box is one."""
WARM_UP = 2


@attrs.frozen
class Places:
    """Files in memory on this side: what is sent, what comes back, and what `cp` makes of the first."""

    source: Path
    target: Path
    copy: Path

    def copied(self) -> float:
        """Seconds of `cp` to a file that was not there."""
        self.copy.unlink(missing_ok=True)
        return process_seconds(["cp", str(self.source), str(self.copy)])

    def fresh(self) -> Path:
        """The target, which is not there."""
        self.target.unlink(missing_ok=True)
        return self.target

    def check(self) -> None:
        """What came back is what was sent."""
        assert self.target.read_bytes() == self.source.read_bytes()


def measure(quick: bool) -> Iterable[Figure]:
    """How many times as long as `cp` each direction takes, through the provider and through the blocking client."""
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder, _places() as places:
        open_up(folder)
        for part in (_provider, _client):
            yield from trio.run(with_bench, partial(part, places), folder, 0.1 if quick else 1.0)


@contextmanager
def _places() -> Iterator[Places]:
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-", dir=MEMORY) as memory:
        places = Places(*(Path(memory) / name for name in ("source", "target", "copy")))
        places.source.write_bytes(os.urandom(SIZE))
        yield places


async def _provider(places: Places, bench: Bench) -> list[Figure]:
    box = await bench.create()

    async def up() -> float:
        await box.remove("file")
        with _opened(places.source, "rb") as file:
            began = time.perf_counter()
            await box.upload("file", _chunks(file))
            return time.perf_counter() - began

    async def down() -> float:
        with _opened(places.fresh(), "wb") as file:
            began = time.perf_counter()
            async with box.download("file") as data:
                async for chunk in data:
                    file.write(chunk)
            return time.perf_counter() - began

    await box.upload("file", _once(b"to be removed"))
    figures = []
    for name, subject in (("into a box", up), ("out of a box", down)):
        for _ in range(WARM_UP):
            await subject()
        pairs = await in_turns(subject, places.copied, bench.times(40))
        figures.append(_figure(f"100 MB {name}", pairs, "Sandbox.upload and download, in pieces of 1 MiB"))
    places.check()
    await box.destroy()
    return figures


async def _client(places: Places, bench: Bench) -> list[Figure]:
    with client(bench.folder, bench.state) as sandstorm, sandstorm.sandbox() as box:

        def up() -> float:
            box.remove("file")
            return timed(lambda: box.upload("file", places.source))

        def down() -> float:
            target = places.fresh()
            return timed(lambda: box.download_to("file", target))

        box.upload("file", b"to be removed")
        figures = [_by_client("into a box", up, places, bench), _by_client("out of a box", down, places, bench)]
    places.check()
    return figures


def _by_client(name: str, subject: Callable[[], float], places: Places, bench: Bench) -> Figure:
    for _ in range(WARM_UP):
        subject()
    pairs = interleaved(subject, places.copied, bench.times(40))
    return _figure(f"100 MB {name} through the client", pairs, "local file included, which worker threads read or write")


def _figure(name: str, pairs: Pairs, how: str) -> Figure:
    theirs, ours = median(pairs.baseline), median(pairs.subject)
    return Figure(
        name=name,
        value=pairs.ratio,
        unit="x",
        target=TARGET,
        baseline=f"cp between files in memory: {theirs * 1000:.0f} ms, {_speed(theirs)}",
        detail=f"{_speed(ours)}; {how}; {pairs.spread}",
    )


def _speed(seconds: float) -> str:
    return f"{SIZE / seconds / 1e9:.1f} GB/s"


def _opened(path: Path, mode: str) -> BinaryIO:
    return path.open(mode, buffering=0)  # type: ignore[return-value]


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk
