"""Accounts that go wrong at every await of the adapter. What really happened is in the vendor's own log."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio
from _faults import CUT, ERRORS, LATE_ERRORS, LOST

from sandstorm.provider import (
    Ambiguous,
    Command,
    Exit,
    Facts,
    Offer,
    Order,
    ProviderDown,
    ResourceInfo,
    SandboxSpec,
    check_dispatch,
)
from sandstorm.testing import ReferenceProvider

if TYPE_CHECKING:
    from _world import Router, World

T = TypeVar("T")
HANG_SECONDS = 200.0
"""Longer than the engine waits for anything that it asks of a vendor."""
FACTS_SECONDS = 300.0


class FaultyProvider:
    """An account as one router reaches it."""

    def __init__(self, world: World, router: Router, inner: ReferenceProvider) -> None:
        self.world, self.router, self.inner = world, router, inner
        self.name, self.traits, self.rates, self.vendor = inner.name, inner.traits, inner.rates, inner.vendor
        self.caller = f"{router.number}.{inner.name}"

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Any]:
        """Those of the account behind it, without what is not passed through."""
        return [_narrowed(offer) for offer in self.inner.offers(spec, facts)]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        """A session with faults."""
        await self.call("connect", trio.lowlevel.checkpoint)
        async with self.inner.connect() as session:
            yield (FaultyLauncher if self.inner.offers(SandboxSpec(), Facts())[0].can("OneShot") else FaultySession)(
                self, session
            )

    async def call(
        self,
        site: str,
        act: Callable[[], Awaitable[T]],
        marker: str | None = None,
        box: str | None = None,
        special: Callable[[str], Awaitable[T]] | None = None,
    ) -> T:
        """One request. It is not sent, or its answer not heard, by a router that is dead; one that is paused goes on later."""
        router, dice = self.router, self.world.dice
        await router.reach()
        kind = dice.draw(site, self.caller)
        if kind is None:
            result = await act()
            await router.reach()
            return result
        self.world.touch(marker)
        if special is not None and not (kind in ERRORS or kind in LATE_ERRORS or kind in LOST or kind in _WAITS):
            result = await special(kind)
            await router.reach()
            return result
        dice.hit(site, kind)
        await trio.lowlevel.checkpoint()
        if kind in ERRORS:
            raise ERRORS[kind]()  # noqa: RSE102
        if kind in LOST and box is not None:
            self.vendor.evict(box, "injected")
            raise LOST[kind]()  # noqa: RSE102
        if kind == "delay":
            await router.wait(dice.seconds(0.5, 20))
        if kind == "hang-before":
            await router.wait(HANG_SECONDS)
            raise Ambiguous("injected: no answer")
        result = await act()
        if kind == "hang-after":
            await router.wait(HANG_SECONDS)
            raise Ambiguous("injected: no answer")
        if kind in LATE_ERRORS:
            raise LATE_ERRORS[kind]()  # noqa: RSE102
        await router.reach()
        return result


_WAITS = ("delay", "hang-before", "hang-after")


def _narrowed(offer: Any) -> Any:
    if not isinstance(offer, Offer):
        return offer
    passed = ("OneShot", "Reconnect", "Detach", "Gate")
    return attrs.evolve(offer, abilities={name: support for name, support in offer.abilities.items() if name in passed})


class FaultySession:
    """A session with faults."""

    def __init__(self, provider: FaultyProvider, inner: Any) -> None:
        self.provider, self.inner = provider, inner

    async def refresh(self) -> Facts:
        """Facts of the world's clock."""
        await self.provider.call("refresh", self.inner.refresh)
        return Facts(at=self.provider.world.wall(), ttl=FACTS_SECONDS)

    async def check(self) -> None:
        """Whether the account works."""
        await self.provider.call("check", self.inner.check)

    async def create(self, order: Order) -> Any:
        """A sandbox. A late one is made without anybody who waits for it."""
        box = await self._made("create", order, self.inner.create, lambda: self.provider.vendor.create(order))
        return self._sandbox(box)

    async def _made(self, site: str, order: Order, create: Callable[[Order], Awaitable[T]], commit: Callable[[], object]) -> T:
        world, provider = self.provider.world, self.provider

        async def send() -> T:
            check_dispatch(order, trio.current_time())
            world.guard.create(provider, order)
            made = await create(order)
            world.guard.committed(provider, order)
            return made

        async def special(kind: str) -> T:
            check_dispatch(order, trio.current_time())
            world.dice.hit(site, kind)
            lags = provider.traits.commit_lag.seconds
            if kind == "pause-before-send":
                provider.router.pause(world.dice.seconds(5, 400))
                await provider.router.reach()
                made = await create(attrs.evolve(order, dispatch_by=trio.current_time() + 1))
                world.guard.committed(provider, order)
                return made
            if kind == "late":
                at = trio.current_time() + (order.dispatch_by + lags - trio.current_time()) * world.dice.seconds(0.0, 1.0)
            else:
                lags += provider.traits.find_lag.seconds
                at = order.dispatch_by + lags + world.dice.seconds(61, 400)
            world.later(at, provider, order, commit)
            raise Ambiguous("injected: the answer was lost")

        return await provider.call(site, send, order.marker, special=special)

    async def attach(self, sandbox_id: str) -> Any:
        """An existing sandbox, with faults."""
        return self._sandbox(await self.provider.call("attach", lambda: self.inner.attach(sandbox_id)))

    @asynccontextmanager
    async def find(self, marker: str | None = None) -> AsyncIterator[AsyncIterator[ResourceInfo]]:
        """What the vendor lists, unless the list is empty, torn, old or somebody else's."""
        torn = False
        full = ()

        async def listed() -> tuple[ResourceInfo, ...]:
            async with self.inner.find(marker) as infos:
                return tuple([info async for info in infos])

        async def special(kind: str) -> tuple[ResourceInfo, ...]:
            nonlocal torn, full
            full = await listed()
            shown = self.provider.world.distorted(self.provider, kind, full)
            torn = kind == "torn"
            if torn or shown != full:
                self.provider.world.dice.hit("find", kind)
            return shown

        shown = await self.provider.call("find", listed, special=special)
        if not torn and not full:
            self.provider.world.remember(self.provider.name, shown)

        async def each() -> AsyncIterator[ResourceInfo]:
            for info in shown:
                await self.provider.router.reach()
                yield info
            if torn:
                raise ProviderDown("injected: the second page failed")

        items = each()
        try:
            yield items
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    def _sandbox(self, inner: Any) -> Any:
        return (FaultyGate if hasattr(inner, "burn") else FaultySandbox)(self.provider, inner)


