"""A provider that fails as a script says, at every step and in every way that the contract knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TypeVar

import attrs
import trio

from sandstorm._check import number, one_of, whole
from sandstorm._result import Artifact, Exit
from sandstorm.provider import (
    Ambiguous,
    AuthError,
    CapacityError,
    Command,
    Conflict,
    Declined,
    Facts,
    Gate,
    InvalidSpec,
    Marker,
    NotSupported,
    Offer,
    OneShot,
    Order,
    OutOfCredit,
    Output,
    PreparationFailed,
    Process,
    Provider,
    ProviderDown,
    QuotaError,
    RateCard,
    RateLimited,
    Reconnect,
    ResourceInfo,
    Sandbox,
    SandboxGone,
    SandboxLost,
    SandboxSpec,
    Session,
    StreamLost,
    Support,
    Traits,
)

T = TypeVar("T")

STEPS = (
    "connect",
    "refresh",
    "check",
    "create",
    "launch",
    "attach",
    "find",
    "start",
    "process",
    "burn",
    "upload",
    "download",
    "events",
    "kill",
    "destroy",
)
"""Where a fault can be injected: the methods of the contract, by their names."""

_ERRORS: dict[str, Callable[[], Exception]] = {
    "capacity": lambda: CapacityError("injected: no room"),
    "quota": lambda: QuotaError("injected: the account's cap is reached"),
    "rate-limited": lambda: RateLimited("injected: too many requests"),
    "out-of-credit": lambda: OutOfCredit("injected: no credit"),
    "auth": lambda: AuthError("injected: bad key"),
    "invalid-spec": lambda: InvalidSpec("injected: no such machine"),
    "preparation-caller": lambda: PreparationFailed("injected: does not resolve", fault="caller"),
    "preparation-provider": lambda: PreparationFailed("injected: the builder broke", fault="provider"),
    "provider-down": lambda: ProviderDown("injected: refused"),
    "ambiguous": lambda: Ambiguous("injected: the answer was lost"),
    "stream-lost": lambda: StreamLost("injected: the stream was cut"),
    "sandbox-lost": lambda: SandboxLost("injected: evicted"),
    "conflict": lambda: Conflict("injected: in use for something else"),
    "sandbox-gone": lambda: SandboxGone("injected: released before"),
    "not-supported": lambda: NotSupported("injected: not done here"),
    "unexpected": lambda: RuntimeError("injected: a bug in the adapter"),
}

KINDS = (*_ERRORS, "delay", "hang")
"""How a step can fail: every error class of the contract, an error of no such class, a late answer, and none at all."""

_PASSED = ("OneShot", "Reconnect", "Gate", "Detach", "Gpu", "NetworkRules")
_NOT_PASSED = Support("not-implemented", "the chaos provider does not pass it through")


@attrs.frozen(kw_only=True)
class Fault:
    """One line of the script: what goes wrong, where, and when.

    Attributes:
        step: One of `STEPS`.
        kind: One of `KINDS`. Within a sandbox, `sandbox-lost` and `sandbox-gone` tell the truth: it is destroyed first.
        after: Calls of the step that pass before it.
        times: Calls of the step that it hits from then on.
        committed: Whether the step takes effect at the vendor before the fault. Streams begin, and know no such thing.
        items: For `find`, `download` and `events`: items that come through before the fault; 0 for none.
        seconds: The delay, or the `retry_after` of a rate limit (0 for none).
    """

    step: str = attrs.field(converter=one_of("step", *STEPS))
    kind: str = attrs.field(converter=one_of("kind", *KINDS))
    after: int = attrs.field(default=0, converter=whole("after", "a whole number of calls"))
    times: int = attrs.field(default=1, converter=whole("times", "a whole number of calls, at least 1", low=1))
    committed: bool = False
    items: int = attrs.field(default=0, converter=whole("items", "a whole number of items"))
    seconds: float = attrs.field(default=0.0, converter=number("seconds", "a number of seconds"))


@attrs.frozen(kw_only=True)
class Injected:
    """A fault that met a call.

    Attributes:
        fault: The line of the script.
        call: The number of the call among those of its step, from 0.
        at: Seconds on trio's clock when it struck, or when it turned out that it would not.
        changed: Whether it changed the operation in flight. Not so where a stream ended before the fault was due,
            or where a step that was to take effect first failed by itself.
    """

    fault: Fault
    call: int
    at: float
    changed: bool


class Script:
    """The faults that are to come, the calls that were made, and what was injected."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        self.calls: Counter[str] = Counter()
        self.injected: list[Injected] = []

    async def call(self, step: str, act: Callable[[], Awaitable[T]], doom: Callable[[], Awaitable[None]] | None = None) -> T:
        """One step of the contract: `act`, unless a fault comes before it. `doom` destroys the sandbox concerned."""
        hit = self._draw(step)
        if hit is None:
            return await act()
        if not hit.fault.committed:
            await hit.strike(doom)
            return await act()
        try:
            result = await act()
        except BaseException:
            hit.record(changed=False)
            raise
        await hit.strike(doom)
        return result

    @asynccontextmanager
    async def stream(
        self,
        step: str,
        opened: Callable[[], AbstractAsyncContextManager[AsyncIterator[T]]],
        doom: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[AsyncIterator[T]]:
        """A stream of the contract, cut where a fault says."""
        hit = self._draw(step)
        if hit is not None and hit.fault.items == 0:
            await hit.strike(doom)
            hit = None
        async with opened() as items:
            if hit is None:
                yield items
            else:
                try:
                    async with aclosing(_cut(items, hit, doom)) as cut:
                        yield cut
                finally:
                    if not hit.recorded:
                        hit.record(changed=False)

    def _draw(self, step: str) -> _Hit | None:
        number = self.calls[step]
        self.calls[step] += 1
        for fault in self.faults:
            if fault.step == step and fault.after <= number < fault.after + fault.times:
                return _Hit(self.injected, fault, number)
        return None


class _Hit:
    """A fault that has met its call."""

    def __init__(self, injected: list[Injected], fault: Fault, call: int) -> None:
        self.fault = fault
        self.recorded = False
        self._injected = injected
        self._call = call

    def record(self, *, changed: bool) -> None:
        self.recorded = True
        self._injected.append(Injected(fault=self.fault, call=self._call, at=trio.current_time(), changed=changed))

    async def strike(self, doom: Callable[[], Awaitable[None]] | None) -> None:
        """Raises, never returns, or returns late."""
        self.record(changed=True)
        kind = self.fault.kind
        if kind == "delay":
            await trio.sleep(self.fault.seconds)
            return
        if kind == "hang":
            await trio.sleep_forever()
        if kind in ("sandbox-lost", "sandbox-gone") and doom is not None:
            with trio.CancelScope(shield=True):
                await doom()
        await trio.lowlevel.checkpoint()
        error = _ERRORS[kind]()
        if isinstance(error, RateLimited) and self.fault.seconds:
            error.retry_after = self.fault.seconds
        raise error


async def _cut(items: AsyncIterator[T], hit: _Hit, doom: Callable[[], Awaitable[None]] | None) -> AsyncGenerator[T, None]:
    passed = 0
    async for item in items:
        passed += 1
        yield item
        if passed == hit.fault.items and not isinstance(item, Exit):
            await hit.strike(doom)


class ChaosProvider:
    """Any provider, with faults. Deterministic: the script alone decides.

    The first fault of the script that fits a call hits it, and one call is hit by one fault at most. Abilities beyond
    `OneShot` and `Reconnect` that have methods are declared as not implemented.

    Attributes:
        inner: The provider behind it.
        injected: The faults that met a call, in the order in which they struck.
    """

    def __init__(self, inner: Provider, faults: Sequence[Fault] = ()) -> None:
        self.inner = inner
        self.name: str = inner.name
        self.traits: Traits = inner.traits
        self.rates: RateCard | None = inner.rates
        self._script = Script(faults)

    @property
    def injected(self) -> tuple[Injected, ...]:
        """The faults that met a call, in the order in which they struck."""
        return tuple(self._script.injected)

    @property
    def unspent(self) -> tuple[Fault, ...]:
        """The faults of the script that met fewer calls than they were to hit."""
        met = Counter(id(injected.fault) for injected in self._script.injected)
        return tuple(fault for fault in self._script.faults if met[id(fault)] < fault.times)

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer | Declined]:
        """Those of the provider behind it, less the abilities that cannot be passed through."""
        return [_narrowed(offer) if isinstance(offer, Offer) else offer for offer in self.inner.offers(spec, facts)]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Session]:
        """A session of the provider behind it."""
        await self._script.call("connect", trio.lowlevel.checkpoint)
        async with self.inner.connect() as session:
            if isinstance(session, OneShot):
                yield ChaosOneShotSession(self._script, session, session)
            else:
                yield ChaosSession(self._script, session)


