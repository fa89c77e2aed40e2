"""The user's client: one set of methods for blocking code, trio and asyncio.

This module loads values only. The engine, and with it trio, pluggy, cattrs and sqlite3, loads when a client is opened.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs

from sandstorm._constraints import Constraints
from sandstorm._errors import InvalidInput
from sandstorm._plan import Plan
from sandstorm._result import Exit, RunResult
from sandstorm._spec import SandboxSpec
from sandstorm._task import Task

if TYPE_CHECKING:
    from sandstorm._box import Box, Running
    from sandstorm._engine import Engine
    from sandstorm._loop import Held, Loop
    from sandstorm._plan import Request
    from sandstorm._settings import Settings
    from sandstorm._status import PluginReport, ProviderStatus, RunRecord
    from sandstorm._store import RunRow
    from sandstorm.provider import Output

SettingsSource = str | os.PathLike[str] | Mapping[str, Any] | None
OnOutput = Callable[["Output"], None]
Where = tuple[SandboxSpec | None, Constraints | None, str | None, str]


def task_of(
    code: str | None,
    language: str | None,
    *,
    argv: Sequence[str] | None,
    task: Task | None,
    **fields: Any,
) -> Task:
    """The task that the arguments of `run` describe. Raises `InvalidInput`."""
    given = {name: value for name, value in fields.items() if value is not None}
    if task is not None:
        if code is not None or argv is not None or language is not None or given:
            raise InvalidInput("task", "either a task or its fields, and not both", given or code or argv)
        return task
    return Task(code=code, language=language, argv=argv or (), **given)


@attrs.frozen(kw_only=True)
class Setup:
    """What a client will use.

    Attributes:
        settings: The path of the settings file, or None where the defaults apply.
        store: The URL of the store.
    """

    settings: str | None
    store: str


class _Opened:
    """What both clients share: how the engine is opened, and requests are built."""

    def __init__(self, *, settings: SettingsSource = None, plugins: Iterable[tuple[str, object]] = (), store: Any = None) -> None:
        self._settings = settings
        self._plugins = tuple(plugins)
        self._store = store

    def setup(self) -> Setup:
        """Which settings file and store apply; opens neither the store nor a plugin. Raises `SettingsError`."""
        from sandstorm._settings import default_store_url

        settings = self._read_settings()
        return Setup(settings=settings.path, store=settings.store or default_store_url())

    def _read_settings(self) -> Settings:
        from sandstorm._settings import load_settings, settings_of

        given = self._settings
        return settings_of(given) if isinstance(given, Mapping) else load_settings(given)

    def _open_engine(self) -> Any:
        from sandstorm._engine import open_engine

        return open_engine(self._read_settings(), extra=self._plugins, store=self._store)


class AsyncSandstorm(_Opened):
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
        argv: Sequence[str] | None = None,
        args: Sequence[str] | None = None,
        stdin: bytes | str | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] | None = None,
        effects: str | None = None,
        output_limit: int | None = None,
        task: Task | None = None,
        spec: SandboxSpec | None = None,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
        on_output: OnOutput | None = None,
    ) -> RunResult:
        """What came of the program; see `Sandstorm.run`."""
        fields = {
            "args": args,
            "stdin": stdin,
            "timeout": timeout,
            "outputs": outputs,
            "effects": effects,
            "output_limit": output_limit,
        }
        wanted = task_of(code, language, argv=argv, task=task, **fields)
        request = self._request(wanted, (spec, constraints, strategy, tenant))
        return await self._bridge.call(self._engine.run, request, on_output)

    async def plan(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        argv: Sequence[str] | None = None,
        timeout: float | None = None,
        task: Task | None = None,
        spec: SandboxSpec | None = None,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
    ) -> Plan:
        """The decision that `run` would make; runs nothing."""
        wanted = task_of(code, language, argv=argv, task=task, timeout=timeout)
        return await self._bridge.call(self._engine.plan, self._request(wanted, (spec, constraints, strategy, tenant)))

    @asynccontextmanager
    async def map(
        self,
        tasks: Iterable[Task],
        *,
        concurrency: int = 10,
        spec: SandboxSpec | None = None,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
    ) -> AsyncIterator[AsyncIterator[tuple[Task, RunResult | Exception]]]:
        """An iterator over each task with its result or error, as they finish; see `Sandstorm.map`."""
        from sandstorm._batch import batch

        where: Where = (spec, constraints, strategy, tenant)
        async with self._bridge.enter(
            lambda: batch(self._engine, tasks, lambda task: self._request(task, where), concurrency)
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

        request = self._request(None, (spec, constraints, strategy, tenant), lifetime)
        async with self._bridge.enter(lambda: open_box(self._engine, request)) as box:
            yield AsyncBox(self._bridge, box)

    async def runs(self, *, limit: int = 20, tenant: str | None = None) -> Sequence[RunRow]:
        """The newest runs of the journal."""
        return await self._bridge.call(lambda: self._engine.store.runs(limit=limit, tenant=tenant))

    def _request(self, task: Task | None, where: Where, lifetime: float | None = None) -> Request:
        spec, constraints, strategy, tenant = where
        return self._engine.request(task, spec or SandboxSpec(), constraints or Constraints(), strategy, tenant, lifetime)


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
        argv: Sequence[str] | None = None,
        args: Sequence[str] | None = None,
        stdin: bytes | str | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] | None = None,
        task: Task | None = None,
        on_output: OnOutput | None = None,
    ) -> RunResult:
        """What came of a program that runs to its end here."""
        wanted = task_of(code, language, argv=argv, task=task, args=args, stdin=stdin, timeout=timeout, outputs=outputs)
        result: RunResult = await self._bridge.call(self._box.run, wanted, on_output)
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


class Sandstorm(_Opened):
    """Routes code to sandboxes, for blocking code. Enter it with `with`, or call `close` at the end.

    Args:
        settings: A settings file, or its contents as a mapping; None for `sandstorm.toml` where there is one.
        plugins: Further plugins, each a name and an object, beside the installed ones.
        store: A store object to use instead of the one that the settings name.
    """

    def __init__(self, *, settings: SettingsSource = None, plugins: Iterable[tuple[str, object]] = (), store: Any = None) -> None:
        super().__init__(settings=settings, plugins=plugins, store=store)
        self._opened: tuple[Loop, Engine] | None = None

    def __enter__(self) -> Sandstorm:
        self._here()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of everything that is under way, and closes the store."""
        if self._opened is not None:
            loop, _ = self._opened
            self._opened = None
            loop.close()

    def run(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        argv: Sequence[str] | None = None,
        args: Sequence[str] | None = None,
        stdin: bytes | str | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] | None = None,
        effects: str | None = None,
        output_limit: int | None = None,
        task: Task | None = None,
        spec: SandboxSpec | None = None,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
        on_output: OnOutput | None = None,
    ) -> RunResult:
        """What came of the program, on the provider that may run it and that the strategy puts first.

        Args:
            code: Source text, with `language`; or `argv` for a command; or a whole `task`.
            language: The name of a language recipe.
            argv: A command instead of code.
            args: Arguments for the program.
            stdin: What it reads.
            timeout: Seconds after which it is killed.
            outputs: Files to bring back.
            effects: `unknown`, `idempotent` or `none`.
            output_limit: Bytes of output after which it is killed.
            task: All of the above as a value.
            spec: The machine wanted.
            constraints: What it may cost, how long it may wait, where it may go.
            strategy: The routing strategy; that of the settings by default.
            tenant: A trusted label.
            on_output: Called with each piece of output as it comes, in another thread than the caller's.

        Raises:
            InvalidInput: An argument is wrong.
            Denied: A policy refused it.
            NoCandidate: No provider may run it.
            RunFailed: Every candidate failed before the program started.
            OutcomeUnknown: It may have run, and its result is lost.
        """
        fields = {
            "args": args,
            "stdin": stdin,
            "timeout": timeout,
            "outputs": outputs,
            "effects": effects,
            "output_limit": output_limit,
        }
        wanted = task_of(code, language, argv=argv, task=task, **fields)
        loop, engine = self._here()
        return loop.call(engine.run, self._request(wanted, (spec, constraints, strategy, tenant)), on_output)

    def plan(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        argv: Sequence[str] | None = None,
        timeout: float | None = None,
        task: Task | None = None,
        spec: SandboxSpec | None = None,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
    ) -> Plan:
        """The decision that `run` would make; runs nothing."""
        wanted = task_of(code, language, argv=argv, task=task, timeout=timeout)
        loop, engine = self._here()
        return loop.call(engine.plan, self._request(wanted, (spec, constraints, strategy, tenant)))

    def map(
        self,
        tasks: Iterable[Task],
        *,
        concurrency: int = 10,
        spec: SandboxSpec | None = None,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
    ) -> Iterator[tuple[Task, RunResult | Exception]]:
        """Each task with its result or error, as they finish; at most `concurrency` run at once.

        One task's failure does not end the others. Ending the iteration early cancels what is under way.
        """
        from sandstorm._batch import batch
        from sandstorm._loop import Held

        loop, engine = self._here()
        where: Where = (spec, constraints, strategy, tenant)
        with _held(Held(loop, lambda: batch(engine, tasks, lambda task: self._request(task, where), concurrency))) as results:
            while (item := loop.call(results.next)) is not None:
                yield item

    @contextmanager
    def sandbox(
        self,
        spec: SandboxSpec | None = None,
        *,
        constraints: Constraints | None = None,
        strategy: str | None = None,
        tenant: str = "default",
        lifetime: float = 3600.0,
    ) -> Iterator[BlockingBox]:
        """A sandbox for several programs, destroyed at the end.

        Args:
            spec: The machine wanted; name the language in its `environment` where a provider should have a runtime.
            constraints: What it may cost and where it may go.
            strategy: The routing strategy.
            tenant: A trusted label.
            lifetime: Seconds after which the vendor ends it at the latest.
        """
        from sandstorm._box import open_box
        from sandstorm._loop import Held

        loop, engine = self._here()
        request = self._request(None, (spec, constraints, strategy, tenant), lifetime)
        with _held(Held(loop, lambda: open_box(engine, request))) as box:
            yield BlockingBox(loop, box)

    def runs(self, *, limit: int = 20, tenant: str | None = None) -> Sequence[RunRow]:
        """The newest runs of the journal."""
        loop, engine = self._here()
        return loop.call(lambda: engine.store.runs(limit=limit, tenant=tenant))

    def show(self, run_id: str) -> RunRecord:
        """One run with its attempts and ledger, by its id or the beginning of it. Raises `InvalidInput`."""
        from sandstorm._status import run_record

        loop, engine = self._here()
        return loop.call(run_record, engine, run_id)

    def providers(self) -> tuple[ProviderStatus, ...]:
        """Every configured account, whether it works, and what it offers by default."""
        from sandstorm._status import provider_statuses

        loop, engine = self._here()
        return loop.call(provider_statuses, engine)

    def plugins(self) -> PluginReport:
        """The plugins that were loaded, and those that were set aside with the reason."""
        from sandstorm._status import plugin_report

        return plugin_report(self._here()[1])

    def language_of(self, path: str) -> str | None:
        """The language that a file's name tells, or None."""
        recipe = self._here()[1].languages.of_file(path)
        return None if recipe is None else recipe.language

    def _here(self) -> tuple[Loop, Engine]:
        if self._opened is None:
            from sandstorm._loop import Loop

            loop = Loop(self._open_engine)
            self._opened = loop, loop.start()
        return self._opened

    def _request(self, task: Task | None, where: Where, lifetime: float | None = None) -> Request:
        spec, constraints, strategy, tenant = where
        return self._here()[1].request(task, spec or SandboxSpec(), constraints or Constraints(), strategy, tenant, lifetime)


