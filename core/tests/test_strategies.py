"""The built-in strategies: pure, total, and each order with a sentence that says why."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import candidates, requests, sample_candidate, sample_request

from sandstorm._strategies import Balanced, Cheapest, Fastest, Ordered, StrategiesPlugin, StrategySettings
from sandstorm.policy import Candidate, Knowledge, Latency, Quote, Request, Strategy, Usage

STRATEGIES = (Cheapest(), Fastest(), Balanced(second=Decimal("0.0001")), Ordered(order=("b", "a")))
USAGE = Usage(seconds=300.0, limit=420.0)


def candidate(provider: str, cost: str | None = "0.01", start: float | None = 1.0) -> Candidate:
    """A candidate with an expected cost and a predicted start."""
    money = None if cost is None else Decimal(cost)
    return attrs.evolve(
        sample_candidate(provider),
        quote=Quote(low=money, expected=money, high=money, usage=USAGE, source="test", checked_at=None),
        latency=Latency(p50=start, p95=start, source="test"),
    )


def ranked(strategy: Strategy, *given: Candidate, **constraints: Any) -> list[tuple[str, str]]:
    """Account and reason in the order of the strategy."""
    request = sample_request()
    request = attrs.evolve(request, constraints=attrs.evolve(request.constraints, **constraints))
    return [(r.candidate.provider, r.reason) for r in strategy.rank(request, given, Knowledge())]


def order(strategy: Strategy, *given: Candidate, **constraints: Any) -> list[str]:
    """The accounts in the order of the strategy."""
    return [provider for provider, _ in ranked(strategy, *given, **constraints)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
@settings(max_examples=60, deadline=None)
@given(request=requests, given=st.lists(candidates, max_size=5), random=st.randoms(use_true_random=False))
def test_pure_and_total(strategy: Strategy, request: Request, given: list[Candidate], random: Any) -> None:
    """Every candidate comes back once and with a reason, the order repeats, and that of the input decides nothing."""
    given = [attrs.evolve(c, offer=attrs.evolve(c.offer, id=f"offer-{n}")) for n, c in enumerate(given)]
    answer = list(strategy.rank(request, tuple(given), Knowledge()))
    assert sorted(id(r.candidate) for r in answer) == sorted(map(id, given))
    assert all(r.reason for r in answer)
    assert list(strategy.rank(request, tuple(given), Knowledge())) == answer
    shuffled = list(given)
    random.shuffle(shuffled)
    assert list(strategy.rank(request, tuple(shuffled), Knowledge())) == answer


@settings(max_examples=100, deadline=None)
@given(st.lists(candidates, min_size=2, max_size=6))
def test_cheapest_is_never_far_off(given: list[Candidate]) -> None:
    """The first of `cheapest` costs at most 5 % more than the lowest, and unknown prices come last."""
    costs = [r.candidate.quote.expected for r in Cheapest().rank(sample_request(), given, Knowledge())]
    known = [cost for cost in costs if cost is not None]
    assert costs == known + [None] * (len(costs) - len(known))
    assert not known or known[0] <= min(known) * Decimal("1.05")


def test_cheapest() -> None:
    """`cheapest` goes by expected cost and names it."""
    answer = ranked(Cheapest(), candidate("dear", "0.20"), candidate("low", "0.10"), candidate("free", "0"))
    assert [provider for provider, _ in answer] == ["free", "low", "dear"]
    assert ["$0.1" in reason for _, reason in answer] == [False, True, False]
    assert "charge" in answer[0][1]


def test_cheapest_near_tie() -> None:
    """Among costs within 5 % of the lowest, the one predicted to start sooner goes first and says so."""
    slow, quick = candidate("slow", "0.100", 9.0), candidate("quick", "0.105", 0.5)
    answer = ranked(Cheapest(), slow, quick)
    assert [provider for provider, _ in answer] == ["quick", "slow"]
    assert all(figure in answer[0][1] for figure in ("$0.105", "0.50 s"))
    assert order(Cheapest(), slow, candidate("quick", "0.10501", 0.5)) == ["slow", "quick"]


def test_cheapest_near_ties_do_not_chain() -> None:
    """A near tie is measured from the lowest of its group, so that small steps do not add up."""
    steps = [candidate("a", "1.00", 3.0), candidate("b", "1.04", 2.0), candidate("c", "1.08", 1.0)]
    assert order(Cheapest(), *steps) == ["b", "a", "c"]


def test_cheapest_unknown() -> None:
    """An unknown price comes after every known one, and an unknown start after every known one among equals."""
    given = [candidate("mystery", None, 0.1), candidate("dear", "99"), candidate("dark", "99", None)]
    assert order(Cheapest(), *given) == ["dear", "dark", "mystery"]
    assert ranked(Cheapest(), *given)[2][1] == "its price is unknown, so it comes after every known one"


def test_fastest() -> None:
    """`fastest` goes by the predicted 95th percentile, then by cost, with what is unknown last."""
    given = [
        candidate("unknown", "0", None),
        candidate("slow", "0", 2.0),
        candidate("quick-dear", "0.2", 1.0),
        candidate("quick-unpriced", None, 1.0),
        candidate("quick-low", "0.1", 1.0),
    ]
    assert order(Fastest(), *given) == ["quick-low", "quick-dear", "quick-unpriced", "slow", "unknown"]
    assert ranked(Fastest(), given[1], given[0]) == [
        ("slow", "predicted to start within 2.00 s (test)"),
        ("unknown", "predicted to start within an unknown time (test)"),
    ]


def test_balanced() -> None:
    """`balanced` adds the price of waiting to the cost, shows the sum, and puts what cannot be summed last."""
    strategy = Balanced(second=Decimal("0.01"))
    given = [candidate("unpriced", None), candidate("slow", "0.01", 5.0), candidate("quick", "0.04", 1.0)]
    assert ranked(strategy, *given) == [
        ("quick", "$0.04 + 1.00 s at $0.01 a second = $0.05"),
        ("slow", "$0.01 + 5.00 s at $0.01 a second = $0.06"),
        ("unpriced", "an unknown price + 1.00 s at $0.01 a second, so it cannot be summed"),
    ]
    assert order(Balanced(second=Decimal("0.001")), *given) == ["slow", "quick", "unpriced"]


def test_ordered() -> None:
    """`ordered` goes by the request's preferences, then by the settings, then by name, and says the place."""
    given = [candidate(name) for name in ("d", "a", "e2b:x", "c")]
    assert ranked(Ordered(order=("c", "e2b")), *given) == [
        ("c", "number 1 in the stated order"),
        ("e2b:x", "number 2 in the stated order"),
        ("a", "not in the stated order"),
        ("d", "not in the stated order"),
    ]
    assert order(Ordered(order=("c",)), *given, prefer=("d",)) == ["d", "c", "a", "e2b:x"]


def test_plugin() -> None:
    """The plugin hands its settings to the strategies that need them."""
    strategies = StrategiesPlugin(StrategySettings(second="2", order=["x"])).sandstorm_strategies()  # type: ignore[arg-type]
    assert [strategy.name for strategy in strategies] == ["cheapest", "fastest", "balanced", "ordered"]
    assert strategies[2:] == [Balanced(second=Decimal(2)), Ordered(order=("x",))]
