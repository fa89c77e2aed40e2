"""When an account is left alone for a while: after failures of its own fault, as long as each class of them asks for.

Pure: a breaker is a value, and what follows from an outcome is another value. Time is wall-clock seconds.
"""

from __future__ import annotations

import attrs

FAILURES = 5
"""Failures in a row after which an account is left alone. One success closes the breaker."""

FIRST, LONGEST = 10.0, 300.0
"""Seconds for which it is left alone the first time, and at most: the pause doubles each time that its probe fails."""

SHORT, LONG = 5.0, 900.0
"""Seconds after a lack of room, and after a refusal that only somebody's hand can change."""

PROBE = 120.0
"""Seconds for which a probe keeps others away; a create takes no longer."""

BREAKING = frozenset({"ProviderDown", "Ambiguous", "StreamLost", "PreparationFailed"})
"""Classes of errors that count; the others either ask for a pause of their own or are nobody's fault."""

_PAUSES = {"CapacityError": SHORT, "QuotaError": SHORT, "RateLimited": SHORT, "OutOfCredit": LONG, "AuthError": LONG}
_REMEDIES = {"OutOfCredit": "; top the account up", "AuthError": "; correct its key in the settings"}


@attrs.frozen(kw_only=True)
class Breaker:
    """What is held against one account in one region.

    Attributes:
        failures: Failures in a row that count.
        ejections: How often in a row it was left alone after them.
        until: Until when it is left alone; 0 where it is not.
        reason: Why, for people.
        probing: Whether somebody tries it just now, after its pause.
    """

    failures: int = 0
    ejections: int = 0
    until: float = 0.0
    reason: str = ""
    probing: bool = False

    def keeps_away(self, at: float) -> bool:
        """Whether it should not be used now."""
        return at < self.until


CLOSED = Breaker()


def opened(breaker: Breaker, at: float) -> Breaker:
    """The breaker once an attempt at the account has begun: the first after a pause is its probe, and keeps others away."""
    if not breaker.until or breaker.keeps_away(at):
        return breaker
    return attrs.evolve(breaker, probing=True, until=at + PROBE, reason=f"it is being probed after: {breaker.reason}")


def closed(breaker: Breaker, error: str | None, at: float, *, retry_after: float | None = None, jitter: float = 1.0) -> Breaker:
    """The breaker once an attempt has ended, with the class of its `error` or without one.

    `jitter` stretches the pause, so that routers do not come back all at once.
    """
    if error is None:
        return CLOSED
    if error in _PAUSES:
        pause = _PAUSES[error] if retry_after is None else retry_after
        remedy = _REMEDIES.get(error, "")
        return attrs.evolve(breaker, until=at + pause * jitter, reason=f"{error}{remedy}", probing=False)
    if error not in BREAKING:
        return attrs.evolve(breaker, until=0.0, probing=False) if breaker.probing else breaker
    failures = breaker.failures + 1
    if failures < FAILURES and not breaker.ejections:
        return attrs.evolve(breaker, failures=failures)
    pause = min(FIRST * 2**breaker.ejections, LONGEST) * jitter
    reason = f"{failures} failures in a row, the last {error}"
    return Breaker(failures=failures, ejections=breaker.ejections + 1, until=at + pause, reason=reason)
