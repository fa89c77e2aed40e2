"""Decides: admit, offers and quotes, screen, rank, and a frozen plan. No I/O and no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal

import attrs

from sandstorm._constraints import matches
from sandstorm._errors import Denied, InvalidInput, NotSupported, PluginError
from sandstorm._knowledge import Knowledge, Strategy
from sandstorm._limits import Limit
from sandstorm._offer import Declined, Facts, Offer
from sandstorm._plan import Candidate, Excluded, Exclusion, Plan, Ranked, Request
from sandstorm._plugins import Plugins
from sandstorm._quote import Quote, Usage, quote
from sandstorm._spec import isolation_rank, own_snapshot, snapshot_account
from sandstorm.provider import Provider

SHORTEST_SECONDS = 0.1
"""No program is predicted to take less: prices are quoted for a time, and a sandbox takes some to start."""

STALE_DAYS = 60
"""Prices that were checked longer ago are named as such wherever they decide."""


@attrs.frozen
class Planner:
    """Decides where a request may run and in which order.

    Attributes:
        providers: Every configured account.
        plugins: The hooks.
        strategies: By name.
        invited: Accounts that the settings name; they take part although they are by invitation.
    """

    providers: tuple[Provider, ...]
    plugins: Plugins
    strategies: Mapping[str, Strategy]
    invited: tuple[str, ...] = ()

    def admit(self, request: Request) -> tuple[Limit, ...]:
        """The limits that apply to a run. Raises `Denied` where a policy refuses it, `InvalidInput` for an unknown strategy."""
        if request.strategy not in self.strategies:
            raise InvalidInput("strategy", "one of " + ", ".join(sorted(self.strategies)), request.strategy)
        denial = self.plugins.admit(request)
        if denial is not None:
            raise Denied(denial.plugin, denial.rule, denial.reason)
        limits = self.plugins.limits(request)
        for limit in limits:
            if limit.kind != "spend":
                # A limit that is not enforced must never be ignored: waiting for a slot is not built.
                raise NotSupported(
                    f"limit {limit.key!r} ({limit.kind}) cannot be enforced by this version, so the run is refused"
                )
        return limits

    def invite(self, request: Request) -> tuple[tuple[Provider, ...], tuple[Excluded, ...]]:
        """The accounts that may be asked at all, and why each of the others may not: nothing is sent to those."""
        others = any(not provider.traits.by_invitation for provider in self.providers)
        invited, excluded = [], []
        for provider in self.providers:
            ruled = self._uninvited(provider, request, others)
            if ruled is None:
                invited.append(provider)
            else:
                excluded.append(Excluded(provider=provider.name, offer="*", by=ruled))
        return tuple(invited), tuple(excluded)

    def _uninvited(self, provider: Provider, request: Request, others: bool) -> Exclusion | None:
        account, wanted, snapshot = provider.name, request.constraints, request.spec.snapshot
        if wanted.pin is not None and not matches(account, wanted.pin):
            return _rule("pin", f"the request pins {wanted.pin}")
        if wanted.only and not any(matches(account, name) for name in wanted.only):
            return _rule("only", "the request allows only " + ", ".join(wanted.only))
        if any(matches(account, name) for name in wanted.exclude):
            return _rule("exclude", "the request excludes it")
        missing = [a for a in wanted.attestations if a not in provider.traits.attestations]
        if missing:
            return _rule("attestation", "it is not known to have " + ", ".join(missing))
        named = wanted.names(account) or any(matches(account, name) for name in self.invited)
        if snapshot is not None and snapshot_account(snapshot) != account:
            return _rule("snapshot", f"the snapshot {snapshot} is not one of its account")
        if provider.traits.by_invitation and others and not named:
            return _rule("invitation", "it takes part only where it is named, since another account is configured")
        return None

    def plan(
        self,
        request: Request,
        invited: Sequence[Provider],
        excluded: Sequence[Excluded],
        facts: Mapping[str, Facts | Exception],
        knowledge: Knowledge,
        at: float,
        limits: tuple[Limit, ...] = (),
    ) -> Plan:
        """The decision for an admitted request. `facts` holds what each invited account said, or how it failed."""
        candidates: list[Candidate] = []
        exclusions = list(excluded)
        used: dict[str, Facts] = {}
        usage = _usage(request, knowledge)
        for provider in invited:
            known = facts[provider.name]
            if isinstance(known, Exception):
                reason = f"{type(known).__name__}: {known}"
                exclusions.append(Excluded(provider=provider.name, offer="*", by=_rule("unreachable", reason)))
                continue
            used[provider.name] = known
            for answer in _offers(provider, request, known):
                if isinstance(answer, Declined):
                    ruled = Exclusion(answer.rule, answer.reason, provider.name)
                    exclusions.append(Excluded(provider=provider.name, offer=answer.id, by=ruled))
                    continue
                candidate = self._candidate(provider, answer, request, usage, knowledge)
                rules = (*_screen(request, candidate), *self.plugins.screen(request, candidate))
                if rules:
                    exclusions += [Excluded(provider=provider.name, offer=answer.id, by=rule) for rule in rules]
                else:
                    candidates.append(candidate)
        candidates, cooling = _left_alone(candidates, knowledge, at)
        exclusions += cooling
        return Plan(
            request=request,
            candidates=self._rank(request, candidates, knowledge, at),
            exclusions=tuple(exclusions),
            strategy=request.strategy,
            facts=used,
            limits=limits,
            at=at,
        )

    def _candidate(self, provider: Provider, offer: Offer, request: Request, usage: Usage, knowledge: Knowledge) -> Candidate:
        latency = knowledge.latency(provider.traits, provider.name, offer.id, offer.region, offer.setup)
        candidate = Candidate(offer=offer, quote=quote(provider.rates, offer, usage), latency=latency)
        price = self.plugins.price(request, candidate, usage)
        if price is None:
            return candidate
        # A plugin's price is for the predicted usage; the exposure scales with the time that could be billed.
        high = price * Decimal(repr(max(1.0, usage.limit / max(usage.seconds, 0.001))))
        own = Quote(low=price, expected=price, high=high, usage=usage, source="plugin", checked_at=None)
        return attrs.evolve(candidate, quote=own)

    def _rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge, at: float) -> tuple[Ranked, ...]:
        if not candidates:
            return ()
        strategy = self.strategies[request.strategy]
        try:
            ranked = tuple(strategy.rank(request, tuple(candidates), knowledge))
            returned = {id(r.candidate) for r in ranked}
        except Exception as exc:
            raise PluginError(strategy.name, "rank", f"{type(exc).__name__}: {exc}") from exc
        if len(ranked) != len(candidates) or returned != {id(c) for c in candidates}:
            raise PluginError(strategy.name, "rank", "it did not return each candidate exactly once")
        prefer = request.constraints.prefer
        if prefer:
            ranked = _preferred(ranked, prefer)
        today = date.fromtimestamp(at)
        return tuple(_dated(r, today) for r in ranked)


def _left_alone(candidates: Sequence[Candidate], knowledge: Knowledge, at: float) -> tuple[list[Candidate], list[Excluded]]:
    """Leaves out the candidates whose account is to be left alone for now, unless no other would be left."""
    used: list[Candidate] = []
    excluded: list[Excluded] = []
    for candidate in candidates:
        breaker = knowledge.breaker(candidate.provider, candidate.offer.region)
        if breaker.keeps_away(at):
            reason = f"it is left alone for {breaker.until - at:.0f} s: {breaker.reason}"
            excluded.append(Excluded(provider=candidate.provider, offer=candidate.offer.id, by=_rule("cooling-down", reason)))
        else:
            used.append(candidate)
    return (used, excluded) if used else (list(candidates), [])


def _rule(rule: str, reason: str) -> Exclusion:
    return Exclusion(rule, reason, "core")


def _usage(request: Request, knowledge: Knowledge) -> Usage:
    if request.task is None:
        return Usage(seconds=request.lifetime, limit=request.lifetime)
    seen = knowledge.durations.get(request.spec.environment.language or "")
    timeout = request.task.timeout
    return Usage(seconds=timeout if seen is None else min(max(seen, SHORTEST_SECONDS), timeout), limit=request.lifetime)


def _offers(provider: Provider, request: Request, facts: Facts) -> Sequence[Offer | Declined]:
    try:
        return tuple(provider.offers(own_snapshot(request.spec), facts))
    except Exception as exc:
        reason = f"{type(exc).__name__}: {exc}"
        return (Declined(provider=provider.name, rule="raised", reason=reason, id="*"),)


def _screen(request: Request, candidate: Candidate) -> list[Exclusion]:
    """What the core itself rules out. A control that cannot be enforced excludes; it is never ignored."""
    spec, wanted, offer = request.spec, request.constraints, candidate.offer
    rules = []
    if isolation_rank(offer.isolation) < isolation_rank(spec.isolation):
        rules.append(_rule("isolation", f"it isolates by {offer.isolation}, and {spec.isolation} is the floor"))
    if spec.network.mode not in offer.network:
        rules.append(_rule("network", f"it cannot enforce network {spec.network.mode!r}"))
    if offer.cpu < spec.cpu or offer.memory < spec.memory or offer.disk < spec.disk or _gpus_missing(request, offer):
        rules.append(_rule("size", "its offer is smaller than what was asked for"))
    if spec.region is not None and offer.region != spec.region:
        rules.append(_rule("region", f"it is not in {spec.region}"))
    if wanted.regions and offer.region not in wanted.regions:
        where = "in no stated region" if offer.region is None else f"in {offer.region}"
        rules.append(_rule("regions", f"it is {where}, and the request allows only " + ", ".join(wanted.regions)))
    if offer.lifetime < request.lifetime and not offer.extendable:
        rules.append(_rule("lifetime", f"it ends after {offer.lifetime:g} s, and {request.lifetime:g} s are needed"))
    if request.keep and not offer.can("Detach"):
        rules.append(_rule("detach", f"what runs there does not outlive the router: {offer.reason('Detach')}"))
    if spec.snapshot is not None and not offer.can("Snapshot"):
        rules.append(_rule("snapshot", f"it has no snapshots: {offer.reason('Snapshot')}"))
    if spec.ports and not offer.can("Ports"):
        rules.append(_rule("ports", "it cannot make ports reachable"))
    if wanted.max_cost is not None:
        rules += _too_dear(candidate, wanted.max_cost)
    if wanted.max_latency is not None:
        rules += _too_slow(candidate, wanted.max_latency)
    return rules


def _gpus_missing(request: Request, offer: Offer) -> bool:
    gpu = request.spec.gpu
    return gpu is not None and (offer.gpu is None or offer.gpu.model != gpu.model or offer.gpu.count < gpu.count)


def _too_dear(candidate: Candidate, most: Decimal) -> list[Exclusion]:
    high = candidate.quote.high
    if high is None:
        return [_rule("max_cost", f"its price is unknown, and at most ${most} may be spent")]
    if high > most:
        return [_rule("max_cost", f"it can cost up to ${high.normalize():f} until it is ended, and at most ${most} may be spent")]
    return []


def _too_slow(candidate: Candidate, most: float) -> list[Exclusion]:
    p95 = candidate.latency.p95
    if p95 is None:
        return [_rule("max_latency", f"how soon it starts is unknown, and {most:g} s are allowed")]
    if p95 > most:
        return [_rule("max_latency", f"it is predicted to start within {p95:.2f} s, and {most:g} s are allowed")]
    return []


def _preferred(ranked: Sequence[Ranked], prefer: Sequence[str]) -> tuple[Ranked, ...]:
    """The preferred ones first, in the order of the preferences; the strategy's order holds among equals."""

    def place(r: Ranked) -> int:
        return next((n for n, name in enumerate(prefer) if matches(r.candidate.provider, name)), len(prefer))

    first = sorted(ranked, key=place)
    return tuple(Ranked(r.candidate, f"preferred by the request; {r.reason}") if place(r) < len(prefer) else r for r in first)


def _dated(ranked: Ranked, today: date) -> Ranked:
    checked, cost = ranked.candidate.quote.checked_at, ranked.candidate.quote.expected
    if not cost or checked is None or (today - checked).days <= STALE_DAYS:
        return ranked
    return Ranked(ranked.candidate, f"{ranked.reason}; its prices were last checked on {checked}")
