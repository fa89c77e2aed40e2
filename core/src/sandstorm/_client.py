"""The client for blocking code.

This module loads values only. The engine, and with it trio, pluggy, cattrs and sqlite3, loads when a client is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import attrs

from sandstorm._call import (
    OnOutput,
    Opener,
    RouteOptions,
    RunOptions,
    SettingsSource,
    known,
    request_of,
    task_of,
)
from sandstorm._constraints import Constraints
from sandstorm._plan import Plan
from sandstorm._result import RunResult
from sandstorm._spec import Environment, SandboxSpec
from sandstorm._task import Task

if TYPE_CHECKING:
    from sandstorm._blocking import BlockingBox
    from sandstorm._custody import KeptSandbox
    from sandstorm._engine import Engine
    from sandstorm._loop import Loop
    from sandstorm._prepare import Prepared
    from sandstorm._reconciler import Reaped
    from sandstorm._status import PluginReport, ProviderStatus, RunRecord
    from sandstorm._store import RunRow


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
        from sandstorm._blocking import held
        from sandstorm._loop import Held

        known(options, RouteOptions)
        loop, engine = self._here()
        with held(
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
        keep: bool = False,
    ) -> Iterator[BlockingBox]:
        """A sandbox for several programs, destroyed at the end.

        Args:
            spec: The machine wanted; name the language in its `environment` where a provider should have a runtime.
            constraints: What it may cost and where it may go.
            strategy: The routing strategy.
            tenant: A trusted label.
            lifetime: Seconds after which the vendor ends it at the latest.
            keep: Whether it stays after the end, until its lifetime is over; `open_sandbox` finds it again.
        """
        from sandstorm._blocking import BlockingBox, held
        from sandstorm._box import open_box
        from sandstorm._loop import Held

        loop, engine = self._here()
        where = {"spec": spec, "constraints": constraints, "strategy": strategy, "tenant": tenant}
        request = request_of(engine, None, where, lifetime, keep=keep)
        with held(Held(loop, lambda: open_box(engine, request))) as box:
            yield BlockingBox(loop, box)

    @contextmanager
    def open_sandbox(self, sandbox: str) -> Iterator[BlockingBox]:
        """A kept sandbox, by its id or the id of its run; it is let be at the end. Raises `InvalidInput`, `SandboxGone`."""
        from sandstorm._blocking import BlockingBox, held
        from sandstorm._custody import reopen
        from sandstorm._loop import Held

        loop, engine = self._here()
        with held(Held(loop, lambda: reopen(engine, sandbox))) as box:
            yield BlockingBox(loop, box)

    def sandboxes(self) -> tuple[KeptSandbox, ...]:
        """Every kept sandbox that is there now."""
        from sandstorm._custody import kept_sandboxes

        loop, engine = self._here()
        return loop.call(kept_sandboxes, engine)

    def detach(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        lifetime: float | None = None,
        **options: Unpack[RunOptions],
    ) -> str:
        """The id of a run that goes on without this process, for `attach`; returns once the program has been started.

        `lifetime` is in seconds; by default what it wrote can be collected for ten minutes after its timeout.
        """
        from sandstorm._custody import COLLECT_SECONDS, detach

        task = task_of(code, language, options)
        loop, engine = self._here()
        seconds = task.timeout + COLLECT_SECONDS if lifetime is None else lifetime
        return loop.call(detach, engine, request_of(engine, task, options, seconds, keep=True))

    def attach(self, run_id: str, *, on_output: OnOutput | None = None) -> RunResult:
        """What came of a detached run, waited for; its sandbox is released then. Raises `OutcomeUnknown` where it is gone."""
        from sandstorm._custody import attach

        loop, engine = self._here()
        return loop.call(attach, engine, run_id, on_output)

    def reap(self) -> tuple[Reaped, ...]:
        """Closes what dead routers, lost answers and failed destroys left open, as every router does in the background.

        What each attempt came to; those that are still open say why.
        """
        loop, engine = self._here()
        return loop.call(engine.reconciler.sweep)

    def prepare(self, environment: Environment, **options: Unpack[RouteOptions]) -> Prepared:
        """Builds an environment where a run that asks for it would go, so that the run need not wait."""
        from sandstorm._prepare import PLANNED_SECONDS, prepare

        known(options, RouteOptions)
        spec = attrs.evolve(options.get("spec") or SandboxSpec(), environment=environment)
        loop, engine = self._here()
        return loop.call(prepare, engine, request_of(engine, None, {**options, "spec": spec}, PLANNED_SECONDS))

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
