"""Each wrong provider is caught by the clause that it breaks, and by that one at least."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import ClassVar

import attrs
import pytest
from trio.testing import MockClock

from sandstorm.provider import Exit, Output, SandboxGone, refuse_escape
from sandstorm.testing import ReferenceProvider
from sandstorm_conformance import Dialect, Program, ProviderConformance


class ToyDialect(Dialect):
    """Programs in the language of the reference provider."""

    def _toy(self, text, **files):
        return Program(("run", "program"), {"program": text.encode(), **files})

    def emit(self, stdout, line):
        return self._toy(f"read emitted\nerr {line}", emitted=stdout)

    def echo(self):
        return self._toy("cat")

    def exits(self, code):
        return self._toy(f"exit {code}")

    def dies(self, number):
        return self._toy(f"signal {number}")

    def floods(self, count):
        return self._toy(f"flood {count}")

    def swaps(self):
        return self._toy("read state\nwrite state again", state=b"first")

    def leaves_child(self, path, seconds):
        return self._toy(f"sleep {seconds}\nwrite {path} x\nsleep 60")


class Passing:
    """Something of the contract, passed through but for what a subclass breaks."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


@attrs.define
class Mutant:
    """A reference provider, with a session, a sandbox or a process that is wrong."""

    session: type = Passing
    sandbox: type = Passing
    process: type = Passing
    less: int = 0

    def build(self):
        mutant, inner = self, ReferenceProvider()

        class Sandbox(mutant.sandbox):
            async def start(self, command):
                return mutant.process(await super().start(command))

        class Session(mutant.session):
            async def create(self, order):
                return Sandbox(await super().create(order))

            async def attach(self, sandbox_id):
                return Sandbox(await super().attach(sandbox_id))

        class Provider(Passing):
            def offers(self, spec, facts):
                return [attrs.evolve(offer, memory=offer.memory - mutant.less) for offer in inner.offers(spec, facts)]

            @asynccontextmanager
            async def connect(self):
                async with inner.connect() as session:
                    yield Session(session)

        return Provider(inner)


class Session(Passing):
    async def create(self, order):
        return await self._inner.create(order)

    async def attach(self, sandbox_id):
        return await self._inner.attach(sandbox_id)


class Sandbox(Passing):
    async def start(self, command):
        return await self._inner.start(command)


class FindsNothing(Session):
    @asynccontextmanager
    async def find(self, marker=None):
        async def none():
            for nothing in ():
                yield nothing

        yield none()


class FindsAll(Session):
    def find(self, marker=None):
        return self._inner.find(None)


class ForgetsMarker(Session):
    numbers = 0

    async def create(self, order):
        self.numbers += 1
        return await self._inner.create(attrs.evolve(order, marker=f"another-{self.numbers}"))


class IgnoresDispatchBy(Session):
    async def create(self, order):
        return await self._inner.create(attrs.evolve(order, dispatch_by=math.inf))


class IgnoresLifetime(Session):
    async def create(self, order):
        return await self._inner.create(attrs.evolve(order, lifetime=3600.0))


class AttachMakesAnother(Session):
    async def attach(self, sandbox_id):
        return _Empty(await self._inner.attach(sandbox_id))


class _Empty(Sandbox):
    def download(self, path):
        return self._inner.download("another")


class AttachesToAnything(Session):
    async def attach(self, sandbox_id):
        try:
            return await self._inner.attach(sandbox_id)
        except SandboxGone:
            return Sandbox(None)


class DestroysNothing(Sandbox):
    async def destroy(self):
        pass


class DestroyRaisesAgain(Sandbox):
    over = False

    async def destroy(self):
        if self.over:
            raise SandboxGone("again")
        self.over = True
        await self._inner.destroy()


class Changes(Sandbox):
    """Starts another command than it was told."""

    fields: ClassVar[dict] = {}

    async def start(self, command):
        return await self._inner.start(attrs.evolve(command, **self.fields))


class StartsAgain(Changes):
    fields: ClassVar[dict] = {"start_id": ""}


class IgnoresDeadline(Changes):
    fields: ClassVar[dict] = {"timeout": 3600.0}


class IgnoresOutputLimit(Changes):
    fields: ClassVar[dict] = {"output_limit": 1 << 30}


class LosesStdin(Changes):
    fields: ClassVar[dict] = {"stdin": b""}


class TruncatesDownloads(Sandbox):
    @asynccontextmanager
    async def download(self, path):
        async def first(chunks):
            async for chunk in chunks:
                yield chunk
                return

        async with self._inner.download(path) as chunks:
            yield first(chunks)


class QuotesNames(Sandbox):
    async def upload(self, path, chunks):
        await self._inner.upload(path.replace("$(id)", "root"), chunks)


class AcceptsEscapes(Sandbox):
    async def upload(self, path, chunks):
        try:
            refuse_escape("path", path)
        except ValueError:
            return
        await self._inner.upload(path, chunks)


