"""Files of a container, through small programs in it.

Not through the API's archive calls: Docker's do not see the file systems in memory where the work area is, and refuse a
container with a read-only root (source: `docker container cp` in Docker's reference).
"""

from __future__ import annotations

import io
import os
import re
import secrets
import stat
import tarfile
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress

import trio

from sandstorm.provider import CapacityError, FileInfo, InvalidSpec, SandboxLost, StreamLost
from sandstorm_provider_docker._scripts import DOWNLOAD, UNPACK, UPLOAD
from sandstorm_provider_docker._stream import Reader

_NO_ROOM = 28
_CUT = 29
_CHUNK = 256 * 1024
_ENTRY = re.compile(rb"([0-9a-f]+) (\d+) (\d+) ")
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}

RunScript = Callable[..., Awaitable[tuple[str, Reader]]]
"""Starts a script with arguments as the user of the work area: the daemon's id of its exec, and its streams."""
ExitCode = Callable[[str], Awaitable[int]]


class Tools:
    """What a sandbox runs scripts with, for each call of one."""

    def __init__(self, run: RunScript, exit_code: ExitCode) -> None:
        self._run = run
        self._exit_code = exit_code

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file, which appears once it is whole."""
        token = secrets.token_hex(16)
        async with self._script(UPLOAD, path, token) as (exec_id, reader):
            _refuse(await reader.first_line("stderr"), path)
            # Where the script has ended, its exit code says why.
            with suppress(trio.BrokenResourceError):
                async for chunk in chunks:
                    for start in range(0, len(chunk), _CHUNK):
                        await reader.stream.send(chunk[start : start + _CHUNK])
                await reader.stream.send(token.encode())
                await reader.stream.send_end()
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
            said = await _rest(reader)
            await self._expect_done(exec_id, path, said)

    async def unpack(self, files: Mapping[str, bytes]) -> None:
        """Writes several files at once."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size, info.mtime = len(data), int(time.time())
                tar.addfile(info, io.BytesIO(data))
        async with self._script(UNPACK) as (exec_id, reader):
            _refuse(await reader.first_line("stderr"), ".")
            with suppress(trio.BrokenResourceError):
                await reader.stream.send(packed.getvalue())
                await reader.stream.send_end()
            said = await _rest(reader)
            await self._expect_done(exec_id, "files", said)

    @asynccontextmanager
    async def download(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Reads a file."""
        async with self._script(DOWNLOAD, path) as (exec_id, reader):
            _refuse(await reader.first_line("stderr"), path)

            async def chunks() -> AsyncIterator[bytes]:
                while (piece := await reader.receive()) is not None:
                    if piece[0] == "stdout":
                        yield piece[1]
                if await self._exit_code(exec_id) != 0:
                    raise StreamLost(f"{path} could not be read to its end")

            yield chunks()

    async def tell(self, script: str, path: str, *arguments: str) -> bytes:
        """What a script writes to stdout about a path."""
        async with self._script(script, path, *arguments) as (_, reader):
            _refuse(await reader.first_line("stderr"), path)
            told = bytearray()
            while (piece := await reader.receive()) is not None:
                if piece[0] == "stdout":
                    told += piece[1]
            return bytes(told)

    @asynccontextmanager
    async def _script(self, script: str, *arguments: str) -> AsyncIterator[tuple[str, Reader]]:
        exec_id, reader = await self._run(script, *arguments)
        try:
            yield exec_id, reader
        finally:
            await reader.stream.close()

    async def _expect_done(self, exec_id: str, path: str, said: str) -> None:
        code = await self._exit_code(exec_id)
        if code == _CUT:
            raise StreamLost(f"{path} did not arrive whole")
        if code == _NO_ROOM or "No space left" in said:
            raise CapacityError(f"{path} does not fit into the work area: {said}")
        if code != 0:
            raise InvalidSpec(f"{path} could not be written with the programs of this image: {said or code}")


async def _rest(reader: Reader) -> str:
    said = bytearray()
    # A script that ends before its input does resets the connection; its exit code is to be had all the same.
    with suppress(StreamLost):
        while (piece := await reader.receive()) is not None:
            said += piece[1][:1000]
    return said.decode(errors="replace").strip()[:500]


def _refuse(word: str | None, path: str) -> None:
    """Raises what the first word of a script means, unless it is `ready`."""
    if word == "ready":
        return
    if word == "missing":
        raise FileNotFoundError(path)
    if word in ("link", "special", "refused"):
        meaning = {"link": "is or goes through a link", "special": "is not of the right kind", "refused": "may not be touched"}
        raise InvalidSpec(f"{path} {meaning[word]}")
    raise SandboxLost(f"the work area is not there: {word or 'no word from the container'}")


def entries(told: bytes) -> list[FileInfo]:
    """What the scripts say of files: names that each end with a zero byte, an empty one, then a line for each, and so on.

    A file name, whatever is in it, cannot pass for another file: each line is compared with the name that it belongs to.
    """
    found: list[FileInfo] = []
    at = 0
    while at < len(told):
        names_end = told.find(b"\0\0", at)
        lines_end = told.find(b"\0", names_end + 2)
        if names_end < 0 or lines_end < 0:
            raise StreamLost("the list of files was cut")
        found += _described(told[at:names_end].split(b"\0"), told[names_end + 2 : lines_end])
        at = lines_end + 1
    return found


def _described(names: list[bytes], lines: bytes) -> Iterator[FileInfo]:
    at = 0
    for name in names:
        numbers = _ENTRY.match(lines, at)
        # A file that has gone meanwhile has a name and no line.
        if numbers is None or not lines.startswith(name + b"\n", numbers.end()):
            continue
        at = numbers.end() + len(name) + 1
        mode, size, modified = int(numbers[1], 16), int(numbers[2]), int(numbers[3])
        kind = _KINDS.get(stat.S_IFMT(mode), "other")
        yield FileInfo(
            path=os.fsdecode(name).removeprefix("./"),
            kind=kind,
            size=size if kind == "file" else 0,
            mode=stat.S_IMODE(mode),
            modified=float(modified),
        )
