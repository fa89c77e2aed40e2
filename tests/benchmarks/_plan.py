"""What a decision costs: `Planner.plan` and `Engine.plan` with ten screening policies, and how it grows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from statistics import median

import attrs
import trio
from _measure import Figure, installed_plugins

from sandstorm import Constraints, SandboxSpec, Task
from sandstorm._engine import open_engine
from sandstorm._knowledge import Knowledge
from sandstorm._plan import Candidate, Exclusion, Request
from sandstorm._planner import Planner
from sandstorm._plugins import Plugins
from sandstorm._settings import Settings
from sandstorm._sqlite import SqliteStore
from sandstorm.provider import Facts, Rate, RateCard, hookimpl
from sandstorm.testing import ReferenceProvider, plugin_for

POLICIES = 10
SMALL = 6
TARGET_US = 200.0
SIZES = (10, 100, 1000)
PRICE_RANGE = 100.0
"""Between the dearest candidate and the cheapest: prices that all differ are what ranking finds hardest."""


class Policy:
    """A screening policy such as a company writes: no spot, labelled runs only in listed regions."""

    def __init__(self, number: int) -> None:
        self.name = f"policy-{number}"
        self._regions = frozenset((f"region-{number}", "eu"))

    @hookimpl
    def sandstorm_screen(self, request: Request, candidate: Candidate) -> Exclusion | None:
        """Lets every candidate of the benchmark pass, after having looked at it."""
        if candidate.offer.spot and request.spec.labels.get("tier") == "production":
            return Exclusion("spot", "production does not run on what the vendor may take back")
        if candidate.offer.region not in self._regions:
            return Exclusion("region", f"{candidate.offer.region} is not one of our regions")
        return None


def measure(quick: bool) -> Iterable[Figure]:
    """Microseconds of a plan with 6 candidates, and per candidate with 10, 100 and 1,000."""
    repeats = 200 if quick else 2000
    planner = made_planner(SMALL)
    yield Figure(
        name="plan, 6 candidates, 10 policies",
        value=median(plan_seconds(planner, repeats)) * 1e6,
        unit="us",
        target=TARGET_US,
        detail=f"Planner.admit, invite and plan; median of {repeats}",
    )
    yield Figure(
        name="the same through Engine.plan",
        value=median(trio.run(_engine_seconds, repeats)) * 1e6,
        unit="us",
        target=TARGET_US,
        detail=f"with a session and facts for each account; median of {repeats}",
    )
    yield _growth(20 if quick else 100)


def _growth(rounds: int) -> Figure:
    """The price of a candidate among 1,000, as a ratio to that among 10; 1 is linear."""
    planners = {size: made_planner(size) for size in SIZES}
    each: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size, planner in planners.items():
            repeats = max(1, 100 // size)
            each[size].append(median(plan_seconds(planner, repeats)) / size)
    costs = {size: median(seconds) * 1e6 for size, seconds in each.items()}
    return Figure(
        name="plan, cost of a candidate among 1,000",
        value=median(most / least for most, least in zip(each[SIZES[-1]], each[SIZES[0]], strict=True)),
        unit="x",
        target=1.2,
        baseline=f"a candidate among 10: {costs[SIZES[0]]:.1f} us",
        detail=", ".join(f"{size}: {cost:.1f} us each" for size, cost in costs.items()) + f"; {rounds} rounds",
    )


def plan_seconds(planner: Planner, repeats: int) -> list[float]:
    """Seconds of each of so many decisions."""
    facts = {provider.name: Facts(at=time.time(), ttl=300.0) for provider in planner.providers}
    knowledge, seconds = Knowledge(), []
    for number in range(repeats):
        request = made_request(f"run-{number}")
        began = time.perf_counter()
        planner.admit(request)
        invited, excluded = planner.invite(request)
        plan = planner.plan(request, invited, excluded, facts, knowledge, began)
        seconds.append(time.perf_counter() - began)
        assert len(plan.candidates) == len(planner.providers)
    return seconds


def made_planner(size: int) -> Planner:
    """A planner over so many accounts, each with a price of its own, and the ten policies."""
    providers = made_providers(size)
    settings = Settings()
    plugins = Plugins.load(settings, extra=_plugins(providers), entry_points=())
    return Planner(providers=plugins.providers(), plugins=plugins, strategies=plugins.strategies())


def made_providers(size: int) -> Sequence[ReferenceProvider]:
    """Accounts whose prices all differ, dearest first."""
    return [ReferenceProvider(f"ref-{n:04}", rates=_card(PRICE_RANGE ** (1 - n / size)), region="eu") for n in range(size)]


def made_request(run: str) -> Request:
    """A request with the limits that a user sets."""
    return Request(
        id=run,
        task=Task(code="print('hello')", language="python"),
        spec=SandboxSpec(labels={"tier": "production"}),
        constraints=Constraints(max_cost="10", max_latency=30),
        lifetime=420.0,
    )


def _card(factor: float) -> RateCard:
    price = Decimal(repr(round(factor, 4))) * Decimal("0.000001")
    rates = (Rate(resource="cpu", usd=price), Rate(resource="memory", usd=price / 4))
    return RateCard(rates=rates, source="made up for a benchmark", checked_at=date.fromtimestamp(time.time()))


def _plugins(providers: Sequence[ReferenceProvider]) -> list[tuple[str, object]]:
    policies = [Policy(number) for number in range(POLICIES)]
    return [("reference", plugin_for(*providers)), *((policy.name, policy) for policy in policies)]


async def _engine_seconds(repeats: int) -> list[float]:
    settings = Settings(disable=installed_plugins())
    extra = _plugins(made_providers(SMALL))
    seconds = []
    async with open_engine(settings, Plugins.load(settings, extra=extra), store=SqliteStore("sqlite://", inline=True)) as engine:
        request = made_request("run")
        for number in range(repeats + 1):
            asked = attrs.evolve(request, id=f"run-{number}")
            began = time.perf_counter()
            plan = await engine.plan(asked)
            seconds.append(time.perf_counter() - began)
            assert len(plan.candidates) == SMALL
    return seconds[1:]  # the first one connects the accounts
