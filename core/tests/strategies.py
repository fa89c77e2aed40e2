"""Hypothesis strategies of every value."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from sandstorm import _events as events
from sandstorm._constraints import Constraints
from sandstorm._limits import Limit
from sandstorm._offer import ABILITIES, Declined, Facts, Figure, Offer, Rate, RateCard, Support, Traits
from sandstorm._plan import Candidate, Denial, Excluded, Exclusion, Latency, Plan, Ranked, Request
from sandstorm._quote import Quote, Usage
from sandstorm._result import Artifact, Attempt, Exit, Outcome, RunResult
from sandstorm._spec import ISOLATION_LEVELS, Environment, Gpu, Network, SandboxSpec
from sandstorm._task import EFFECTS, Task

# What JSON text can carry; lone surrogates are left to the tests of bad input.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
names = st.text("abcXYZ019-_:.", min_size=1, max_size=8)
prices = st.decimals(min_value=0, max_value=10**6, places=9, allow_nan=False, allow_infinity=False).map(abs)
seconds = st.floats(min_value=0, max_value=1e9, allow_nan=False)
lengths = st.floats(min_value=1e-3, max_value=1e9, allow_nan=False)
sizes = st.integers(min_value=16, max_value=2**40)
contents = st.binary(max_size=12) | texts.map(str.encode)
paths = st.lists(st.text("abc019_", min_size=1, max_size=4), min_size=1, max_size=3).map("/".join)

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
json_tables = st.dictionaries(names, json_values, max_size=3)


def tuples_of(items: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    """Tuples of up to `size` items."""
    return st.lists(items, max_size=size).map(tuple)


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value or None."""
    return st.none() | values


gpus = st.builds(Gpu, model=names, count=st.integers(1, 64))
environments = st.builds(Environment, image=optional(names), language=optional(names), requirements=tuples_of(texts))
networks = st.sampled_from([Network(), Network(mode="open")]) | st.builds(
    Network,
    mode=st.just("allow"),
    hosts=st.lists(names, min_size=1, max_size=2),
    cidrs=tuples_of(st.sampled_from(["10.0.0.0/8", "2001:db8::/32"])),
)
specs = st.builds(
    SandboxSpec,
    cpu=lengths,
    memory=sizes,
    disk=sizes,
    gpu=optional(gpus),
    region=optional(names),
    network=networks,
    isolation=st.sampled_from(ISOLATION_LEVELS),
    env=st.dictionaries(names, texts, max_size=2),
    secrets=tuples_of(names),
    files=st.dictionaries(paths, contents, max_size=2),
    ports=tuples_of(st.integers(1, 65535)),
    user=optional(names),
    workdir=optional(names),
    idle_timeout=optional(lengths),
    labels=st.dictionaries(names, texts, max_size=2),
    environment=environments,
    snapshot=optional(st.tuples(names, names).map("/".join)),
    provider_options=st.dictionaries(names, json_tables, max_size=2),
)
_task_fields: dict[str, st.SearchStrategy[Any]] = {
    "args": tuples_of(texts),
    "stdin": contents,
    "timeout": lengths,
    "output_limit": st.integers(1, 2**40),
    "outputs": tuples_of(paths),
    "effects": st.sampled_from(EFFECTS),
}
tasks = st.builds(Task, code=texts, language=names, **_task_fields) | st.builds(
    Task, argv=st.lists(names, min_size=1, max_size=3), **_task_fields
)
constraints = st.builds(
    Constraints,
    max_cost=optional(prices),
    max_latency=optional(lengths),
    only=tuples_of(names),
    exclude=tuples_of(names),
    prefer=tuples_of(names),
    regions=tuples_of(names),
    attestations=tuples_of(texts),
) | st.builds(Constraints, pin=names)
requests = st.builds(
    Request,
    id=names,
    task=optional(tasks),
    spec=specs,
    constraints=constraints,
    strategy=names,
    tenant=texts,
    lifetime=lengths,
)

supports = st.just(Support("full")) | st.builds(
    Support, level=st.sampled_from(["partial", "not-implemented", "impossible"]), reason=names
)
figures = st.builds(Figure, seconds=seconds, source=texts)
traits = st.builds(
    Traits,
    marker=st.sampled_from(["idempotency-key", "name", "metadata"]),
    commit_lag=figures,
    find_lag=figures,
    start_p50=optional(seconds),
    start_p95=optional(seconds),
    start_source=texts,
    max_concurrent=optional(sizes),
    by_invitation=st.booleans(),
    attestations=tuples_of(texts),
)
facts = st.builds(Facts, data=json_tables, at=seconds, ttl=seconds)
offers = st.builds(
    Offer,
    provider=names,
    id=names,
    cpu=lengths,
    memory=sizes,
    disk=sizes,
    gpu=optional(gpus),
    region=optional(names),
    isolation=st.sampled_from(ISOLATION_LEVELS),
    isolation_detail=texts,
    network=tuples_of(st.sampled_from(["none", "open", "allow"])),
    abilities=st.dictionaries(st.sampled_from(ABILITIES), supports, max_size=3),
    lifetime=lengths,
    extendable=st.booleans(),
    setup=seconds,
    spot=st.booleans(),
    workdir=names,
    attestations=tuples_of(texts),
)
declined = st.builds(Declined, provider=names, rule=names, reason=texts, id=names)
rates = st.builds(
    Rate,
    resource=st.sampled_from(["cpu", "memory", "disk", "gpu", "sandbox", "start"]),
    usd=prices,
    basis=st.sampled_from(["allocated", "used", "max", "active"]),
)
rate_cards = st.builds(
    RateCard,
    rates=tuples_of(rates),
    rounding=seconds,
    minimum=seconds,
    source=names,
    checked_at=st.dates(),
    confidence=st.sampled_from(["stated", "transcribed", "own"]),
)
usages = st.builds(Usage, seconds=seconds, limit=seconds, utilisation=st.floats(0, 1))
quotes = st.builds(
    Quote,
    low=optional(prices),
    expected=optional(prices),
    high=optional(prices),
    usage=usages,
    source=texts,
    checked_at=optional(st.dates()),
)
limits = st.builds(
    Limit,
    key=names,
    kind=st.sampled_from(["spend", "concurrency"]),
    usd=prices,
    count=st.integers(0, 2**40),
    window=lengths,
)

