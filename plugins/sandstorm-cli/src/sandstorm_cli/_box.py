"""A sandbox, a program in it and an entry of the list, as far as the commands need them; the clients hand them out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from pathlib import Path
from typing import Protocol

from sandstorm import Exit, Plan
from sandstorm.provider import FileInfo, Output

OnBytes = Callable[[int], None]
"""Is told of each piece that was moved, in bytes."""


class Known(Protocol):
    """Which sandbox it is, and where."""

    @property
    def id(self) -> str:
        """The vendor's id."""
        ...

    @property
    def provider(self) -> str:
        """The account that runs it."""
        ...

    @property
    def expires_at(self) -> float:
        """Wall-clock seconds since 1970 at which it ends at the latest."""
        ...


class Box(Known, Protocol):
    """A sandbox, for blocking code."""

    @property
    def isolation(self) -> str:
        """The level that was verified there."""
        ...

    @property
    def plan(self) -> Plan:
        """The decision that led to it."""
        ...

    def upload(self, path: str, source: bytes | Path, on_bytes: OnBytes | None = None) -> None:
        """Writes a file in it."""
        ...

    def download_to(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a file of it here; its size in bytes."""
        ...

    def upload_directory(self, path: str, source: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a directory in it; how many files that were."""
        ...

    def download_directory(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> list[FileInfo]:
        """Writes a directory of it here; the entries that were left out."""
        ...

    def stat(self, path: str) -> FileInfo:
        """One entry."""
        ...

    def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        ...

    def url(self, port: int) -> str:
        """The address of a port."""
        ...

    def pause(self) -> None:
        """Stops everything in it."""
        ...

    def resume(self) -> None:
        """Goes on."""
        ...

    def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now."""
        ...

    def snapshot(self, retention: float = ...) -> str:
        """The name of a copy of its files, kept for `retention` seconds."""
        ...

    def destroy(self) -> None:
        """Ends it."""
        ...

    # Last, since it hides the type of the same name from what follows.
    def list(self, path: str = ".", *, recursive: bool = False) -> list[FileInfo]:
        """What is in a directory."""
        ...


class Kept(Known, Protocol):
    """A sandbox in the list of those that are there."""

    @property
    def run(self) -> str:
        """The id of the run that made it."""
        ...

    @property
    def title(self) -> str:
        """`sandbox`, or the language or command of a detached run."""
        ...

    @property
    def state(self) -> str:
        """The vendor's word for its state."""
        ...

    @property
    def created_at(self) -> float:
        """Wall-clock seconds since 1970."""
        ...

    @property
    def idle(self) -> float | None:
        """Seconds without activity, or None where that is unknown."""
        ...

    @property
    def cost(self) -> Decimal | None:
        """US dollars so far, or None where the price is unknown."""
        ...

    @property
    def most(self) -> Decimal | None:
        """US dollars that it can cost in all, or None where the price is unknown."""
        ...


class Running(Protocol):
    """A program under way in a sandbox, for async code."""

    @property
    def exit(self) -> Exit | None:
        """How it ended, or None while it runs."""
        ...

    def __aiter__(self) -> AsyncIterator[Output]: ...

    async def write(self, data: bytes) -> None:
        """Sends bytes to its stdin."""
        ...

    async def close_stdin(self) -> None:
        """Ends its stdin."""
        ...

    async def signal(self, number: int) -> None:
        """Sends it a signal."""
        ...

    async def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal."""
        ...

    async def kill(self) -> None:
        """Ends it, and everything that it started."""
        ...


class AsyncBox(Known, Protocol):
    """A sandbox, for async code."""

    def exec(
        self,
        *argv: str,
        stdin: bytes = ...,
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        timeout: float = ...,
        interactive: bool = ...,
        terminal: tuple[int, int] | None = ...,
    ) -> AbstractAsyncContextManager[Running]:
        """A program in it, killed where the context ends first."""
        ...
