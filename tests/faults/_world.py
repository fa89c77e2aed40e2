"""Several routers over one journal and several accounts, on a virtual clock, with everything that can happen to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import trio
from _faults import Dice, Strike
from _invariants import KNOWN, Guard, Journal, Violation, check, leftovers, settled
from _stores import FaultyStore
from _vendors import FaultyProvider

from sandstorm import Constraints, SandboxSpec, SandstormError, Task
from sandstorm._box import open_box
from sandstorm._engine import Engine, open_engine
from sandstorm._plugins import Plugins
from sandstorm._settings import settings_of
from sandstorm._sqlite import SqliteStore
from sandstorm.policy import Limit, Request, hookimpl
from sandstorm.provider import Order, ResourceInfo
from sandstorm.testing import ReferenceProvider, plugin_for, reference_traits

START = 1_790_000_400.0
HEAL_SECONDS = 2000.0
"""Virtual time in which everything that is not kept has to be closed once nothing goes wrong any more."""
EFFECTS = ("unknown", "unknown", "idempotent", "none")


class Severed(Exception):
    """The router is dead: nothing that it does has an effect."""


@attrs.frozen(kw_only=True)
class Asked:
    """A run as it was asked for; runs with one key have one name."""

    name: str
    effects: str
    box: bool = False


class Purse:
    """A policy that limits what each tenant spends."""

    name = "purse"

    def __init__(self, world: World) -> None:
        self._world = world

    @hookimpl
    def sandstorm_limits(self, request: Request) -> list[Limit]:
        """One limit for the tenant."""
        return [Limit(key=f"tenant:{request.tenant}", usd=self._world.limit, window=self._world.window)]


class Router:
    """A router that can die, be paused and lose its place."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number, self.epoch = world, number, -1
        self.severed, self.ready, self.over = trio.Event(), trio.Event(), trio.Event()
        self.scope = trio.CancelScope()
        self.paused_until = 0.0
        self.engine: Engine | None = None
        self.calls: list[trio.CancelScope] = []
        self._nursery: trio.Nursery | None = None

    async def reach(self) -> None:
        """Goes on where the router runs; a paused one later, a dead one never."""
        while trio.current_time() < self.paused_until and not self.severed.is_set():
            with trio.move_on_at(self.paused_until):
                await self.severed.wait()
        if self.severed.is_set():
            await trio.lowlevel.checkpoint()
            raise Severed("the router is dead")

    async def wait(self, seconds: float) -> None:
        """Lets time pass, or the router die."""
        with trio.move_on_after(seconds):
            await self.severed.wait()
        await self.reach()

    def pause(self, seconds: float) -> None:
        """Stops every later call for this long; its epoch does not live meanwhile."""
        self.world.disturbed = True  # what it does meanwhile is late, and booked so
        self.paused_until = max(self.paused_until, trio.current_time() + seconds)

    def kill(self) -> None:
        """Severs it from the store and the vendors, and only then cancels its tasks."""
        self.world.lapsed.add(self.epoch)
        self.severed.set()
        self.scope.cancel()

    async def live(self) -> None:
        """Runs an engine until it is killed."""
        world = self.world
        providers = [FaultyProvider(world, self, inner) for inner in world.vendors.values()]
        settings = settings_of({"strategy": "ordered", "plugins": {"strategies": {"order": list(world.vendors)}}})
        extra: list[tuple[str, Any]] = [(each.name, plugin_for(each)) for each in providers]
        plugins = Plugins.load(settings, extra=[*extra, ("purse", Purse(world))])
        store: Any = FaultyStore(world, self, SqliteStore(world.url, inline=True))
        try:
            with self.scope:
                async with open_engine(settings, plugins, store=store, wall=world.wall) as engine:
                    self.engine, self.epoch = engine, engine.epoch
                    async with trio.open_nursery() as self._nursery:
                        self.ready.set()
                        await trio.sleep_forever()
        except BaseException as exc:
            if not self.severed.is_set():
                world.broken("surprise", f"router {self.number} ended: {exc!r}")
                raise
            if not isinstance(exc, Exception):
                raise
        finally:
            self.over.set()

    def ask(self, call: Callable[..., Any], *given: Any) -> None:
        """Starts a call of a user's."""
        assert self._nursery is not None
        self._nursery.start_soon(self._asked, call, given)

    async def _asked(self, call: Callable[..., Any], given: tuple[Any, ...]) -> None:
        scope = trio.CancelScope()
        self.calls.append(scope)
        try:
            with scope:
                await call(self, *given)
        finally:
            self.calls.remove(scope)


