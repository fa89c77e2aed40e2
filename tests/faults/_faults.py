"""Which fault strikes where: drawn from the seed, counted once it changed an operation in flight."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection

import attrs

from sandstorm.provider import (
    Ambiguous,
    AuthError,
    CapacityError,
    Conflict,
    InvalidSpec,
    NotSupported,
    OutOfCredit,
    PreparationFailed,
    ProviderDown,
    QuotaError,
    RateLimited,
    SandboxGone,
    SandboxLost,
    StreamLost,
)

ERRORS: dict[str, Callable[[], Exception]] = {
    "capacity": lambda: CapacityError("injected: no room"),
    "quota": lambda: QuotaError("injected: the account's cap is reached"),
    "rate-limited": lambda: RateLimited("injected: too many requests", retry_after=2.0),
    "out-of-credit": lambda: OutOfCredit("injected: no credit"),
    "auth": lambda: AuthError("injected: bad key"),
    "invalid-spec": lambda: InvalidSpec("injected: no such machine"),
    "preparation-caller": lambda: PreparationFailed("injected: does not resolve", fault="caller"),
    "preparation-provider": lambda: PreparationFailed("injected: the builder broke", fault="provider"),
    "provider-down": lambda: ProviderDown("injected: refused"),
    "conflict": lambda: Conflict("injected: in use for something else"),
    "not-supported": lambda: NotSupported("injected: not done here"),
    "timeout-before": lambda: Ambiguous("injected: the request was lost"),
    "unexpected-before": lambda: RuntimeError("injected: a bug in the adapter"),
}
"""Errors that strike before the vendor has acted: every class that may be raised then without a lie."""

LATE_ERRORS: dict[str, Callable[[], Exception]] = {
    "timeout-after": lambda: Ambiguous("injected: the answer was lost"),
    "unexpected-after": lambda: RuntimeError("injected: a bug in the adapter"),
}
"""Errors that strike once the vendor has acted."""

LOST: dict[str, Callable[[], Exception]] = {
    "sandbox-lost": lambda: SandboxLost("injected: evicted"),
    "sandbox-gone": lambda: SandboxGone("injected: released before"),
}
"""Errors that tell the truth about a sandbox, which the vendor has ended just before."""

CUT: dict[str, Callable[[], Exception]] = {
    "stream-lost": lambda: StreamLost("injected: the stream was cut"),
    "provider-down": ERRORS["provider-down"],
    "rate-limited": ERRORS["rate-limited"],
    "unexpected-before": ERRORS["unexpected-before"],
    "timeout-before": ERRORS["timeout-before"],
}
"""How a stream ends that has begun."""

_WAITS = ("delay", "hang-before", "hang-after")
_MAKES = (*ERRORS, *LATE_ERRORS, *_WAITS, "late", "after-absence", "pause-before-send")
_DOES = (*ERRORS, *LATE_ERRORS, *LOST, *_WAITS)
_SAYS = ("provider-down", "auth", "rate-limited", "timeout-before", "unexpected-before", "delay", "hang-before")

VENDOR_SITES: dict[str, tuple[str, ...]] = {
    "connect": _SAYS,
    "refresh": _SAYS,
    "create": _MAKES,
    "launch": _MAKES,
    "attach": _SAYS,
    "find": (*_SAYS, "empty", "torn", "stale", "unfiltered"),
    "start": (*_DOES, "twice"),
    "process": (*CUT, *LOST, "delay"),
    "upload": _DOES,
    "events": (*CUT, *LOST, "delay", "ended-early"),
    "destroy": (*ERRORS, *LATE_ERRORS, *_WAITS, "ineffective"),
}
_WRITES = ("busy", "answer-lost", "slow", "pause-after")
_READS = ("busy", "slow")
STORE_SITES: dict[str, tuple[str, ...]] = {
    "store.begin": _WRITES,
    "store.update": _WRITES,
    "store.finish": _WRITES,
    "store.take": _WRITES,
    "store.run": _READS,
    "store.attempts": _READS,
    "store.open_attempts": _READS,
    "store.living": _READS,
}
ROUTER_SITES = {"router": ("death", "pause", "cancelled"), "clock": ("forward", "back"), "vendor": ("evicted",)}
FEASIBLE = {**VENDOR_SITES, **STORE_SITES, **ROUTER_SITES}
"""Every kind that can strike at a site: the long run has to meet each of them."""

Strike = tuple[str, str, int]
"""Where a fault can strike: the site, who calls there, and the number of the call."""


@attrs.define
class Dice:
    """Draws faults by the seed alone: the same call of the same caller meets the same fault, whatever else is muted."""

    seed: str
    chance: float
    muted: Collection[Strike] = ()
    on: bool = True
    struck: list[tuple[Strike, str]] = attrs.field(factory=list)
    effective: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    _calls: Counter[tuple[str, str]] = attrs.field(factory=Counter)

    def draw(self, site: str, caller: str, chance: float | None = None) -> str | None:
        """The kind of fault that meets this call, or None."""
        number = self._calls[site, caller]
        self._calls[site, caller] += 1
        kinds = FEASIBLE.get(site)
        if not self.on or kinds is None:
            return None
        drawn = self.number(site, caller, number)
        if drawn % 10_000 >= (self.chance if chance is None else chance) * 10_000 or (site, caller, number) in self.muted:
            return None
        kind = kinds[(drawn >> 32) % len(kinds)]
        self.struck.append(((site, caller, number), kind))
        return kind

    def number(self, *what: object) -> int:
        """A large number that belongs to these words and the seed."""
        return int.from_bytes(hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=12).digest(), "big")

    def seconds(self, low: float, high: float) -> float:
        """A time that belongs to the latest fault."""
        return low + (high - low) * (self.number("seconds", len(self.struck)) % 1000) / 1000

    def hit(self, site: str, kind: str) -> None:
        """The fault changed an operation in flight."""
        self.effective[site, kind] += 1
