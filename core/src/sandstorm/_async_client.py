"""The client for async code: trio and asyncio.

This module loads values only. The engine, and with it trio, pluggy, cattrs and sqlite3, loads when a client is opened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

import attrs

from sandstorm._call import OnOutput, Opener, RouteOptions, RunOptions, known, request_of, task_of
from sandstorm._constraints import Constraints
from sandstorm._plan import Plan
from sandstorm._result import RunResult
from sandstorm._spec import Environment, SandboxSpec
from sandstorm._task import Task

if TYPE_CHECKING:
    from sandstorm._async_box import AsyncBox
    from sandstorm._custody import KeptSandbox
    from sandstorm._engine import Engine
    from sandstorm._prepare import Prepared
    from sandstorm._reconciler import Reaped
    from sandstorm._store import RunRow


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
        keep: bool = False,
    ) -> AsyncIterator[AsyncBox]:
        """A sandbox for several programs, destroyed at the end unless it is to be kept; see `Sandstorm.sandbox`."""
        from sandstorm._async_box import AsyncBox
        from sandstorm._box import open_box

        where = {"spec": spec, "constraints": constraints, "strategy": strategy, "tenant": tenant}
        request = request_of(self._engine, None, where, lifetime, keep=keep)
        async with self._bridge.enter(lambda: open_box(self._engine, request)) as box:
            yield AsyncBox(self._bridge, box)

    @asynccontextmanager
    async def open_sandbox(self, sandbox: str) -> AsyncIterator[AsyncBox]:
        """A kept sandbox, by its id or the id of its run; it is let be at the end. Raises `InvalidInput`, `SandboxGone`."""
        from sandstorm._async_box import AsyncBox
        from sandstorm._custody import reopen

        async with self._bridge.enter(lambda: reopen(self._engine, sandbox)) as box:
            yield AsyncBox(self._bridge, box)

    async def sandboxes(self) -> tuple[KeptSandbox, ...]:
        """Every kept sandbox that is there now."""
        from sandstorm._custody import kept_sandboxes

        return await self._bridge.call(kept_sandboxes, self._engine)

    async def detach(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        lifetime: float | None = None,
        **options: Unpack[RunOptions],
    ) -> str:
        """The id of a run that goes on without this process, for `attach`; see `Sandstorm.detach`."""
        from sandstorm._custody import COLLECT_SECONDS, detach

        task = task_of(code, language, options)
        seconds = task.timeout + COLLECT_SECONDS if lifetime is None else lifetime
        return await self._bridge.call(detach, self._engine, request_of(self._engine, task, options, seconds, keep=True))

    async def attach(self, run_id: str, *, on_output: OnOutput | None = None) -> RunResult:
        """What came of a detached run, waited for; its sandbox is released then. Raises `OutcomeUnknown` where it is gone."""
        from sandstorm._custody import attach

        return await self._bridge.call(attach, self._engine, run_id, on_output)

    async def reap(self) -> tuple[Reaped, ...]:
        """Closes what dead routers, lost answers and failed destroys left open; see `Sandstorm.reap`."""
        return await self._bridge.call(self._engine.reconciler.sweep)

    async def prepare(self, environment: Environment, **options: Unpack[RouteOptions]) -> Prepared:
        """Builds an environment where a run that asks for it would go, so that the run need not wait."""
        from sandstorm._prepare import PLANNED_SECONDS, prepare

        known(options, RouteOptions)
        spec = attrs.evolve(options.get("spec") or SandboxSpec(), environment=environment)
        request = request_of(self._engine, None, {**options, "spec": spec}, PLANNED_SECONDS)
        return await self._bridge.call(prepare, self._engine, request)

    async def runs(self, *, limit: int = 20, tenant: str | None = None) -> Sequence[RunRow]:
        """The newest runs of the journal."""
        return await self._bridge.call(lambda: self._engine.store.runs(limit=limit, tenant=tenant))