class MissingIsEmpty(Sandbox):
    @asynccontextmanager
    async def download(self, path):
        async def none():
            for nothing in ():
                yield nothing

        try:
            async with self._inner.download(path) as chunks:
                yield chunks
        except FileNotFoundError:
            yield none()


class ReconnectsAtZero(Sandbox):
    def __getattr__(self, name):
        if name != "process":
            return super().__getattr__(name)

        async def process(process_id, offsets):
            return await self._inner.process(process_id, {})

        return process


class Rewrites(Passing):
    """Changes each event."""

    def event(self, event):
        return event

    @asynccontextmanager
    async def events(self):
        async def changed(events):
            async for event in events:
                other = self.event(event)
                if other is not None:
                    yield other

        async with self._inner.events() as events:
            yield changed(events)


class Merges(Rewrites):
    def event(self, event):
        return attrs.evolve(event, stream="stdout", offset=0) if isinstance(event, Output) and event.stream == "stderr" else event


class DropsStderr(Rewrites):
    def event(self, event):
        return None if isinstance(event, Output) and event.stream == "stderr" else event


class DecodesOutput(Rewrites):
    def event(self, event):
        data = getattr(event, "data", b"").decode(errors="ignore").encode()
        return attrs.evolve(event, data=data) if isinstance(event, Output) else event


class EndsWithoutExit(Rewrites):
    def event(self, event):
        return None if isinstance(event, Exit) else event


class LosesCode(Rewrites):
    def event(self, event):
        return Exit(code=0) if isinstance(event, Exit) and event.kind == "exited" else event


class SignalIsCode(Rewrites):
    def event(self, event):
        return Exit(code=128 + event.signal) if isinstance(event, Exit) and event.kind == "signal" else event


class KillsNothing(Passing):
    async def kill(self):
        pass


MUTANTS = [
    ("offer:size:at-least-as-asked", Mutant(less=1)),
    ("find:after-create:within-declared-lag", Mutant(session=FindsNothing)),
    ("find:after-create:within-declared-lag", Mutant(session=ForgetsMarker)),
    ("find:marker:sees-own-only", Mutant(session=FindsAll)),
    ("find:destroyed:gone", Mutant(sandbox=DestroysNothing)),
    ("create:dispatch-by:refused", Mutant(session=IgnoresDispatchBy)),
    ("lifecycle:start-twice:runs-once", Mutant(sandbox=StartsAgain)),
    ("limits:lifetime:enforced", Mutant(session=IgnoresLifetime)),
    ("destroy:twice:ok", Mutant(sandbox=DestroyRaisesAgain)),
    ("attach:by-id:same-sandbox", Mutant(session=AttachMakesAnother)),
    ("attach:unknown:gone", Mutant(session=AttachesToAnything)),
    ("exec:output:binary-exact", Mutant(process=DecodesOutput)),
    ("exec:output:split", Mutant(process=Merges)),
    ("exec:output:split", Mutant(process=DropsStderr)),
    ("exec:stream:ends-with-exit", Mutant(process=EndsWithoutExit)),
    ("exec:stdin:eof", Mutant(sandbox=LosesStdin)),
    ("exit:code:exact", Mutant(process=LosesCode)),
    ("exit:signal:named", Mutant(process=SignalIsCode)),
    ("limits:deadline:kills-the-tree", Mutant(sandbox=IgnoresDeadline)),
    ("limits:output:cut", Mutant(sandbox=IgnoresOutputLimit)),
    ("kill:running:ends", Mutant(process=KillsNothing)),
    ("files:round-trip:exact", Mutant(sandbox=TruncatesDownloads)),
    ("files:names:metacharacters", Mutant(sandbox=QuotesNames)),
    ("files:path:refuses-escape", Mutant(sandbox=AcceptsEscapes)),
    ("files:missing:named", Mutant(sandbox=MissingIsEmpty)),
    ("abilities:reconnect:at-offset", Mutant(sandbox=ReconnectsAtZero)),
]


class Suite(ProviderConformance):
    __test__ = False
    dialect = ToyDialect()

    def new_clock(self):
        return MockClock(autojump_threshold=0)


TESTS = {test.clause.id: test for name, test in vars(ProviderConformance).items() if name.startswith("test_")}


@pytest.mark.parametrize("clause", TESTS)
def test_the_wrapping_alone_breaks_nothing(clause):
    """A wrapped provider with no fault passes, so that what is caught below is the fault."""
    TESTS[clause](Suite(), Mutant(session=Session, sandbox=Sandbox).build())


@pytest.mark.parametrize(("clause", "mutant"), MUTANTS)
def test_the_clause_catches_the_mutant(clause, mutant):
    """The clause that a wrong provider breaks fails on it."""
    mutant = attrs.evolve(
        mutant,
        session=Session if mutant.session is Passing else mutant.session,
        sandbox=Sandbox if mutant.sandbox is Passing else mutant.sandbox,
    )
    with pytest.raises((Exception, pytest.fail.Exception)):
        TESTS[clause](Suite(), mutant.build())