class BlockingBox:
    """A sandbox, for blocking code. Made by `Sandstorm.sandbox`."""

    def __init__(self, loop: Loop, box: Box) -> None:
        self._loop = loop
        self._box = box
        self.id = box.id
        self.provider = box.provider
        self.isolation = box.isolation
        self.plan = box.plan

    @property
    def native(self) -> object:
        """The vendor's own handle."""
        return self._box.native

    def run(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        argv: Sequence[str] | None = None,
        args: Sequence[str] | None = None,
        stdin: bytes | str | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] | None = None,
        task: Task | None = None,
        on_output: OnOutput | None = None,
    ) -> RunResult:
        """What came of a program that runs to its end here."""
        wanted = task_of(code, language, argv=argv, task=task, args=args, stdin=stdin, timeout=timeout, outputs=outputs)
        return self._loop.call(self._box.run, wanted, on_output)

    @contextmanager
    def exec(self, *argv: str, stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: str | None = None,
             timeout: float = 300.0) -> Iterator[BlockingRunning]:  # fmt: skip
        """A program whose output is handed out as it comes; it is killed where the context ends first."""
        from sandstorm._loop import Held

        held = Held(self._loop, lambda: self._box.exec(argv, stdin=stdin, env=env, cwd=cwd, timeout=timeout))
        with _held(held) as running:
            yield BlockingRunning(self._loop, running)

    def upload(self, path: str, source: bytes | Path) -> None:
        """Writes a file in the work area from bytes or from a local file; parents are made."""
        self._loop.call(self._box.upload, path, source)

    def download(self, path: str) -> bytes:
        """The contents of a file in the work area. Raises `FileNotFoundError`."""
        return self._loop.call(self._box.download, path)

    def download_to(self, path: str, target: Path) -> int:
        """Writes a file of the work area to a local file; its size in bytes."""
        return self._loop.call(self._box.download_to, path, target)


class BlockingRunning:
    """A program under way: iterate for its output; `exit` is set once that has ended."""

    def __init__(self, loop: Loop, running: Running) -> None:
        self._loop = loop
        self._running = running

    @property
    def exit(self) -> Exit | None:
        """How the program ended, or None while it runs."""
        return self._running.exit

    def __iter__(self) -> BlockingRunning:
        return self

    def __next__(self) -> Output:
        output = self._loop.call(self._running.next)
        if output is None:
            raise StopIteration
        return output

    def kill(self) -> None:
        """Ends the program and everything that it started."""
        self._loop.call(self._running.kill)


@contextmanager
def _held(held: Held[Any]) -> Iterator[Any]:
    """The value of a context that is held in the loop; it ends with the block, also after Ctrl-C."""
    try:
        value = held.entered.result()
        yield value
    except BaseException:
        held.job.cancel() if not held.entered.done() else held.leave()
        held.job.future.exception()
        raise
    held.leave()
    held.job.future.result()