class FaultyLauncher(FaultySession):
    """A session with faults that makes a sandbox with its program."""

    async def launch(self, order: Order, command: Command) -> Any:
        """A sandbox and its program."""
        vendor = self.provider.vendor

        def commit() -> None:
            vendor.start(vendor.create(order, "launch"), command)

        made = await self._made("launch", order, lambda order: self.inner.launch(order, command), commit)
        return self._sandbox(made[0]), FaultyProcess(self.provider, made[1], made[0])


class FaultySandbox:
    """A sandbox with faults."""

    def __init__(self, provider: FaultyProvider, inner: Any) -> None:
        self.id, self.native, self.provider, self.inner = inner.id, inner.native, provider, inner
        self.marker: str = inner.native.order.marker

    async def _call(self, site: str, act: Callable[[], Awaitable[T]], special: Any = None) -> T:
        return await self.provider.call(site, act, self.marker, self.id, special)

    async def start(self, command: Command) -> Any:
        """A program; sent twice it is started once."""

        async def act() -> Any:
            self.provider.world.guard.start(self.provider, self.marker, command)
            return await self.inner.start(command)

        async def twice(kind: str) -> Any:
            process = await act()
            self.provider.world.dice.hit("start", kind)
            await self.inner.start(command)
            return process

        return FaultyProcess(self.provider, await self._call("start", act, twice), self.inner)

    async def process(self, process_id: str, offsets: Mapping[str, int]) -> Any:
        """The program with this id."""

        async def cut(kind: str) -> Any:
            self.provider.world.dice.hit("process", kind)
            raise CUT[kind]()  # noqa: RSE102

        process = await self._call("process", lambda: self.inner.process(process_id, offsets), cut)
        return FaultyProcess(self.provider, process, self.inner)

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file."""
        await self._call("upload", lambda: self.inner.upload(path, chunks))

    def download(self, path: str) -> Any:
        """Reads a file."""
        return self.inner.download(path)

    async def destroy(self) -> None:
        """Ends the sandbox, or says so."""
        world = self.provider.world
        world.guard.destroy(self.provider, self.marker, self.id)

        async def special(kind: str) -> None:
            if any(info.id == self.id for info in self.provider.vendor.live()):
                world.dice.hit("destroy", kind)
                world.excuse(self.marker, "its vendor acknowledged a destroy that it did not do")
            self.provider.vendor.note("destroy ineffective")

        await self._call("destroy", self.inner.destroy, special)


class FaultyGate(FaultySandbox):
    """A sandbox with faults that can say that a program was never started."""

    async def burn(self, start_id: str) -> bool:
        """Whether the start was not done and never will be."""
        burned: bool = await self._call("burn", lambda: self.inner.burn(start_id))
        return burned


class FaultyProcess:
    """A program with faults."""

    def __init__(self, provider: FaultyProvider, inner: Any, sandbox: Any) -> None:
        self.id, self.provider, self.inner, self.sandbox = inner.id, provider, inner, sandbox

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Any]]:
        """What the program writes, unless the stream is cut."""
        world, dice, marker = self.provider.world, self.provider.world.dice, self.sandbox.native.order.marker
        await self.provider.router.reach()
        kind = dice.draw("events", self.provider.caller)
        if kind is not None:
            world.touch(marker)
        after = 0 if kind is None else dice.number("after", len(dice.struck)) % 3
        async with self.inner.events() as inner:

            async def each() -> AsyncIterator[Any]:
                passed = 0
                async for item in inner:
                    if kind is not None and (passed == after or isinstance(item, Exit)):
                        dice.hit("events", kind)
                        if kind == "ended-early":
                            return
                        await self._cut(kind)
                    passed += 1
                    await self.provider.router.reach()
                    yield item

            items = each()
            try:
                yield items
            finally:
                await items.aclose()  # type: ignore[attr-defined]

    async def _cut(self, kind: str) -> None:
        if kind in LOST:
            self.provider.vendor.evict(self.sandbox.id, "injected")
            raise LOST[kind]()  # noqa: RSE102
        if kind == "delay":
            await self.provider.router.wait(self.provider.world.dice.seconds(0.5, 20))
            return
        raise CUT[kind]()  # noqa: RSE102

    async def kill(self) -> None:
        """Ends the program."""
        await self.provider.call("kill", self.inner.kill)
