"""Results, plans and figures in words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal

from sandstorm import Attempt, Exit, Plan, RunResult
from sandstorm.policy import Latency, Quote
from sandstorm.provider import Offer, isolation_rank

SHARED_KERNEL = "SHARED HOST KERNEL"


def usd(amount: Decimal | None) -> str:
    """US dollars as `$0.000012`; `unknown` for None."""
    if amount is None:
        return "unknown"
    digits = f"{amount.normalize():f}"
    return f"${digits}"


def seconds(amount: float | None) -> str:
    """Seconds with as many digits as matter; `unknown` for None."""
    if amount is None:
        return "unknown"
    return f"{amount:.3f} s" if amount < 10 else f"{amount:.1f} s"


def span(amount: float) -> str:
    """A length of time in its two largest units, such as `2h 05m`."""
    whole = max(0, int(amount))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if not minutes:
        return f"{whole}s"
    if not hours:
        return f"{minutes}m {whole % 60:02}s"
    return f"{days}d {hours % 24:02}h" if days else f"{hours}h {minutes % 60:02}m"


def isolation(level: str, detail: str = "") -> str:
    """The level, whether the host's kernel is shared, and the provider's sentence about it."""
    shared = f" ({SHARED_KERNEL})" if isolation_rank(level) <= isolation_rank("container") else ""
    return f"{level}{shared}" + (f": {detail}" if detail else "")


def when(at: float) -> str:
    """A moment, given in seconds since 1970, in local time."""
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def ending(exit: Exit) -> str:
    """How the program ended, in words."""
    if exit.kind == "exited":
        return f"exit code {exit.code}"
    if exit.kind == "signal":
        return f"signal {exit.signal}"
    return exit.kind.replace("-", " ")


def explanation(result: RunResult) -> list[tuple[str, str]]:
    """Where it ran, why there, how long, at what cost, under which isolation: one line each."""
    return [
        ("ran on", f"{result.provider}{_offer(result)}, {ending(result.exit)}"),
        ("because", _why(result)),
        ("took", f"{seconds(result.total_seconds)} in all, {seconds(result.run_seconds)} in the program"),
        ("cost", _cost(result)),
        ("isolation", isolation(result.isolation)),
        *(("open", _left(attempt)) for attempt in result.attempts if attempt.open),
    ]


def _left(attempt: Attempt) -> str:
    most = "an unknown amount" if attempt.exposure is None else usd(attempt.exposure)
    where = f"{attempt.sandbox or attempt.marker} on {attempt.provider}"
    return f"{where} may still exist and cost up to {most}; `sandstorm reap` closes it"


def _offer(result: RunResult) -> str:
    offer = result.attempts[-1].offer if result.attempts else "default"
    return "" if offer == "default" else f" ({offer})"


def _why(result: RunResult) -> str:
    offer = result.attempts[-1].offer if result.attempts else None
    ranked = [each for each in result.plan.candidates if each.candidate.provider == result.provider]
    exact = [each.reason for each in ranked if each.candidate.offer.id == offer]
    reason = next(iter(exact or [each.reason for each in ranked]), f"strategy {result.plan.strategy}")
    failed = [f"{attempt.provider} failed ({attempt.error})" for attempt in result.attempts[:-1]]
    return "; ".join([reason, *failed])


def _cost(result: RunResult) -> str:
    if result.cost is None:
        return "unknown: no price is known"
    open_ = f", and {usd(result.cost_open)} may be added" if result.cost_open is None or result.cost_open else ""
    return f"{usd(result.cost)} ({result.cost_basis}){open_}"


def quoted(quote: Quote) -> str:
    """The expected cost and the most it can be."""
    if quote.expected is None:
        return "unknown"
    return usd(quote.expected) if quote.high == quote.expected else f"{usd(quote.expected)} (at most {usd(quote.high)})"


def predicted(latency: Latency) -> str:
    """The predicted start-up, median and 95th percentile."""
    return "unknown" if latency.p50 is None else f"{seconds(latency.p50)} (p95 {seconds(latency.p95)})"


def machine(offer: Offer) -> str:
    """The machine of an offer in a few words."""
    gpu = f", {offer.gpu.count} x {offer.gpu.model}" if offer.gpu else ""
    region = f", {offer.region}" if offer.region else ""
    return f"{offer.cpu:g} vCPU, {offer.memory} MiB{gpu}{region}"


def plan_pairs(plan: Plan) -> Iterator[tuple[str, str]]:
    """A plan as labelled lines: candidates in order, then exclusions."""
    yield "strategy", plan.strategy
    for number, ranked in enumerate(plan.candidates, 1):
        candidate = ranked.candidate
        yield f"{number}.", f"{candidate.provider} ({candidate.offer.id}): {ranked.reason}"
        yield "", f"machine {machine(candidate.offer)}; isolation {isolation(candidate.offer.isolation)}"
        yield "", f"cost {quoted(candidate.quote)}; start {predicted(candidate.latency)}"
    for line in plan.exclusion_lines:
        yield "excluded", line
    if not plan.candidates:
        yield "result", "no provider may run this"
