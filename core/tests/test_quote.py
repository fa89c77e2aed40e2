"""Quotes: unknown is never free, every basis, minimum and rounding counts, and the figures are in order."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import offers, rate_cards

from sandstorm import Gpu
from sandstorm._quote import cost, quote
from sandstorm.policy import Usage
from sandstorm.provider import Offer, Rate, RateCard

OFFER = Offer(provider="a", cpu=2, memory=2048, disk=4096, gpu=Gpu(model="H100", count=3), isolation="container")
USAGE = Usage(seconds=10.0, limit=100.0)


def card(*rates: Rate, **terms: Any) -> RateCard:
    """A rate card of these components."""
    return RateCard(rates=rates, source="test", checked_at=date(2026, 1, 1), **terms)


def test_unknown_is_not_free() -> None:
    """Without a rate card every figure is unknown; with an empty one every figure is zero."""
    unknown, free = quote(None, OFFER, USAGE), quote(card(), OFFER, USAGE)
    assert (unknown.low, unknown.expected, unknown.high, unknown.source) == (None, None, None, "unknown")
    assert (free.low, free.expected, free.high, free.source) == (0, 0, 0, "test")


@pytest.mark.parametrize(("resource", "units"), [("cpu", 2), ("memory", 2), ("disk", 4), ("gpu", 3), ("sandbox", 1)])
def test_resources(resource: str, units: int) -> None:
    """Each resource is charged by its unit and by the second."""
    assert cost(card(Rate(resource=resource, usd=Decimal("0.001"))), OFFER, 10.0, 1.0) == units * Decimal("0.01")


def test_start_fee() -> None:
    """A start fee is charged once, however long it lasts."""
    fee = card(Rate(resource="start", usd=Decimal("0.5")), Rate(resource="sandbox", usd=Decimal("0.001")))
    assert (cost(fee, OFFER, 0.0, 1.0), cost(fee, OFFER, 10.0, 1.0)) == (Decimal("0.5"), Decimal("0.51"))


@pytest.mark.parametrize(("basis", "low", "expected"), [("allocated", 10, 10), ("max", 10, 10), ("used", 0, 5), ("active", 0, 5)])
def test_basis(basis: str, low: int, expected: int) -> None:
    """What is billed by use is quoted for none, half and all of the machine, and the exposure for its whole lifetime."""
    given = quote(card(Rate(resource="sandbox", usd=Decimal(1), basis=basis)), OFFER, USAGE)
    assert (given.low, given.expected, given.high) == (low, expected, 100)


@pytest.mark.parametrize(("seconds", "billed"), [(0.0, 60), (59.9, 60), (60.0, 60), (60.1, 70), (75.0, 80)])
def test_rounding_and_minimum(seconds: float, billed: int) -> None:
    """Billed time is at least the minimum, and rounded up."""
    terms = card(Rate(resource="sandbox", usd=Decimal(1)), rounding=10.0, minimum=60.0)
    assert cost(terms, OFFER, seconds, 1.0) == billed


def test_fractions_are_rounded_up() -> None:
    """A fraction of a nano-dollar is a whole one: a budget is never overrun by rounding."""
    assert cost(card(Rate(resource="sandbox", usd=Decimal("1E-12"))), OFFER, 1.0, 1.0) == Decimal("1E-9")


def test_absurd_time() -> None:
    """A time beyond all reason has a price beyond all reason, so that `max_cost` can refuse it."""
    assert cost(card(Rate(resource="sandbox", usd=Decimal("0.001"))), OFFER, 1e100, 1.0) == Decimal("1E+97")


@settings(max_examples=100, deadline=None)
@given(
    rate_cards.filter(lambda card: card.rounding == 0 or card.rounding >= 1e-9),
    offers,
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.floats(0, 1),
)
def test_figures_are_in_order(rates: RateCard, offer: Offer, one: float, other: float, utilisation: float) -> None:
    """Low is at most expected and expected at most high, wherever the predicted time is within the limit."""
    usage = Usage(seconds=min(one, other), limit=max(one, other), utilisation=utilisation)
    given = quote(rates, offer, usage)
    assert given.low is not None
    assert given.expected is not None
    assert given.high is not None
    assert 0 <= given.low <= given.expected <= given.high
