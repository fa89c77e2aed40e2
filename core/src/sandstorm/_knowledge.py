"""What was observed, as an immutable snapshot, and the strategies that rank by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs

from sandstorm._breaker import CLOSED, Breaker
from sandstorm._offer import Traits
from sandstorm._plan import Candidate, Latency, Ranked, Request


@attrs.frozen(kw_only=True)
class Observed:
    """What was seen of one provider, offer and region.

    Attributes:
        start_p50: Seconds from create to the first command running, median; None before any was seen.
        start_p95: The same at the 95th percentile.
        starts: The weight of the evidence for the two, decayed.
        failure_rate: Share of attempts that failed through the provider's fault, decayed.
        attempts: The weight of the evidence for it.
    """

    start_p50: float | None = None
    start_p95: float | None = None
    starts: float = 0.0
    failure_rate: float = 0.0
    attempts: float = 0.0


NOTHING = Observed()


@attrs.frozen(kw_only=True)
class Knowledge:
    """What strategies and predictions may use. Immutable for the length of a decision.

    Attributes:
        observed: By `(provider, offer, region)`; the region is "" where there is none.
        durations: Median seconds that a program of this language ran.
        breakers: What is held against an account in a region, by `(provider, region)`.
    """

    observed: Mapping[tuple[str, str, str], Observed] = attrs.field(factory=dict)
    durations: Mapping[str, float] = attrs.field(factory=dict)
    breakers: Mapping[tuple[str, str], Breaker] = attrs.field(factory=dict)

    def of(self, provider: str, offer: str, region: str | None) -> Observed:
        """What was seen of one offer; `NOTHING` before its first use."""
        return self.observed.get((provider, offer, region or ""), NOTHING)

    def breaker(self, provider: str, region: str | None) -> Breaker:
        """What is held against an account in a region."""
        return self.breakers.get((provider, region or ""), CLOSED)

    def latency(self, traits: Traits, provider: str, offer: str, region: str | None, setup: float) -> Latency:
        """The predicted start-up: observed where it was seen, else the provider's prior; set-up time added."""
        seen = self.of(provider, offer, region)
        if seen.start_p50 is not None and seen.start_p95 is not None:
            return Latency(p50=seen.start_p50 + setup, p95=seen.start_p95 + setup, weight=seen.starts, source="observed")
        if traits.start_p50 is None or traits.start_p95 is None:
            return Latency(p50=None, p95=None)
        return Latency(p50=traits.start_p50 + setup, p95=traits.start_p95 + setup, source=traits.start_source)


class Strategy(Protocol):
    """Ranks candidates. Pure: the same arguments give the same order."""

    @property
    def name(self) -> str:
        """The name by which requests and settings mean it."""
        ...

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Sequence[Ranked]:
        """All of `candidates`, best first, each with the sentence that says why it stands there."""
        ...
