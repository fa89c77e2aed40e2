"""What a run may cost, how long it may wait, and where it may go."""

from __future__ import annotations

from decimal import Decimal

import attrs

from sandstorm._check import money, number, text, texts
from sandstorm._errors import InvalidInput


@attrs.frozen(kw_only=True)
class Constraints:
    """What a run may cost, how long it may wait, and where it may go.

    Attributes:
        max_cost: US dollars for the run, everything that it may cause included.
        max_latency: Seconds, predicted at the 95th percentile, from the call to the first command running.
        only: Providers or accounts that may take part (`e2b`, or `e2b:team-b`); empty for all.
        exclude: Providers or accounts that may not.
        prefer: Providers or accounts to try first; failover to the others stays on.
        pin: The one account that may be used; there is no failover then.
        regions: Regions that will do; empty for all.
        attestations: Attestations that the provider must have; an unknown one excludes.
    """

    max_cost: Decimal | None = attrs.field(default=None, converter=money("max_cost"))
    max_latency: float | None = attrs.field(
        default=None, converter=number("max_latency", "a number of seconds above 0", above=True, optional=True)
    )
    only: tuple[str, ...] = attrs.field(default=(), converter=texts("only", "a list of providers"))
    exclude: tuple[str, ...] = attrs.field(default=(), converter=texts("exclude", "a list of providers"))
    prefer: tuple[str, ...] = attrs.field(default=(), converter=texts("prefer", "a list of providers"))
    pin: str | None = attrs.field(default=None, converter=text("pin", "the name of a provider", optional=True, filled=True))
    regions: tuple[str, ...] = attrs.field(default=(), converter=texts("regions", "a list of regions"))
    attestations: tuple[str, ...] = attrs.field(default=(), converter=texts("attestations", "a list of attestations"))

    def __attrs_post_init__(self) -> None:
        if self.pin is not None and self.prefer:
            raise InvalidInput("pin", "no pin beside prefer: a pin is final, a preference is not", self.pin)

    def names(self, account: str) -> bool:
        """Whether the request names this account as one to use."""
        wanted = (*self.only, *self.prefer, *((self.pin,) if self.pin else ()))
        return any(matches(account, name) for name in wanted)


def matches(account: str, name: str) -> bool:
    """Whether `name` means `account`: the account itself (`e2b:team-b`) or its provider (`e2b`)."""
    return account == name or account.partition(":")[0] == name