def _narrowed(offer: Offer) -> Offer:
    abilities = {
        name: support if name in _PASSED or not support.usable else _NOT_PASSED for name, support in offer.abilities.items()
    }
    return attrs.evolve(offer, abilities=abilities)


class ChaosSession:
    """A session with faults."""

    def __init__(self, script: Script, inner: Session) -> None:
        self._script = script
        self._inner = inner

    async def refresh(self) -> Facts:
        """What the session behind it learns."""
        return await self._script.call("refresh", self._inner.refresh)

    async def check(self) -> None:
        """Whether the account behind it works."""
        await self._script.call("check", self._inner.check)

    async def create(self, order: Order) -> Sandbox:
        """A sandbox with faults."""
        return self._wrapped(await self._script.call("create", lambda: self._inner.create(order)))

    async def attach(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox, with faults."""
        return self._wrapped(await self._script.call("attach", lambda: self._inner.attach(sandbox_id)))

    def find(self, marker: Marker | None = None) -> AbstractAsyncContextManager[AsyncIterator[ResourceInfo]]:
        """What the session behind it finds, unless the list is cut."""
        return self._script.stream("find", lambda: self._inner.find(marker))

    def _wrapped(self, sandbox: Sandbox) -> ChaosSandbox:
        if isinstance(sandbox, Reconnect) and isinstance(sandbox, Gate):
            return ChaosGatedSandbox(self._script, sandbox, sandbox, sandbox)
        if isinstance(sandbox, Reconnect):
            return ChaosReconnectSandbox(self._script, sandbox, sandbox)
        return ChaosSandbox(self._script, sandbox)


class ChaosOneShotSession(ChaosSession):
    """A session with faults that also launches."""

    def __init__(self, script: Script, inner: Session, launcher: OneShot) -> None:
        super().__init__(script, inner)
        self._launcher = launcher

    async def launch(self, order: Order, command: Command) -> tuple[Sandbox, Process]:
        """A sandbox and its program, both with faults."""
        sandbox, process = await self._script.call("launch", lambda: self._launcher.launch(order, command))
        return self._wrapped(sandbox), ChaosProcess(self._script, process, sandbox)


class ChaosSandbox:
    """A sandbox with faults."""

    def __init__(self, script: Script, inner: Sandbox) -> None:
        self.id: str = inner.id
        self.native: object = inner.native
        self._script = script
        self._inner = inner

    async def start(self, command: Command) -> Process:
        """A program with faults."""
        process = await self._script.call("start", lambda: self._inner.start(command), self._inner.destroy)
        return ChaosProcess(self._script, process, self._inner)

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file."""
        await self._script.call("upload", lambda: self._inner.upload(path, chunks), self._inner.destroy)

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Reads a file, unless it is cut."""
        return self._script.stream("download", lambda: self._inner.download(path), self._inner.destroy)

    async def destroy(self) -> None:
        """Ends the sandbox."""
        await self._script.call("destroy", self._inner.destroy, self._inner.destroy)


class ChaosReconnectSandbox(ChaosSandbox):
    """A sandbox with faults that also takes up a program again."""

    def __init__(self, script: Script, inner: Sandbox, reconnect: Reconnect) -> None:
        super().__init__(script, inner)
        self._reconnect = reconnect

    async def process(self, process_id: str, offsets: Mapping[str, int]) -> Process:
        """The program with this id, with faults."""
        process = await self._script.call("process", lambda: self._reconnect.process(process_id, offsets), self._inner.destroy)
        return ChaosProcess(self._script, process, self._inner)


class ChaosGatedSandbox(ChaosReconnectSandbox):
    """A sandbox with faults that also burns gates."""

    def __init__(self, script: Script, inner: Sandbox, reconnect: Reconnect, gate: Gate) -> None:
        super().__init__(script, inner, reconnect)
        self._gate = gate

    async def burn(self, start_id: str) -> bool:
        """Whether the start was not done and never will be."""
        return await self._script.call("burn", lambda: self._gate.burn(start_id), self._inner.destroy)


class ChaosProcess:
    """A program with faults."""

    def __init__(self, script: Script, inner: Process, sandbox: Sandbox) -> None:
        self.id: str = inner.id
        self._script = script
        self._inner = inner
        self._sandbox = sandbox

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What the program writes, unless the stream is cut."""
        return self._script.stream("events", self._inner.events, self._sandbox.destroy)

    async def kill(self) -> None:
        """Ends the program."""
        await self._script.call("kill", self._inner.kill, self._sandbox.destroy)
