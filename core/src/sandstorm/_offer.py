"""What one provider account would give, at which rates, and on which facts that rests."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import attrs

from sandstorm._check import money, number, one_of, table, text, texts, whole
from sandstorm._errors import InvalidInput
from sandstorm._spec import ISOLATION_LEVELS, Gpu

ABILITIES = (
    "Interactive",
    "Reconnect",
    "Gate",
    "Prepare",
    "OneShot",
    "Interpreter",
    "Files",
    "Watch",
    "Ports",
    "Pause",
    "Snapshot",
    "Fork",
    "Extend",
    "Metered",
    "LiveRates",
    "Detach",
    "Gpu",
    "NetworkRules",
)
"""The names of the ability protocols in `sandstorm.provider`, and of three abilities that need no method.

`Detach`: what is ordered with `keep`, and commands that are `detached`, go on without the router. `Gpu`, `NetworkRules`: the
offer says which.
"""


@attrs.frozen
class Support:
    """How far an ability goes. Absent from an offer means unknown, and unknown is never yes.

    Attributes:
        level: `full`, `partial`, `not-implemented` or `impossible`.
        reason: Why it is not full, for people.
    """

    level: str = attrs.field(converter=one_of("level", "full", "partial", "not-implemented", "impossible"))
    reason: str = ""

    def __attrs_post_init__(self) -> None:
        if self.level != "full" and not self.reason:
            raise InvalidInput("reason", "a reason, since the support is not full", self.reason)

    @property
    def usable(self) -> bool:
        """Whether the ability may be called at all."""
        return self.level in ("full", "partial")


FULL = Support("full")


@attrs.frozen
class Figure:
    """A number of seconds and where it comes from.

    Attributes:
        seconds: The figure.
        source: Where it was published or measured, or `"assumed"`.
    """

    seconds: float = attrs.field(converter=number("seconds", "a number of seconds"))
    source: str = "assumed"


@attrs.frozen(kw_only=True)
class Traits:
    """What is true of one account before anything is asked of it.

    Attributes:
        marker: Where a create carries its marker: `idempotency-key`, `name` or `metadata`.
        commit_lag: How long after its `dispatch_by` a create may still take effect at the vendor.
        find_lag: How long after it took effect `find` may still not show it.
        start_p50: Seconds from create to the first command running, median, before anything was observed.
        start_p95: The same at the 95th percentile. None for both where no source states them.
        start_source: The source of the two.
        max_concurrent: Sandboxes at once, or None where unknown or unlimited.
        by_invitation: Takes part unasked only while no other account is configured.
        attestations: Attestations with a source, such as `SOC 2 Type 2`.
    """

    marker: str = attrs.field(converter=one_of("marker", "idempotency-key", "name", "metadata"))
    commit_lag: Figure
    find_lag: Figure
    start_p50: float | None = None
    start_p95: float | None = None
    start_source: str = "unknown"
    max_concurrent: int | None = None
    by_invitation: bool = False
    attestations: tuple[str, ...] = attrs.field(default=(), converter=texts("attestations"))


@attrs.frozen(kw_only=True)
class Facts:
    """What `Session.refresh` learned: plain JSON, dated, and good until it expires.

    Attributes:
        data: What the provider needs for its offers; JSON values only.
        at: Wall-clock seconds since 1970 when it was learned.
        ttl: Seconds for which it may be used. 0 means: for this process only.
    """

    data: dict[str, Any] = attrs.field(factory=dict, converter=table("data"))
    at: float = 0.0
    ttl: float = attrs.field(default=0.0, converter=number("ttl", "a number of seconds"))


@attrs.frozen(kw_only=True)
class Offer:
    """What one account would give for a spec. A candidate is an offer, not an account.

    Attributes:
        provider: The account, such as `e2b:team-b`.
        id: Names the offer among those of its account.
        cpu: vCPU that would be given and billed, at least those asked for.
        memory: MiB, likewise.
        disk: MiB, likewise.
        gpu: Accelerators, or None.
        region: The vendor's name of the region, or None where there is none.
        isolation: The level that this offer has, as verified and not as intended.
        isolation_detail: One sentence about it for people.
        network: The network modes that it can *enforce*, out of `none`, `open` and `allow`.
        abilities: What it can do beyond the contract, by the names of `ABILITIES`.
        lifetime: Seconds after which the vendor ends the sandbox at the latest, whatever happens to the router.
        extendable: Whether the lifetime can be moved once the sandbox runs.
        setup: Seconds that preparing adds to the start.
        spot: Whether the vendor may take it back.
        workdir: The absolute path of the work area in the sandbox, in which programs start; None where that is not known before.
        attestations: Attestations of this class and region.
    """

    provider: str
    id: str = "default"
    cpu: float = attrs.field(converter=number("cpu", "a number of vCPU above 0", above=True))
    memory: int = attrs.field(converter=whole("memory", "a whole number of MiB"))
    disk: int = attrs.field(converter=whole("disk", "a whole number of MiB"))
    gpu: Gpu | None = None
    region: str | None = None
    isolation: str = attrs.field(converter=one_of("isolation", *ISOLATION_LEVELS))
    isolation_detail: str = ""
    network: tuple[str, ...] = ("none",)
    abilities: dict[str, Support] = attrs.field(factory=dict)
    lifetime: float = 3600.0
    extendable: bool = False
    setup: float = 0.0
    spot: bool = False
    workdir: str | None = "/work"
    attestations: tuple[str, ...] = ()

    def can(self, ability: str) -> bool:
        """Whether the ability is declared full or partial."""
        support = self.abilities.get(ability)
        return support is not None and support.usable

    def reason(self, ability: str) -> str:
        """Why the ability is not full, for people; empty where it is."""
        support = self.abilities.get(ability)
        return "it does not say whether it can" if support is None else support.reason


@attrs.frozen(kw_only=True)
class Declined:
    """Why an account makes no offer for a spec.

    Attributes:
        provider: The account.
        rule: A short stable name of the reason, such as `runtime-missing`.
        reason: One sentence for people, with the remedy where there is one.
        id: The offer that is not made, where the account makes several.
    """

    provider: str
    rule: str
    reason: str
    id: str = "default"


@attrs.frozen(kw_only=True)
class Rate:
    """One component of a price.

    Attributes:
        resource: `cpu` (per vCPU-second), `memory` or `disk` (per GiB-second), `gpu` (per GPU-second), `sandbox` (per second), or
            `start` (once for each create).
        usd: US dollars for each unit.
        basis: `allocated`, `used`, `max` (of request and use) or `active`.
    """

    resource: str = attrs.field(converter=one_of("resource", "cpu", "memory", "disk", "gpu", "sandbox", "start"))
    usd: Decimal = attrs.field(converter=money("usd"))
    basis: str = attrs.field(default="allocated", converter=one_of("basis", "allocated", "used", "max", "active"))


@attrs.frozen(kw_only=True)
class RateCard:
    """What an account charges, and how sure that is.

    Attributes:
        rates: The components.
        rounding: Seconds to which the billed time is rounded up; 0 for exact.
        minimum: Seconds billed at least.
        source: Where the figures were published.
        checked_at: The day on which they were last compared with the source.
        confidence: `stated` by the vendor, `transcribed` by a third party, or `own` (the user's).
    """

    rates: tuple[Rate, ...] = ()
    rounding: float = attrs.field(default=0.0, converter=number("rounding", "a number of seconds"))
    minimum: float = attrs.field(default=0.0, converter=number("minimum", "a number of seconds"))
    source: str = attrs.field(converter=text("source", "where the figures come from", filled=True))
    checked_at: date
    confidence: str = attrs.field(default="transcribed", converter=one_of("confidence", "stated", "transcribed", "own"))
