"""The client for blocking code.

This module loads values only. The engine, and with it trio, pluggy, cattrs and sqlite3, loads when a client is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from sandstorm._call import (
    OnOutput,
    Opener,
    RouteOptions,
    RunOptions,
    SettingsSource,
    TaskOptions,
    known,
    request_of,
    task_of,
)
from sandstorm._constraints import Constraints
from sandstorm._plan import Plan
from sandstorm._result import Exit, RunResult
from sandstorm._spec import SandboxSpec
from sandstorm._task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from sandstorm._box import Box, Running
    from sandstorm._engine import Engine
    from sandstorm._loop import Held, Loop
    from sandstorm._status import PluginReport, ProviderStatus, RunRecord
    from sandstorm._store import RunRow
    from sandstorm.provider import Output


class Sandstorm(Opener):
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
        on_output: OnOutput | None = None,
        **options: Unpack[RunOptions],
    ) -> RunResult:
        """What came of the program, on the provider that may run it and that the strategy puts first.

        Args:
            code: Source text, with `language`; or `argv` for a command; or a whole `task`.
            language: The name of a language recipe.
            options: What to run and where it may go: see `TaskOptions` and `RouteOptions`.
            on_output: Called with each piece of output as it comes, in another thread than the caller's.

        Raises:
            InvalidInput: An argument is wrong.
            Denied: A policy refused it.
            NoCandidate: No provider may run it.
            RunFailed: Every candidate failed before the program started.
            OutcomeUnknown: It may have run, and its result is lost.
        """
        task = task_of(code, language, options)
        loop, engine = self._here()
        return loop.call(engine.run, request_of(engine, task, options), on_output)

    def plan(
        self,
        code: str | None = None,
        language: str | None = None,
        **options: Unpack[RunOptions],
    ) -> Plan:
        """The decision that `run` would make; runs nothing."""
        task = task_of(code, language, options)
        loop, engine = self._here()
        return loop.call(engine.plan, request_of(engine, task, options))

    def map(
        self,
        tasks: Iterable[Task],
        *,
        concurrency: int = 10,
        **options: Unpack[RouteOptions],
    ) -> Iterator[tuple[Task, RunResult | Exception]]:
        """Each task with its result or error, as they finish; at most `concurrency` run at once.

        One task's failure does not end the others. Ending the iteration early cancels what is under way.
        """
        from sandstorm._batch import batch
        from sandstorm._loop import Held

        known(options, RouteOptions)
        loop, engine = self._here()
        with _held(
            Held(loop, lambda: batch(engine, tasks, lambda task: request_of(engine, task, options), concurrency))
        ) as results:
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
        where = {"spec": spec, "constraints": constraints, "strategy": strategy, "tenant": tenant}
        request = request_of(engine, None, where, lifetime)
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

    def _here(self) -> tuple[Loop, Engine]:
        if self._opened is None:
            from sandstorm._loop import Loop

            loop = Loop(self._open_engine)
            self._opened = loop, loop.start()
        return self._opened


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
        on_output: OnOutput | None = None,
        **options: Unpack[TaskOptions],
    ) -> RunResult:
        """What came of a program that runs to its end here."""
        task = task_of(code, language, options, TaskOptions)
        return self._loop.call(self._box.run, task, on_output)

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
