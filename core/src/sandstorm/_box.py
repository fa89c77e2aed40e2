"""A sandbox that stays while its context is open: several programs, files in and out, the vendor's own handle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from sandstorm._attempt import Failed, Trial, given_up
from sandstorm._capture import KILL_SECONDS, capture
from sandstorm._collapse import collapsed
from sandstorm._errors import InvalidInput, OutcomeUnknown, RunFailed, SandboxGone, StreamLost
from sandstorm._plan import Plan
from sandstorm._program import program
from sandstorm._quote import ZERO
from sandstorm._result import Artifact, Attempt, Exit, Outcome, RunResult
from sandstorm._spec import refuse_escape
from sandstorm._store import RunRow
from sandstorm._task import Task
from sandstorm.provider import Command, Output, Process, Sandbox

if TYPE_CHECKING:
    from sandstorm._engine import Engine
    from sandstorm._plan import Request

CHUNK = 256 * 1024
"""Bytes of a file that are in flight at once."""


class Running:
    """A program under way: iterate for its output; `exit` is set once that has ended."""

    def __init__(self, process: Process, received: trio.MemoryReceiveChannel[Output | Artifact | Exit | Exception]) -> None:
        self._process = process
        self._received = received
        self.exit: Exit | None = None

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> Output:
        """The next bytes. Raises `StreamLost` where the stream was cut."""
        while self.exit is None:
            event = await self._received.receive()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Output):
                return event
            if isinstance(event, Exit):
                self.exit = event
        raise StopAsyncIteration

    async def next(self) -> Output | None:
        """The next bytes, or None at the end."""
        return await anext(self, None)

    async def kill(self) -> None:
        """Ends the program and everything that it started."""
        await self._process.kill()


@attrs.define
class Box:
    """A sandbox that was made for the caller. Made by `Engine.sandbox`.

    Attributes:
        plan: The decision that led to it.
    """

    _engine: Engine
    _trial: Trial
    _sandbox: Sandbox
    plan: Plan
    _starts: int = 0
    _closed: bool = False

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
    def native(self) -> object:
        """The vendor's own handle."""
        return self._sandbox.native

    async def run(self, task: Task, on_output: Callable[[Output], None] | None = None) -> RunResult:
        """What came of a program that runs to its end here. Raises `OutcomeUnknown` where that is lost."""
        self._check()
        began = trio.current_time()
        prepared = program(task, self._engine.languages, self._start_id())
        for path, data in prepared.files.items():
            await self.upload(path, data)
        *compiling, running = prepared.commands
        try:
            for command in compiling:
                built = await capture(await self._sandbox.start(command), command)
                if built.exit is not None and not built.exit.ok:
                    built.exit = Exit(kind="compile-error", code=built.exit.status)
                    got = built
                    break
            else:
                got = await capture(await self._sandbox.start(running), running, on_output)
        except Exception as exc:
            if getattr(exc, "started", False):
                lost = attrs.evolve(self._trial.attempt, error=str(exc), error_class=type(exc).__name__)
                raise OutcomeUnknown([lost], self.plan) from exc
            raise
        assert got.exit is not None
        outputs = {}
        for path in task.outputs:
            try:
                outputs[path] = await self.download(path)
            except FileNotFoundError:
                continue
        seconds = trio.current_time() - began
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

    @asynccontextmanager
    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float = 300.0,
    ) -> AsyncIterator[Running]:
        """A program whose output is handed out as it comes. It is killed where the context ends first."""
        self._check()
        task = Task(argv=tuple(argv), stdin=stdin, timeout=timeout)
        if cwd is not None:
            refuse_escape("cwd", cwd)
        command = Command(
            argv=task.argv, env=dict(env or {}), cwd=cwd, stdin=task.stdin, timeout=task.timeout, start_id=self._start_id()
        )
        process = await self._sandbox.start(command)
        send, receive = trio.open_memory_channel[Output | Artifact | Exit | Exception](0)
        running = Running(process, receive)
        with collapsed():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, process, send)
                try:
                    yield running
                finally:
                    nursery.cancel_scope.cancel()
                    if running.exit is None:
                        with trio.CancelScope(shield=True, deadline=trio.current_time() + KILL_SECONDS):
                            await process.kill()

    async def upload(self, path: str, source: bytes | Path) -> None:
        """Writes a file in the work area from bytes or from a local file; parents are made."""
        self._check()
        refuse_escape("path", path)
        await self._sandbox.upload(path, _chunks(source))

    async def download(self, path: str) -> bytes:
        """The contents of a file in the work area. Raises `FileNotFoundError`."""
        self._check()
        refuse_escape("path", path)
        async with self._sandbox.download(path) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def download_to(self, path: str, target: Path) -> int:
        """Writes a file of the work area to a local file, which appears once it is whole; its size in bytes."""
        self._check()
        refuse_escape("path", path)
        part = target.with_name(target.name + ".part")
        size = 0
        try:
            async with self._sandbox.download(path) as chunks, await trio.open_file(part, "wb") as file:
                async for chunk in chunks:
                    size += await file.write(chunk)
            await trio.to_thread.run_sync(part.replace, target)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lambda: part.unlink(missing_ok=True))
        return size

    def close(self) -> None:
        """Refuses every further call: the sandbox is being released."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise SandboxGone(f"the sandbox {self.id} was released when its context ended")

    def _start_id(self) -> str:
        self._starts += 1
        return f"{self._trial.row.id}-s{self._starts}"

    def _left(self, cost: Decimal | None) -> Decimal | None:
        exposure = self._trial.row.exposure
        return None if cost is None or exposure is None else max(ZERO, exposure - cost)


@asynccontextmanager
async def open_box(engine: Engine, request: Request) -> AsyncIterator[Box]:
    """A sandbox from the first candidate that gives one, destroyed at the end. Raises as `Engine.run` does."""
    plan = await engine.planned(request)
    secrets = await engine.secrets(request.spec.secrets)
    row = engine.recorder.planned(plan)
    failed: list[Attempt] = []
    for number, ranked in enumerate(plan.candidates, 1):
        trial = engine.trial(plan, ranked, number, secrets)
        try:
            await trial.open(row)
            sandbox = await trial.create({})
            await trial.keep()
        except Failed as failure:
            failed.append(await trial.fail(failure))
            if failure.movable:
                continue
            await engine.give_up(row, failure.cause, secrets)
            raise failure.cause from None
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                if not trial.abandoned:
                    await trial.fail(Failed(given_up(exc), started=False))
                await engine.give_up(row, given_up(exc), secrets, "cancelled" if isinstance(exc, trio.Cancelled) else "failed")
            raise
        async with _held(engine, trial, sandbox, row) as box:
            yield box
        return
    ended = RunFailed(failed, plan)
    await engine.give_up(row, ended, secrets)
    raise ended


@asynccontextmanager
async def _held(engine: Engine, trial: Trial, sandbox: Sandbox, row: RunRow) -> AsyncIterator[Box]:
    box = Box(engine=engine, trial=trial, sandbox=sandbox, plan=trial.plan)
    began = trio.current_time()
    try:
        yield box
    finally:
        box.close()
        with trio.CancelScope(shield=True):
            trial.finish()
            seconds = trio.current_time() - began
            ended = attrs.evolve(row, state="finished", provider=box.provider, seconds=seconds, cost=trial.spent)
            await engine.store.finish(ended, trial.row, ())
            await trial.release()
        trial.closed()


async def _pump(process: Process, send: trio.MemorySendChannel[Output | Artifact | Exit | Exception]) -> None:
    async with send:
        try:
            async with process.events() as events:
                async for event in events:
                    await send.send(event)
                    if isinstance(event, Exit):
                        return
            await send.send(StreamLost("the output ended without an exit"))
        except Exception as exc:
            await send.send(exc)


async def _chunks(source: bytes | Path) -> AsyncIterator[bytes]:
    if isinstance(source, Path):
        try:
            file = await trio.open_file(source, "rb")
        except OSError as exc:
            raise InvalidInput("source", "a local file that can be read", str(source)) from exc
        async with file:
            while chunk := await file.read(CHUNK):
                yield chunk
        return
    for start in range(0, len(source), CHUNK):
        yield source[start : start + CHUNK]
