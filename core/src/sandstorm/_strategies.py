"""The built-in routing strategies: `cheapest`, `fastest`, `balanced`, `ordered`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

import attrs

from sandstorm._check import money, texts
from sandstorm._constraints import matches
from sandstorm._hookspecs import hookimpl
from sandstorm._knowledge import Knowledge, Strategy
from sandstorm._plan import Candidate, Ranked, Request

NEAR_TIE = Decimal("1.05")
"""Costs within 5 % of the lowest of their group count as equal: list prices are no more exact than that."""


def _seconds(value: float | None) -> str:
    return "an unknown time" if value is None else f"{value:.2f} s"


def _dollars(value: Decimal | None) -> str:
    if value is None:
        return "an unknown price"
    return "no charge" if not value else f"${value.normalize():f}"


def _start(candidate: Candidate) -> float:
    return float("inf") if candidate.latency.p95 is None else candidate.latency.p95


def _stable(candidate: Candidate) -> tuple[str, str]:
    return candidate.offer.provider, candidate.offer.id


@attrs.frozen
class Cheapest:
    """Lowest expected cost first; near ties go to the one predicted to start sooner; unknown prices last."""

    name: str = "cheapest"

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Sequence[Ranked]:
        """All candidates by expected cost."""
        known = [candidate for candidate in candidates if candidate.quote.expected is not None]
        known.sort(key=lambda candidate: (candidate.quote.expected, *_stable(candidate)))
        ranked: list[Ranked] = []
        for tied in _near_ties(known):
            ranked += [Ranked(candidate, self._reason(candidate, len(tied) > 1)) for candidate in tied]
        unknown = [candidate for candidate in candidates if candidate.quote.expected is None]
        unknown.sort(key=lambda candidate: (_start(candidate), *_stable(candidate)))
        return ranked + [Ranked(candidate, "its price is unknown, so it comes after every known one") for candidate in unknown]

    def _reason(self, candidate: Candidate, tied: bool) -> str:
        cost = candidate.quote.expected
        reason = f"expected to cost {_dollars(cost)}" if cost else "nothing is charged for it"
        return f"{reason}; of those within 5 %, by its start in {_seconds(candidate.latency.p95)}" if tied else reason


def _near_ties(known: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Candidates in groups of about equal cost, cheapest group first, each by how soon it is predicted to start."""
    group: list[Candidate] = []
    most = Decimal(0)
    for candidate in known:
        expected = candidate.quote.expected or Decimal(0)
        if group and expected > most:
            yield sorted(group, key=lambda c: (_start(c), *_stable(c)))
            group = []
        if not group:
            most = expected * NEAR_TIE
        group.append(candidate)
    if group:
        yield sorted(group, key=lambda c: (_start(c), *_stable(c)))


@attrs.frozen
class Fastest:
    """The one predicted to start soonest (95th percentile) first; near ties go to the cheaper; unknown last."""

    name: str = "fastest"

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Sequence[Ranked]:
        """All candidates by predicted start."""
        ordered = sorted(candidates, key=lambda c: (_start(c), _cost_or_high(c), *_stable(c)))
        return [Ranked(c, f"predicted to start within {_seconds(c.latency.p95)} ({c.latency.source})") for c in ordered]


@attrs.frozen
class Balanced:
    """Lowest sum of expected cost and predicted wait, at a stated price of a second; unknown last."""

    second: Decimal
    name: str = "balanced"

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Sequence[Ranked]:
        """All candidates by cost plus wait."""
        ordered = sorted(candidates, key=lambda c: (self._total(c), *_stable(c)))
        return [Ranked(c, self._reason(c)) for c in ordered]

    def _total(self, candidate: Candidate) -> Decimal:
        if candidate.quote.expected is None or candidate.latency.p50 is None:
            return Decimal("Infinity")
        return candidate.quote.expected + self.second * Decimal(repr(candidate.latency.p50))

    def _reason(self, candidate: Candidate) -> str:
        parts = f"{_dollars(candidate.quote.expected)} + {_seconds(candidate.latency.p50)} at ${self.second:f} a second"
        total = self._total(candidate)
        return f"{parts} = ${total.normalize():f}" if total.is_finite() else f"{parts}, so it cannot be summed"


@attrs.frozen
class Ordered:
    """In the order of the request's preferences, then of the settings, then by name."""

    order: tuple[str, ...]
    name: str = "ordered"

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Sequence[Ranked]:
        """All candidates in the stated order."""
        order = (*request.constraints.prefer, *self.order)

        def place(candidate: Candidate) -> int:
            return next((n for n, name in enumerate(order) if matches(candidate.provider, name)), len(order))

        ordered = sorted(candidates, key=lambda c: (place(c), *_stable(c)))
        return [
            Ranked(c, f"number {place(c) + 1} in the stated order" if place(c) < len(order) else "not in the stated order")
            for c in ordered
        ]


def _cost_or_high(candidate: Candidate) -> Decimal:
    return Decimal("Infinity") if candidate.quote.expected is None else candidate.quote.expected


@attrs.frozen(kw_only=True)
class StrategySettings:
    """Settings of the built-in strategies.

    Attributes:
        second: What a second of waiting is worth in US dollars, for `balanced`.
        order: Providers in order, for `ordered`.
    """

    second: Decimal = attrs.field(default=Decimal("0.0001"), converter=money("second"))
    order: tuple[str, ...] = attrs.field(default=(), converter=texts("order", "a list of providers"))


class StrategiesPlugin:
    """The built-in strategies as a plugin."""

    SANDSTORM_API = 1
    Settings = StrategySettings

    def __init__(self, settings: StrategySettings) -> None:
        self._settings = settings

    @hookimpl
    def sandstorm_strategies(self) -> list[Strategy]:
        """The four of them."""
        return [Cheapest(), Fastest(), Balanced(second=self._settings.second), Ordered(order=self._settings.order)]
