"""The decision, frozen before anything runs."""

from __future__ import annotations

import attrs

from sandstorm._constraints import Constraints
from sandstorm._limits import Limit
from sandstorm._offer import Facts, Offer
from sandstorm._quote import Quote
from sandstorm._spec import SandboxSpec
from sandstorm._task import Task


@attrs.frozen(kw_only=True)
class Request:
    """One call, decoded.

    Attributes:
        id: The id of the run.
        task: What to run, or None where only a sandbox is wanted.
        spec: The machine wanted; its environment names the task's language.
        constraints: What it may cost, how long it may wait, where it may go.
        strategy: The name of the routing strategy.
        tenant: A trusted label.
        lifetime: Seconds of life that the vendor is asked to enforce.
        keep: Whether the sandbox is to outlive the router.
        key: The idempotency key: of its tenant's runs with one key, one is started, and the others follow it.
    """

    id: str
    task: Task | None
    spec: SandboxSpec
    constraints: Constraints
    strategy: str = "cheapest"
    tenant: str = "default"
    lifetime: float
    keep: bool = False
    key: str | None = None


@attrs.frozen(kw_only=True)
class Latency:
    """Predicted seconds from create to the first command running. None where nothing is known.

    Attributes:
        p50: The median.
        p95: The 95th percentile.
        weight: How many observations stand behind it; 0 for the provider's prior.
        source: `observed`, or where the prior comes from.
    """

    p50: float | None
    p95: float | None
    weight: float = 0.0
    source: str = "unknown"


@attrs.frozen(kw_only=True)
class Candidate:
    """An offer with what it would cost and how soon it would start."""

    offer: Offer
    quote: Quote
    latency: Latency

    @property
    def provider(self) -> str:
        """The account that makes the offer."""
        return self.offer.provider


@attrs.frozen
class Exclusion:
    """Why a candidate may not be used: a short stable `rule`, and a sentence for people.

    Hook implementations leave `plugin` empty; the facade fills it in.
    """

    rule: str
    reason: str
    plugin: str = ""


@attrs.frozen
class Denial:
    """Why a run may not happen at all. Hook implementations leave `plugin` empty."""

    rule: str
    reason: str
    plugin: str = ""


@attrs.frozen(kw_only=True)
class Excluded:
    """A candidate, or a whole account, that was ruled out, and by what."""

    provider: str
    offer: str
    by: Exclusion


@attrs.frozen
class Ranked:
    """A candidate in its place, with the sentence that says why it stands there."""

    candidate: Candidate
    reason: str


@attrs.frozen(kw_only=True)
class Plan:
    """The decision, frozen before anything runs. Serialises to JSON and back.

    Attributes:
        request: What was asked.
        candidates: In the order in which they will be tried, each with its reason.
        exclusions: What was ruled out, with plugin and rule.
        strategy: The strategy that ranked them.
        facts: What each account's offers rest on.
        limits: What policies limit; every attempt reserves against them before it is sent.
        at: Wall-clock seconds since 1970 of the decision.
    """

    request: Request
    candidates: tuple[Ranked, ...]
    exclusions: tuple[Excluded, ...]
    strategy: str
    facts: dict[str, Facts] = attrs.field(factory=dict)
    limits: tuple[Limit, ...] = ()
    at: float

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line for each candidate, best first, then one for each exclusion."""
        ranked = tuple(f"{n}. {r.candidate.provider}: {r.reason}" for n, r in enumerate(self.candidates, 1))
        return (*ranked, *(f"excluded {line}" for line in self.exclusion_lines))

    @property
    def exclusion_lines(self) -> tuple[str, ...]:
        """One line for each exclusion: who, by which rule of which plugin, and why."""
        return tuple(f"{e.provider}: {e.by.reason} ({e.by.plugin}/{e.by.rule})" for e in self.exclusions)
