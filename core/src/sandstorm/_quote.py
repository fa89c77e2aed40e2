"""What an offer would cost."""

from __future__ import annotations

import math
from datetime import date
from decimal import ROUND_CEILING, Context, Decimal

import attrs

from sandstorm._offer import Offer, RateCard

ZERO = Decimal(0)
NANO = Decimal("1E-9")
_WIDE = Context(prec=400, rounding=ROUND_CEILING)
"""Digits for any float: an absurd timeout gives an absurd price, which `max_cost` refuses, and no exception."""
ASSUMED_UTILISATION = 0.5
"""Share of the machine in use that the expected figure assumes where a vendor bills use; low is 0 and high is 1."""


@attrs.frozen(kw_only=True)
class Usage:
    """How long a sandbox would live and how busy it would be.

    Attributes:
        seconds: Predicted seconds of life.
        limit: The lifetime that the vendor enforces, in seconds: the most that can be billed.
        utilisation: Share of the machine in use, from 0 to 1.
    """

    seconds: float
    limit: float
    utilisation: float = ASSUMED_UTILISATION


@attrs.frozen(kw_only=True)
class Quote:
    """What an offer would cost, in US dollars. None means unknown, and unknown is never free.

    Attributes:
        low: The predicted time, nothing used where use is billed.
        expected: The predicted time at the assumed utilisation.
        high: The exposure: the worst rate for as long as the vendor would let the sandbox live.
        usage: The assumed duration, limit and utilisation.
        source: Where the prices come from.
        checked_at: The day on which they were compared with the source.
    """

    low: Decimal | None
    expected: Decimal | None
    high: Decimal | None
    usage: Usage
    source: str
    checked_at: date | None


def quote(card: RateCard | None, offer: Offer, usage: Usage) -> Quote:
    """The cost of `offer` under `card`; all unknown where there is no card."""
    if card is None:
        return Quote(low=None, expected=None, high=None, usage=usage, source="unknown", checked_at=None)
    if not card.rates:
        return Quote(low=ZERO, expected=ZERO, high=ZERO, usage=usage, source=card.source, checked_at=card.checked_at)
    return Quote(
        low=cost(card, offer, usage.seconds, 0.0),
        expected=cost(card, offer, usage.seconds, usage.utilisation),
        high=cost(card, offer, usage.limit, 1.0),
        usage=usage,
        source=card.source,
        checked_at=card.checked_at,
    )


def cost(card: RateCard, offer: Offer, seconds: float, utilisation: float) -> Decimal:
    """US dollars for `seconds` of `offer`, rounded up to a nano-dollar.

    `allocated` and `max` charge for the whole machine, since an offer asks for what it gives; `used` and `active`
    charge for its share in use.
    """
    billed = max(seconds, card.minimum)
    if card.rounding:
        billed = math.ceil(billed / card.rounding) * card.rounding
    total = ZERO
    for rate in card.rates:
        if rate.resource == "start":
            total += rate.usd
            continue
        share = utilisation if rate.basis in ("used", "active") else 1.0
        total += rate.usd * Decimal(repr(_amount(rate.resource, offer) * billed * share))
    return total.quantize(NANO, context=_WIDE)


def _amount(resource: str, offer: Offer) -> float:
    if resource == "cpu":
        return offer.cpu
    if resource == "memory":
        return offer.memory / 1024
    if resource == "disk":
        return offer.disk / 1024
    if resource == "gpu":
        return offer.gpu.count if offer.gpu else 0
    return 1