@attrs.define(eq=False, slots=False)
class World:
    """One round: what exists, and what is known to have happened."""

    folder: Path
    seed: str
    muted: Collection[Strike] = ()
    strict: bool = False
    steps: int = 40

    def __attrs_post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.dice = Dice(self.seed, self.random.choice((0.03, 0.1, 0.2, 0.35)), self.muted)
        self.url = f"sqlite:///{self.folder}/journal.db"
        self.limit, self.window = Decimal("0.6"), 3600.0
        self.vendors = {
            "alpha": ReferenceProvider("alpha"),
            "beta": ReferenceProvider("beta", traits=reference_traits(marker="name", find_lag=5.0), start_seconds=2.0),
            "gamma": ReferenceProvider("gamma", traits=reference_traits(marker="metadata", find_lag=1.0), one_shot=True),
        }
        self.guard = Guard(self)
        self.routers: list[Router] = []
        self.asked: dict[str, Asked] = {}
        self.lapsed: set[int] = set()
        self.owners: dict[str, int] = {}
        self.claims: set[str] = set()
        self.touched: set[str] = set()
        self.foreign: set[str | None] = {None}
        self.kept: dict[str, float] = {}
        self.excused: dict[str, str] = {}
        self.found: list[str] = []
        self.store_hurt: set[str] = set()
        self.known: dict[str, int] = {}
        self.jumps, self.jumped = 0.0, False
        self.disturbed = False
        self._lists: dict[str, tuple[ResourceInfo, ...]] = {}

    # --- what the faulty things ask ----------------------------------------------------------------------

    def wall(self) -> float:
        """The wall clock of the host."""
        return START + trio.current_time() + self.jumps

    def living(self) -> set[int]:
        """The epochs of routers that run."""
        now = trio.current_time()
        return {each.epoch for each in self.routers if not each.severed.is_set() and now >= each.paused_until}

    def broken(self, name: str, what: str, known: str | None = None) -> None:
        """Notes that an invariant does not hold; the round ends at its next step. A bug that is known is only counted."""
        if known in KNOWN and not self.strict:
            self.known[known] = self.known.get(known, 0) + 1
            return
        self.found.append(f"{name}: {what} [at {trio.current_time():.1f} s]")

    def excuse(self, marker: str, why: str) -> None:
        """The vendor lied about this one, so that nobody can know what it costs; it must end all the same."""
        self.excused.setdefault(marker, why)

    def touch(self, marker: str | None) -> None:
        """Something went wrong with this one, or, without a name, somewhere."""
        if marker is None:
            self.disturbed = True
        else:
            self.touched.add(marker)

    def bill(self, provider: str, marker: str) -> Decimal:
        """What the vendor charges for a marker until now."""
        return sum((charge.usd or Decimal(0) for charge in self.vendors[provider].vendor.bill(marker)), Decimal(0))

    def later(self, at: float, provider: FaultyProvider, order: Order, commit: Callable[[], object]) -> None:
        """Lets a create take effect by itself."""

        async def act() -> None:
            await trio.sleep_until(at)
            try:
                commit()
            except SandstormError:
                return
            self.guard.committed(provider, order)

        self.nursery.start_soon(act)

    def remember(self, account: str, shown: tuple[ResourceInfo, ...]) -> None:
        """A list that may be shown again when it is old."""
        self._lists[account] = shown

    def distorted(self, provider: FaultyProvider, kind: str, full: tuple[ResourceInfo, ...]) -> tuple[ResourceInfo, ...]:
        """The list as a faulty look-up shows it; whom it wrongly leaves out is excused."""
        if kind == "torn":
            return full[: len(full) // 2]
        if kind == "unfiltered":
            return (*full, ResourceInfo(id=f"{provider.name}-somebody-elses", marker=None))
        shown = () if kind == "empty" else self._lists.get(provider.name, ())
        for info in full:
            if info not in shown and info.marker is not None:
                self.excuse(info.marker, "a look-up did not show it")
        return shown

    # --- what happens ------------------------------------------------------------------------------------

    async def play(self) -> None:
        """The round. Raises `Violation`."""
        async with trio.open_nursery() as self.nursery:
            try:
                await self._played()
            finally:
                self.dice.on = False
                for router in self.routers:
                    if not router.severed.is_set():
                        router.kill()
                for router in self.routers:
                    await router.over.wait()
                self.nursery.cancel_scope.cancel()

    async def _played(self) -> None:
        on, self.dice.on = self.dice.on, False
        for _ in range(3):
            await self.enlist()
        self.journal = Journal(str(self.folder / "journal.db"))
        self.dice.on = on
        moves = (self.run, self.run, self.run, self.run, self.twice, self.box, self.kept_box, self.sleep, self.sleep, self.hurt)
        for _ in range(self.steps):
            await self.random.choice(moves)()
            self.judge()
        await self.heal()

    def judge(self) -> None:
        """Raises `Violation` where something does not hold."""
        check(self)
        if self.found:
            raise Violation("; ".join(self.found[:3]))

    async def enlist(self) -> None:
        """One more router."""
        router = Router(self, len(self.routers))
        self.routers.append(router)
        self.nursery.start_soon(router.live)
        await router.ready.wait()

    def any_router(self) -> Router:
        """A router that is not dead."""
        return self.random.choice([each for each in self.routers if not each.severed.is_set()])

    def _order(self) -> Constraints:
        names = list(self.vendors)
        self.random.shuffle(names)
        return Constraints(prefer=tuple(names[: self.random.randrange(3)]))

    def _task(self, seconds: int, effects: str) -> Task:
        return Task(argv=("sleep", str(seconds)), timeout=60, effects=effects)

    async def run(self, key: str | None = None, routers: int = 1) -> None:
        """A program, perhaps under a key, perhaps from two routers at once."""
        number = int(key.removeprefix("key-")) if key else self.random.randrange(1000)
        task = self._task((0, 1, 5, 20, 40)[number % 5], EFFECTS[number % 4])
        lifetime = self.random.choice((None, 2000.0))
        for _ in range(routers):
            self.any_router().ask(self._run, task, self._order(), key, self.random.choice(("acme", "bolt")), lifetime)
        await trio.sleep(self.random.choice((0.0, 0.1, 3.0)))

    async def twice(self) -> None:
        """One key from two routers."""
        await self.run(f"key-{self.random.randrange(12)}", 2)

    async def _run(
        self, router: Router, task: Task, wanted: Constraints, key: str | None, tenant: str, lifetime: float | None
    ) -> None:
        engine = router.engine
        assert engine is not None
        request = engine.request(task, SandboxSpec(), wanted, tenant=tenant, key=key, lifetime=lifetime)
        self.asked[request.id] = Asked(name=f"{tenant}/{key}" if key else request.id, effects=task.effects)
        try:
            result = await engine.run(request)
        except Exception as exc:
            self._told(router, getattr(exc, "attempts", ()))
            self._surprise(router, exc)
        else:
            self._told(router, result.attempts)

    def _told(self, router: Router, attempts: Any) -> None:
        if not router.severed.is_set():
            self.claims |= {each.marker for each in attempts if each.outcome.value == "not-started"}

    def _surprise(self, router: Router, exc: Exception) -> None:
        """Only errors of the contract, and what an adapter threw, may reach a caller."""
        if not router.severed.is_set() and not isinstance(exc, SandstormError | trio.TooSlowError) and "injected" not in str(exc):
            self.broken("surprise", repr(exc))

    async def box(self, keep: bool = False) -> None:
        """A sandbox with a file and a program."""
        self.any_router().ask(self._box, self._order(), keep, self.random.choice((5.0, 50.0)))
        await trio.sleep(self.random.choice((0.0, 0.5)))

    async def kept_box(self) -> None:
        """One that outlives its router."""
        await self.box(True)

    async def _box(self, router: Router, wanted: Constraints, keep: bool, seconds: float) -> None:
        engine = router.engine
        assert engine is not None
        request = engine.request(None, SandboxSpec(), wanted, tenant="acme", keep=keep, lifetime=600.0)
        self.asked[request.id] = Asked(name=request.id, effects="unknown", box=True)
        try:
            async with open_box(engine, request) as box:
                if keep and not router.severed.is_set():
                    self.kept[box._trial.row.id] = box.expires_at
                await box.upload("file", b"data")
                await box.run(self._task(1, "unknown"))
                await router.wait(seconds)
        except Exception as exc:
            self._surprise(router, exc)

    async def sleep(self) -> None:
        """Time passes."""
        await trio.sleep(self.random.choice((1.0, 10.0, 30.0, 130.0)))

    async def hurt(self) -> None:
        """A router, the clock or a sandbox is hit."""
        which = self.random.randrange(9)
        rows = self.journal.attempts()
        router = self.any_router()
        owns = [row["id"] for row in rows.values() if row["epoch"] == router.epoch and row["state"] != "released"]
        if which <= 1:
            self._hit(owns, "router", "death")
            router.kill()
            await self.enlist()
        elif which <= 3:
            self._hit(owns, "router", "pause")
            router.pause(self.random.choice((5.0, 60.0, 300.0)))
        elif which == 4 and router.calls:
            self._hit(owns, "router", "cancelled")
            self.random.choice(router.calls).cancel()
        elif which == 5:
            ahead = self.random.random() < 0.5
            self._hit(list(rows), "clock", "forward" if ahead else "back")
            self.jumps += self.random.choice((30.0, 600.0)) * (1 if ahead else -1)
            self.disturbed = self.jumped = True
        elif which <= 7:
            self._evict()
        else:
            await self._foreign()

    def _hit(self, markers: list[str], site: str, kind: str) -> None:
        self.touched |= set(markers)
        if markers:
            self.dice.hit(site, kind)

    def _evict(self) -> None:
        vendor = self.random.choice(list(self.vendors.values())).vendor
        live = [info for info in vendor.live() if info.marker not in self.foreign]
        if live:
            info = self.random.choice(live)
            self.touch(info.marker)
            self.dice.hit("vendor", "evicted")
            vendor.evict(info.id)

    async def _foreign(self) -> None:
        """Somebody else's sandbox, with a marker like ours."""
        provider = self.random.choice(list(self.vendors.values()))
        marker = f"ss-foreign-{len(self.foreign)}"
        self.foreign.add(marker)
        offer: Any = provider.offers(SandboxSpec(), None)[0]  # type: ignore[arg-type]
        provider.vendor.create(
            Order(spec=SandboxSpec(), offer=offer, marker=marker, dispatch_by=trio.current_time() + 1, lifetime=3600.0)
        )

    async def heal(self) -> None:
        """Nothing goes wrong any more: in bounded time all is closed, booked and gone."""
        self.dice.on = False
        if self.random.random() < 0.3:
            for router in self.routers:
                if not router.severed.is_set():
                    router.kill()
            await self.enlist()
        end = max([each.paused_until for each in self.routers] + [trio.current_time()]) + HEAL_SECONDS
        if self.jumped:
            end += 3000.0  # what is told by the wall clock may be that much later or earlier
        while trio.current_time() < end and (leftovers(self) or any(each.calls for each in self.routers)):
            await trio.sleep(20)
            self.judge()
        left = leftovers(self)
        if left:
            hurt = all(each.split()[0] in self.store_hurt for each in left)
            self.broken("left open", "; ".join(left), "intent" if hurt else None)
        await trio.sleep(1500 if self.kept else 0)
        if not left:
            settled(self)
        self.judge()
