"""The client for async code: trio and asyncio.

This module loads values only. The engine, and with it trio, pluggy, cattrs and sqlite3, loads when a client is opened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from sandstorm._call import OnOutput, Opener, RouteOptions, RunOptions, TaskOptions, known, request_of, task_of
from sandstorm._constraints import Constraints
from sandstorm._plan import Plan
from sandstorm._result import Exit, RunResult
from sandstorm._spec import SandboxSpec
from sandstorm._task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from sandstorm._box import Box, Running
    from sandstorm._engine import Engine
    from sandstorm._store import RunRow
    from sandstorm.provider import Output


class AsyncSandstorm(Opener):
    """Routes code to sandboxes, for async code. Enter it with `async with`.

    Under trio it runs in the caller's loop; under asyncio it reaches one trio loop in a background thread.

    Args:
        settings: A settings file, or its contents as a mapping; None for `sandstorm.toml` where there is one.
        plugins: Further plugins, each a name and an object, beside the installed ones.
        store: A store object to use instead of the one that the settings name.
    """

    async def __aenter__(self) -> AsyncSandstorm:
        from sandstorm._bridge import bridge_here

        self._bridge = bridge_here(self._open_engine)
        self._engine: Engine = await self._bridge.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._bridge.close(kind, error, trace)

    async def run(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        on_output: OnOutput | None = None,
        **options: Unpack[RunOptions],
    ) -> RunResult:
        """What came of the program; see `Sandstorm.run`."""
        task = task_of(code, language, options)
        request = request_of(self._engine, task, options)
        return await self._bridge.call(self._engine.run, request, on_output)

    async def plan(
        self,
        code: str | None = None,
        language: str | None = None,
        **options: Unpack[RunOptions],
    ) -> Plan:
        """The decision that `run` would make; runs nothing."""
        task = task_of(code, language, options)
        return await self._bridge.call(self._engine.plan, request_of(self._engine, task, options))

    @asynccontextmanager
    async def map(
        self,
        tasks: Iterable[Task],
        *,
        concurrency: int = 10,
        **options: Unpack[RouteOptions],
    ) -> AsyncIterator[AsyncIterator[tuple[Task, RunResult | Exception]]]:
        """An iterator over each task with its result or error, as they finish; see `Sandstorm.map`."""
        from sandstorm._batch import batch

        known(options, RouteOptions)
        async with self._bridge.enter(
            lambda: batch(self._engine, tasks, lambda task: request_of(self._engine, task, options), concurrency)
        ) as results:

            async def finished() -> AsyncGenerator[tuple[Task, RunResult | Exception], None]:
                while (item := await self._bridge.call(results.next)) is not None:
                    yield item

            async with aclosing(finished()) as items:
                yield items

    @asynccontextmanager
    async def sandbox(
        self,
        spec: SandboxSpec | None = None,
        *,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
        lifetime: float = 3600.0,
    ) -> AsyncIterator[AsyncBox]:
        """A sandbox for several programs, destroyed at the end; see `Sandstorm.sandbox`."""
        from sandstorm._box import open_box

        where = {"spec": spec, "constraints": constraints, "strategy": strategy, "tenant": tenant}
        request = request_of(self._engine, None, where, lifetime)
        async with self._bridge.enter(lambda: open_box(self._engine, request)) as box:
            yield AsyncBox(self._bridge, box)

    async def runs(self, *, limit: int = 20, tenant: str | None = None) -> Sequence[RunRow]:
        """The newest runs of the journal."""
        return await self._bridge.call(lambda: self._engine.store.runs(limit=limit, tenant=tenant))


class AsyncBox:
    """A sandbox, for async code. Made by `AsyncSandstorm.sandbox`."""

    def __init__(self, bridge: Any, box: Box) -> None:
        self._bridge = bridge
        self._box = box
        self.id = box.id
        self.provider = box.provider
        self.isolation = box.isolation
        self.plan = box.plan

    @property
    def native(self) -> object:
        """The vendor's own handle."""
        return self._box.native

    async def run(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        on_output: OnOutput | None = None,
        **options: Unpack[TaskOptions],
    ) -> RunResult:
        """What came of a program that runs to its end here."""
        task = task_of(code, language, options, TaskOptions)
        result: RunResult = await self._bridge.call(self._box.run, task, on_output)
        return result

    @asynccontextmanager
    async def exec(self, *argv: str, stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: str | None = None,
                   timeout: float = 300.0) -> AsyncIterator[AsyncRunning]:  # fmt: skip
        """A program whose output is handed out as it comes; it is killed where the context ends first."""
        async with self._bridge.enter(lambda: self._box.exec(argv, stdin=stdin, env=env, cwd=cwd, timeout=timeout)) as running:
            yield AsyncRunning(self._bridge, running)

    async def upload(self, path: str, source: bytes | Path) -> None:
        """Writes a file in the work area from bytes or from a local file; parents are made."""
        await self._bridge.call(self._box.upload, path, source)

    async def download(self, path: str) -> bytes:
        """The contents of a file in the work area. Raises `FileNotFoundError`."""
        contents: bytes = await self._bridge.call(self._box.download, path)
        return contents

    async def download_to(self, path: str, target: Path) -> int:
        """Writes a file of the work area to a local file; its size in bytes."""
        size: int = await self._bridge.call(self._box.download_to, path, target)
        return size


class AsyncRunning:
    """A program under way: iterate for its output; `exit` is set once that has ended."""

    def __init__(self, bridge: Any, running: Running) -> None:
        self._bridge = bridge
        self._running = running

    @property
    def exit(self) -> Exit | None:
        """How the program ended, or None while it runs."""
        return self._running.exit

    def __aiter__(self) -> AsyncRunning:
        return self

    async def __anext__(self) -> Output:
        output: Output | None = await self._bridge.call(self._running.next)
        if output is None:
            raise StopAsyncIteration
        return output

    async def kill(self) -> None:
        """Ends the program and everything that it started."""
        await self._bridge.call(self._running.kill)
