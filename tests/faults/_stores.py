"""The journal as one router reaches it: busy, slow, or with its answers lost."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from sandstorm import PluginError

if TYPE_CHECKING:
    from _world import Router, World


class FaultyStore:
    """A store with faults; every write is compared with the owner that the journal names."""

    def __init__(self, world: World, router: Router, inner: Any) -> None:
        self.world, self.router, self.inner = world, router, inner
        self.url: str = inner.url
        self.open = inner.open
        self.enlisted = inner.enlisted

    def observe_nowait(self, observations: Any) -> None:
        """What is learned; a dead router learns nothing."""
        if not self.router.severed.is_set():
            self.inner.observe_nowait(observations)

    def keep_facts_nowait(self, provider: str, facts: Any) -> None:
        """The facts of an account."""
        if not self.router.severed.is_set():
            self.inner.keep_facts_nowait(provider, facts)

    async def living(self, epochs: Collection[int]) -> frozenset[int]:
        """Those who live; one that is paused does not, as if its lease had run out."""
        found: frozenset[int] = await self._call("living", self.inner.living, epochs)
        return found & (self.world.living() | {self.router.epoch})

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name, getattr(self.inner, name))

    async def _call(self, name: str, method: Any, *given: Any, **named: Any) -> Any:
        router, world, site = self.router, self.world, f"store.{name}"
        await router.reach()
        kind = world.dice.draw(site, f"{router.number}", world.dice.chance / 3) if router.epoch >= 0 else None
        attempt = next((each for each in given if hasattr(each, "epoch") and hasattr(each, "dispatch_by")), None)
        if kind is not None:
            world.touch(getattr(attempt, "id", None))
            world.dice.hit(site, kind)
        if kind in ("busy", "answer-lost") and attempt is not None:
            world.store_hurt.add(attempt.id)
        if kind == "busy":
            raise PluginError("sqlite", "write", "injected: busy")
        if kind == "slow":
            await router.wait(world.dice.seconds(0.5, 20))
        result = await method(*given, **named)
        if router.epoch >= 0:
            self._fenced(name, attempt, given, result)
        if kind == "answer-lost":
            raise PluginError("sqlite", "write", "injected: the answer was lost")
        if kind == "pause-after":
            router.pause(world.dice.seconds(5, 300))
        await router.reach()
        return result

    def _fenced(self, name: str, attempt: Any, given: tuple[Any, ...], result: Any) -> None:
        """No write of an epoch that does not own the attempt, and nobody takes what a living router uses."""
        world = self.world
        if name == "begin":
            world.owners[attempt.id] = attempt.epoch
        if attempt is None or not result:
            return
        row = world.journal.attempt(attempt.id)
        if name in ("update", "finish") and row["epoch"] != attempt.epoch:
            world.broken("fence", f"{attempt.id} is owned by {row['epoch']}, and {attempt.epoch} has written it")
        if name == "take":
            due = attempt.kept and world.wall() >= attempt.expires_at
            closed = attempt.state in ("released", "absent")
            own = attempt.epoch == self.router.epoch
            paused = any(each.epoch == attempt.epoch and each.paused_until for each in world.routers)
            # One that was paused may be back before the answer that it did not live is used.
            if attempt.epoch in world.living() and not paused and not (own or due or closed):
                world.broken("taken", f"{attempt.id} is {attempt.state}, and its owner {attempt.epoch} lives")
