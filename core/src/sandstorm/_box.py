"""A sandbox for several programs: one that ends with its context, one that is kept, or one that was kept before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from sandstorm._attempt import Trial
from sandstorm._capture import Capture, capture
from sandstorm._errors import InvalidInput, NotSupported, OutcomeUnknown, SandboxGone
from sandstorm._files import FileChange, FileInfo
from sandstorm._masker import scrub
from sandstorm._plan import Plan
from sandstorm._program import not_compiled, program
from sandstorm._quote import ZERO, cost
from sandstorm._result import Outcome, RunResult
from sandstorm._running import Running, followed
from sandstorm._spec import refuse_escape
from sandstorm._store import RunRow
from sandstorm._task import Task
from sandstorm._transfer import OnBytes, download, download_directory, download_to, upload, upload_directory
from sandstorm.provider import (
    Command,
    Extend,
    Files,
    Fork,
    Interpreter,
    Output,
    Pause,
    Ports,
    Sandbox,
    Snapshot,
    Watch,
)

if TYPE_CHECKING:
    from sandstorm._engine import Engine
    from sandstorm._plan import Request

Ability = TypeVar("Ability")

SNAPSHOT_RETENTION = 7 * 86400.0
"""Seconds for which a snapshot is kept by default."""

_EXTEND_SECONDS = 60.0


@attrs.define
class Box:
    """A sandbox that was made for the caller. Made by `open_box` and `reopen`.

    Attributes:
        plan: The decision that led to it.
    """

    _engine: Engine
    _trial: Trial
    _sandbox: Sandbox
    _row: RunRow
    _starts: str = ""
    _count: int = 0
    _closed: bool = False

    @property
    def plan(self) -> Plan:
        """The decision that led to it."""
        return self._trial.plan

    @property
    def id(self) -> str:
        """The vendor's id of the sandbox."""
        return self._sandbox.id

    @property
    def provider(self) -> str:
        """The account that runs it."""
        return self._trial.row.provider

    @property
    def isolation(self) -> str:
        """The level that was verified there."""
        return self._trial.candidate.offer.isolation

    @property
    def expires_at(self) -> float:
        """Wall-clock seconds since 1970 at which it ends at the latest."""
        return self._trial.row.expires_at

    @property
    def native(self) -> object:
        """The vendor's own handle."""
        return self._sandbox.native

    # --- programs ----------------------------------------------------------------------------------------

    async def run(self, task: Task, on_output: Callable[[Output], None] | None = None, *, keep_state: bool = False) -> RunResult:
        """What came of a program that runs to its end here. Raises `OutcomeUnknown` where that is lost.

        With `keep_state` it is a cell of an interpreter: what it defines is there for the next one, and what it shows comes
        as `artifacts`.
        """
        self._check()
        began = trio.current_time()
        try:
            got = await (self._cell(task, on_output) if keep_state else self._program(task, on_output))
        except Exception as exc:
            scrub(exc, self._trial.secrets.values())
            if getattr(exc, "started", False):
                lost = attrs.evolve(self._trial.attempt, error=str(exc), error_class=type(exc).__name__)
                raise OutcomeUnknown([lost], self.plan) from exc
            raise
        outputs = {}
        for path in task.outputs:
            try:
                outputs[path] = await self.download(path)
            except FileNotFoundError:
                continue
        return self._result(got, outputs, trio.current_time() - began)

    async def _program(self, task: Task, on_output: Callable[[Output], None] | None) -> Capture:
        prepared = program(task, self._engine.languages, self._start_id())
        for path, data in prepared.files.items():
            await self.upload(path, data)
        *compiling, running = prepared.commands
        for command in compiling:
            built = await capture(await self._sandbox.start(command), command)
            if built.exit is not None and not built.exit.ok:
                built.exit = not_compiled(built.exit)
                return built
        return await capture(await self._sandbox.start(running), running, on_output, self._trial.again(self._sandbox))

    async def _cell(self, task: Task, on_output: Callable[[Output], None] | None) -> Capture:
        if task.code is None or task.language is None:
            raise InvalidInput("keep_state", "code in a language, since a command keeps no state", True)
        if task.stdin or task.args:
            raise InvalidInput("keep_state", "neither stdin nor args, which a cell does not have", True)
        recipe = self._engine.languages.recipe(task.language)
        interpreter = self._able("Interpreter", Interpreter)  # type: ignore[type-abstract]
        command = Command(argv=(), timeout=task.timeout, output_limit=task.output_limit, start_id=self._start_id())
        return await capture(await interpreter.run_cell(task.code, recipe.language, command), command, on_output)

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float = 300.0,
        output_limit: int = 16 * 1024 * 1024,
        interactive: bool = False,
        terminal: tuple[int, int] | None = None,
    ) -> AbstractAsyncContextManager[Running]:
        """A program whose output is handed out as it comes. It is killed where the context ends first.

        With `interactive` its stdin stays open for `Running.write`; with `terminal` (columns, rows) it has one.
        """
        task = Task(argv=tuple(argv), timeout=timeout, output_limit=output_limit)
        return self._exec(
            Command(
                argv=task.argv,
                env=dict(env or {}),
                cwd=cwd,
                stdin=stdin,
                timeout=task.timeout,
                output_limit=task.output_limit,
                interactive=interactive or terminal is not None,
                terminal=terminal,
            )
        )

    @asynccontextmanager
    async def _exec(self, command: Command) -> AsyncIterator[Running]:
        self._check()
        if command.cwd is not None:
            refuse_escape("cwd", command.cwd)
        if command.interactive:
            self._declared("Interactive")
        process = await self._sandbox.start(attrs.evolve(command, start_id=self._start_id()))
        async with followed(process) as running:
            yield running

    # --- files -------------------------------------------------------------------------------------------

    async def upload(self, path: str, source: bytes | Path, on_bytes: OnBytes | None = None) -> None:
        """Writes a file in the work area from bytes or from a local file; parents are made."""
        self._check()
        await upload(self._sandbox, path, source, on_bytes)

    async def download(self, path: str) -> bytes:
        """The contents of a file in the work area. Raises `FileNotFoundError`."""
        self._check()
        return await download(self._sandbox, path)

    async def download_to(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a file of the work area to a local file, which appears once it is whole; its size in bytes."""
        self._check()
        return await download_to(self._sandbox, path, target, on_bytes)

    async def upload_directory(self, path: str, source: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a local directory into one of the work area; how many files that were."""
        self._check()
        return await upload_directory(self._sandbox, _directory(path), source, on_bytes)

    async def download_directory(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> list[FileInfo]:
        """Writes a directory of the work area to a local one; the entries that were left out: links, pipes and the like."""
        return await download_directory(self._sandbox, self._files(), _directory(path), target, on_bytes)

    async def list(self, path: str = ".", *, recursive: bool = False) -> list[FileInfo]:
        """What is in a directory of the work area. Raises `FileNotFoundError`."""
        async with self._files().list(_directory(path), recursive=recursive) as entries:
            return [entry async for entry in entries]

    async def stat(self, path: str) -> FileInfo:
        """One entry of the work area. Raises `FileNotFoundError`."""
        return await self._files().stat(_directory(path))

    async def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        refuse_escape("path", path)
        await self._files().make_directory(path)

    async def remove(self, path: str) -> None:
        """Removes a file, or a directory with all that is in it. Raises `FileNotFoundError`."""
        refuse_escape("path", path)
        await self._files().remove(path)

    @asynccontextmanager
    async def watch(self, path: str = ".") -> AsyncIterator[Watching]:
        """The changes in a directory from now on, as they come."""
        self._check()
        watching = self._able("Watch", Watch)  # type: ignore[type-abstract]
        async with watching.watch(_directory(path)) as changes:
            yield Watching(changes)

    def _files(self) -> Files:
        self._check()
        return self._able("Files", Files)  # type: ignore[type-abstract]

    # --- the machine -------------------------------------------------------------------------------------

    async def url(self, port: int) -> str:
        """The address at which a port of the sandbox can be reached."""
        self._check()
        if not 1 <= port <= 65535:
            raise InvalidInput("port", "a whole number from 1 to 65535", port)
        return await self._able("Ports", Ports).url(port)  # type: ignore[type-abstract]

    async def pause(self) -> None:
        """Stops everything in it; `resume` goes on from there. Its lifetime goes on."""
        self._check()
        await self._able("Pause", Pause).pause()  # type: ignore[type-abstract]

    async def resume(self) -> None:
        """Goes on after `pause`."""
        self._check()
        await self._able("Pause", Pause).resume()  # type: ignore[type-abstract]

    async def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now; what that may cost is reserved first.

        Raises `InvalidInput` for more than its provider allows.
        """
        self._check()
        extending = self._able("Extend", Extend)  # type: ignore[type-abstract]
        age = trio.current_time() - self._trial.began
        most = self._trial.candidate.offer.lifetime
        if not 0 < lifetime <= most - age:
            raise InvalidInput("lifetime", f"seconds from now, above 0 and at most {most - age:.0f}", lifetime)
        await self._trial.prolong(self._engine.wall() + lifetime, _price(self._trial, age + lifetime))
        with trio.fail_after(_EXTEND_SECONDS):
            await extending.extend(lifetime)

    async def snapshot(self, retention: float = SNAPSHOT_RETENTION) -> str:
        """The name of a copy of its files, for `SandboxSpec.snapshot`; it is kept for `retention` seconds."""
        self._check()
        capturing = self._able("Snapshot", Snapshot)  # type: ignore[type-abstract]
        if not retention > 0:
            raise InvalidInput("retention", "a number of seconds above 0", retention)
        return await self._trial.snapshot(self._row, capturing, retention)

    @asynccontextmanager
    async def fork(self, *, keep: bool = False) -> AsyncIterator[Box]:
        """Another sandbox with the same files, destroyed at the end unless it is to be kept."""
        self._check()
        forking = self._able("Fork", Fork)  # type: ignore[type-abstract]
        parent = self._trial
        request = attrs.evolve(parent.plan.request, id=self._engine.new_id(), keep=keep)
        ranked = next(r for r in parent.plan.candidates if r.candidate == parent.candidate)
        plan = attrs.evolve(parent.plan, request=request, candidates=(attrs.evolve(ranked, reason=f"a fork of {self.id}"),))

        async def make(trial: Trial, row: RunRow) -> tuple[Trial, Sandbox, RunRow]:
            await trial.open(row)
            order = trial.order({})
            return trial, await trial.bind(lambda: forking.fork(order)), await _handed_out(trial, row)

        made = await self._engine.first(request, make, plan=plan)
        async with held(self._engine, *made) as box:
            yield box

    async def destroy(self) -> None:
        """Ends it now, whether it was to be kept or not. Succeeds if it has ended."""
        if self._closed:
            return
        self.close()
        with trio.CancelScope(shield=True):
            self._trial.finish()
            seconds = self._engine.wall() - self._trial.row.created_at
            row = attrs.evolve(self._row, state="finished", provider=self.provider, seconds=seconds, cost=self._trial.spent)
            await self._engine.store.finish(row, self._trial.row, ())
            await self._trial.release()
        self._trial.closed()

    def close(self) -> None:
        """Refuses every further call."""
        self._closed = True

    # --- inside ------------------------------------------------------------------------------------------

    def _result(self, got: Capture, outputs: dict[str, bytes], seconds: float) -> RunResult:
        assert got.exit is not None
        cost = self._trial.cost()
        return RunResult(
            id=self.plan.request.id,
            stdout=bytes(got.stdout),
            stderr=bytes(got.stderr),
            exit=got.exit,
            outputs=outputs,
            artifacts=tuple(got.artifacts),
            outcome=Outcome.FINISHED,
            provider=self.provider,
            isolation=self.isolation,
            isolation_detail=self._trial.candidate.offer.isolation_detail,
            total_seconds=seconds,
            run_seconds=seconds,
            cost=cost,
            cost_open=self._left(cost),
            attempts=(self._trial.attempt,),
            plan=self.plan,
        )

    def _check(self) -> None:
        if self._closed:
            raise SandboxGone(f"the sandbox {self.id} was released when its context ended")

    def _declared(self, ability: str) -> None:
        """Raises `NotSupported` at once, with the provider's reason, for what its offer does not declare."""
        offer = self._trial.candidate.offer
        if not offer.can(ability):
            raise NotSupported(f"{self.provider} has no {ability} here: {offer.reason(ability)}")

    def _able(self, ability: str, protocol: type[Ability]) -> Ability:
        self._declared(ability)
        if not isinstance(self._sandbox, protocol):
            raise NotSupported(f"{self.provider} declares {ability}, and its sandbox does not have it")
        return self._sandbox

    def _start_id(self) -> str:
        self._count += 1
        return f"{self._trial.row.id}-{self._starts}s{self._count}"

    def _left(self, cost: Decimal | None) -> Decimal | None:
        exposure = self._trial.row.exposure
        return None if cost is None or exposure is None else max(ZERO, exposure - cost)


@attrs.frozen
class Watching:
    """The changes in a directory, one after the other."""

    _changes: AsyncIterator[FileChange]

    def __aiter__(self) -> Watching:
        return self

    async def __anext__(self) -> FileChange:
        return await anext(self._changes)

    async def next(self) -> FileChange | None:
        """The next change, or None where there will be none any more."""
        return await anext(self._changes, None)


@asynccontextmanager
async def open_box(engine: Engine, request: Request) -> AsyncIterator[Box]:
    """A sandbox from the first candidate that gives one, destroyed at the end unless it is to be kept.

    Raises as `Engine.run` does.
    """

    async def make(trial: Trial, row: RunRow) -> tuple[Trial, Sandbox, RunRow]:
        await trial.open(row)
        return trial, await trial.create({}), await _handed_out(trial, row)

    made = await engine.first(request, make)
    async with held(engine, *made) as box:
        yield box


async def _handed_out(trial: Trial, row: RunRow) -> RunRow:
    await trial.keep()
    return row


@asynccontextmanager
async def held(engine: Engine, trial: Trial, sandbox: Sandbox, row: RunRow, starts: str = "") -> AsyncIterator[Box]:
    """The box of a sandbox that exists. At the end it is let be if it is kept, and destroyed else.

    `starts` sets the start ids of this box apart from those of others over the same sandbox.
    """
    box = Box(engine=engine, trial=trial, sandbox=sandbox, row=row, starts=starts)
    try:
        yield box
    finally:
        if trial.row.kept:
            box.close()
        await box.destroy()


def _price(trial: Trial, seconds: float) -> Decimal | None:
    """The most that `seconds` of life can cost in US dollars, or None where the price is unknown."""
    rates = trial.engine.accounts.providers[trial.row.provider].rates
    return None if rates is None else cost(rates, trial.candidate.offer, seconds, 1.0)


def _directory(path: str) -> str:
    """A path that may be the work area itself. Raises `InvalidInput` for one that leaves it."""
    if path in ("", "."):
        return "."
    refuse_escape("path", path)
    return path
