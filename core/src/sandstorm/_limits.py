"""Limits that policies set, and sources of secrets."""

from __future__ import annotations

from decimal import Decimal
from typing import Protocol

import attrs

from sandstorm._check import money, number, one_of, text, whole


@attrs.frozen(kw_only=True)
class Limit:
    """A limit that the engine reserves against.

    Attributes:
        key: What it is counted for, such as `tenant:acme`; limits with the same key and window are one.
        kind: `spend` or `concurrency`.
        usd: US dollars in each window, for `spend`.
        count: Open attempts at once, for `concurrency`.
        window: Seconds, for `spend`.
    """

    key: str = attrs.field(converter=text("key", "a name", filled=True))
    kind: str = attrs.field(default="spend", converter=one_of("kind", "spend", "concurrency"))
    usd: Decimal = attrs.field(default=Decimal(0), converter=money("usd"))
    count: int = attrs.field(default=0, converter=whole("count", "a whole number"))
    window: float = attrs.field(default=3600.0, converter=number("window", "a number of seconds", above=True))


class SecretSource(Protocol):
    """Where secrets come from. What a lookup raises ends the run, so its text must never quote a value."""

    @property
    def name(self) -> str:
        """The name by which it is shown."""
        ...

    async def lookup(self, secret: str) -> str | None:
        """The value of a secret, or None where this source does not have it. Called for every run anew."""
        ...