latencies = st.builds(Latency, p50=optional(seconds), p95=optional(seconds), weight=seconds, source=texts)
candidates = st.builds(Candidate, offer=offers, quote=quotes, latency=latencies)
exclusions = st.builds(Exclusion, rule=names, reason=texts, plugin=names)
denials = st.builds(Denial, rule=names, reason=texts, plugin=names)
plans = st.builds(
    Plan,
    request=requests,
    candidates=tuples_of(st.builds(Ranked, candidate=candidates, reason=texts), 2),
    exclusions=tuples_of(st.builds(Excluded, provider=names, offer=names, by=exclusions), 2),
    strategy=names,
    facts=st.dictionaries(names, facts, max_size=2),
    at=seconds,
)

exits = st.builds(
    Exit,
    kind=st.sampled_from(
        ["exited", "signal", "deadline", "out-of-memory", "output-limit", "disk-limit", "compile-error"],
    ),
    code=optional(st.integers(0, 255)),
    signal=optional(st.integers(1, 64)),
)
artifacts = st.builds(Artifact, mime=names, data=contents, name=texts)
attempts = st.builds(
    Attempt,
    provider=names,
    offer=names,
    marker=names,
    sandbox=optional(names),
    outcome=st.sampled_from(Outcome),
    error=optional(texts),
    error_class=optional(names),
    create_seconds=optional(seconds),
    start_seconds=optional(seconds),
    open=st.booleans(),
    exposure=optional(prices),
)
results = st.builds(
    RunResult,
    id=names,
    stdout=contents,
    stderr=contents,
    exit=exits,
    outputs=st.dictionaries(paths, contents, max_size=2),
    artifacts=tuples_of(artifacts, 2),
    outcome=st.sampled_from(Outcome),
    provider=names,
    isolation=st.sampled_from(ISOLATION_LEVELS),
    isolation_detail=texts,
    total_seconds=seconds,
    run_seconds=seconds,
    cost=optional(prices),
    cost_open=optional(prices),
    cost_basis=st.sampled_from(["estimated", "metered", "billed"]),
    attempts=tuples_of(attempts, 2),
    plan=plans,
)

_event_fields: dict[str, st.SearchStrategy[Any]] = {"at": seconds, "run": names, "tenant": texts}
_attempt_fields: dict[str, st.SearchStrategy[Any]] = {**_event_fields, "attempt": names, "provider": names}
any_event = st.one_of(
    st.builds(events.RunRefused, by=names, reason=texts, **_event_fields),
    st.builds(events.RunPlanned, candidates=tuples_of(names), excluded=st.integers(0, 9), **_event_fields),
    st.builds(events.AttemptOpened, offer=names, **_attempt_fields),
    st.builds(events.SandboxBound, sandbox=names, seconds=seconds, **_attempt_fields),
    st.builds(events.ProgramStarted, offer=names, region=optional(names), seconds=seconds, **_attempt_fields),
    st.builds(
        events.AttemptClosed,
        offer=names,
        outcome=st.sampled_from(Outcome),
        error=optional(names),
        open=st.booleans(),
        **_attempt_fields,
    ),
    st.builds(events.RunFinished, provider=names, exit=exits, seconds=seconds, cost=optional(prices), **_event_fields),
)

values = st.one_of(
    specs,
    tasks,
    constraints,
    requests,
    traits,
    facts,
    offers,
    declined,
    rate_cards,
    quotes,
    limits,
    candidates,
    denials,
    exits,
    artifacts,
    attempts,
    any_event,
)
"""Any value but the two large ones, `plans` and `results`, which their own tests draw."""


def sample_request() -> Request:
    """A small request, for tests that need any."""
    return Request(
        id="run-1",
        task=Task(code="print(1)", language="python"),
        spec=SandboxSpec(),
        constraints=Constraints(),
        lifetime=60.0,
    )


def sample_candidate(provider: str = "local") -> Candidate:
    """A small candidate, for tests that need any."""
    usage = Usage(seconds=1.0, limit=60.0)
    return Candidate(
        offer=Offer(provider=provider, cpu=1, memory=512, disk=512, isolation="namespaces"),
        quote=Quote(low=Decimal(0), expected=Decimal(0), high=Decimal(0), usage=usage, source="own", checked_at=None),
        latency=Latency(p50=0.1, p95=0.2),
    )
