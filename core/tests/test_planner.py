"""The planner: every rule names itself and its figure, every plugin that rules something out is named, and plans are plain data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date
from decimal import Decimal
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from strategies import plans

from sandstorm import (
    Constraints,
    Denied,
    Environment,
    Gpu,
    InvalidInput,
    Network,
    NotSupported,
    Plan,
    PluginError,
    ProviderDown,
    SandboxSpec,
    Task,
    decode,
    encode,
)
from sandstorm._planner import Planner
from sandstorm._plugins import Plugins
from sandstorm._settings import Settings
from sandstorm._strategies import Cheapest
from sandstorm.policy import Candidate, Denial, Exclusion, Knowledge, Limit, Observed, Ranked, Request, Usage
from sandstorm.provider import Declined, Facts, Offer, RateCard, Session, Support, hookimpl
from sandstorm.testing import REFERENCE_RATES, reference_traits

AT = 1_767_225_600.0  # the first of January 2026, when the reference rates were checked
EVERYWHERE = Constraints()


@attrs.frozen(kw_only=True)
class Account:
    """An account that makes exactly the offers that it was given, whatever is asked."""

    name: str = "acct"
    traits: Any = attrs.field(factory=lambda: reference_traits(start_seconds=1.5))
    rates: RateCard | None = REFERENCE_RATES
    given: tuple[Offer | Declined, ...] | None = None
    error: Exception | None = None

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer | Declined]:
        """The offers."""
        if self.error is not None:
            raise self.error
        return (offer(self.name),) if self.given is None else self.given

    def connect(self) -> AbstractAsyncContextManager[Session]:
        """Never called: the planner does no I/O."""
        raise NotImplementedError


def offer(provider: str = "acct", **changes: Any) -> Offer:
    """An offer that suits the default machine."""
    fields: dict[str, Any] = {"cpu": 1, "memory": 512, "disk": 512, "isolation": "container", "network": ("none", "open")}
    return Offer(provider=provider, **{**fields, **changes})


def plugin(**hooks: Any) -> Any:
    """A plugin object whose hooks are these functions."""
    return type("Plugin", (), {f"sandstorm_{name}": staticmethod(hookimpl(hook)) for name, hook in hooks.items()})()


def planned(
    *accounts: Account,
    constraints: Constraints = EVERYWHERE,
    spec: SandboxSpec | None = None,
    plugins: Sequence[tuple[str, Any]] = (),
    strategy: Any = None,
    invited: tuple[str, ...] = (),
    facts: dict[str, Facts | Exception] | None = None,
    knowledge: Knowledge | None = None,
    at: float = AT,
) -> Plan:
    """The decision for a small Python program with a lifetime of 420 s."""
    strategy = strategy or Cheapest()
    loaded = Plugins.load(Settings(), builtins=(), extra=tuple(plugins), entry_points=())
    planner = Planner(accounts or (Account(),), loaded, {strategy.name: strategy}, invited)
    request = Request(
        id="run-1",
        task=Task(code="print(1)", language="python"),
        spec=spec or SandboxSpec(),
        constraints=constraints,
        strategy=strategy.name,
        lifetime=420.0,
    )
    planner.admit(request)
    asked, excluded = planner.invite(request)
    known = {account.name: Facts(at=at) for account in asked} | (facts or {})
    return planner.plan(request, asked, excluded, known, knowledge or Knowledge(), at)


def ruled_out(plan: Plan) -> dict[str, tuple[str, str, str]]:
    """Plugin, rule and reason by account, where each account was ruled out once."""
    return {e.provider: (e.by.plugin, e.by.rule, e.by.reason) for e in plan.exclusions}


def order(plan: Plan) -> list[str]:
    """The accounts in the order in which they would be tried."""
    return [ranked.candidate.provider for ranked in plan.candidates]


A, B = Account(name="a"), Account(name="b")


@pytest.mark.parametrize(
    ("constraints", "rule", "figure"),
    [
        (Constraints(pin="b"), "pin", "pins b"),
        (Constraints(only=["b", "c"]), "only", "allows only b, c"),
        (Constraints(exclude=["a"]), "exclude", "excludes it"),
    ],
)
def test_names(constraints: Constraints, rule: str, figure: str) -> None:
    """Pins, lists of the allowed and lists of the excluded rule out every other account before it is asked."""
    plan = planned(A, B, constraints=constraints)
    assert order(plan) == ["b"]
    (excluded,) = plan.exclusions
    assert (excluded.provider, excluded.offer, excluded.by.plugin, excluded.by.rule) == ("a", "*", "core", rule)
    assert figure in excluded.by.reason
    assert "a" not in plan.facts


def test_attestation() -> None:
    """An account that is not known to have an attestation is ruled out by its name; one that has it is not."""
    sound = Account(name="sound", traits=attrs.evolve(reference_traits(), attestations=("SOC 2 Type 2", "HIPAA")))
    plan = planned(A, sound, constraints=Constraints(attestations=["SOC 2 Type 2", "HIPAA"]))
    assert order(plan) == ["sound"]
    assert ruled_out(plan) == {"a": ("core", "attestation", "it is not known to have SOC 2 Type 2, HIPAA")}


HOST = Account(name="local", traits=attrs.evolve(reference_traits(), by_invitation=True), rates=None)


def test_invitation() -> None:
    """An account by invitation takes part alone, or where it is named by the settings or the request, and not otherwise."""
    assert order(planned(HOST)) == ["local"]
    assert ruled_out(planned(HOST, A))["local"][:2] == ("core", "invitation")
    assert sorted(order(planned(HOST, A, invited=("local",)))) == ["a", "local"]
    assert order(planned(HOST, A, constraints=Constraints(only=["local"]))) == ["local"]
    assert order(planned(HOST, A, constraints=Constraints(prefer=["local"]))) == ["local", "a"]
    assert order(planned(HOST, A, constraints=Constraints(pin="local"))) == ["local"]


def test_account_of_a_provider() -> None:
    """A provider's name means all of its accounts, and an account's name only that one."""
    accounts = [Account(name="e2b:one"), Account(name="e2b:two"), A]
    assert order(planned(*accounts, constraints=Constraints(only=["e2b"]))) == ["e2b:one", "e2b:two"]
    assert order(planned(*accounts, constraints=Constraints(only=["e2b:two"]))) == ["e2b:two"]
    assert order(planned(*accounts, constraints=Constraints(exclude=["e2b"]))) == ["a"]


def test_unreachable() -> None:
    """An account whose facts could not be had is ruled out with the error's class and text."""
    plan = planned(A, B, facts={"a": ProviderDown("refused")})
    assert (order(plan), ruled_out(plan)) == (["b"], {"a": ("core", "unreachable", "ProviderDown: refused")})


def test_declined() -> None:
    """What an account declines is named with the account's own rule."""
    plan = planned(Account(given=(Declined(provider="acct", rule="runtime-missing", reason="no python", id="small"),)))
    (excluded,) = plan.exclusions
    assert (excluded.offer, excluded.by) == ("small", Exclusion("runtime-missing", "no python", "acct"))


def test_offers_raise() -> None:
    """An account whose offers raise is ruled out, and the others are not affected."""
    plan = planned(Account(name="broken", error=ZeroDivisionError("oops")), B)
    assert (order(plan), ruled_out(plan)) == (["b"], {"broken": ("broken", "raised", "ZeroDivisionError: oops")})


@pytest.mark.parametrize(
    ("spec", "constraints", "rule", "figures"),
    [
        (SandboxSpec(isolation="microvm"), EVERYWHERE, "isolation", ["container", "microvm"]),
        (SandboxSpec(network="open"), EVERYWHERE, None, []),
        (SandboxSpec(network=Network(mode="allow", hosts=["example.org"])), EVERYWHERE, "network", ["'allow'"]),
        (SandboxSpec(cpu=2), EVERYWHERE, "size", []),
        (SandboxSpec(memory=513), EVERYWHERE, "size", []),
        (SandboxSpec(disk=513), EVERYWHERE, "size", []),
        (SandboxSpec(gpu=Gpu(model="H100")), EVERYWHERE, "size", []),
        (SandboxSpec(region="mars"), EVERYWHERE, "region", ["mars"]),
        (SandboxSpec(ports=[80]), EVERYWHERE, "ports", []),
        (SandboxSpec(), Constraints(regions=["eu", "us"]), "regions", ["no stated region", "eu, us"]),
        (SandboxSpec(), Constraints(max_cost="0.004"), "max_cost", ["$0.00462", "$0.004"]),
        (SandboxSpec(), Constraints(max_cost="0.00462"), None, []),
        (SandboxSpec(), Constraints(max_latency=1), "max_latency", ["1.50 s", "1 s"]),
        (SandboxSpec(), Constraints(max_latency=1.5), None, []),
    ],
)
def test_core_rules(spec: SandboxSpec, constraints: Constraints, rule: str | None, figures: list[str]) -> None:
    """Each rule of the core rules out what it should, by its name and with its figures, and lets exact fits pass."""
    plan = planned(spec=spec, constraints=constraints)
    if rule is None:
        assert (order(plan), plan.exclusions) == (["acct"], ())
        return
    assert plan.candidates == ()
    (by_plugin, by_rule, reason) = ruled_out(plan)["acct"]
    assert (by_plugin, by_rule) == ("core", rule)
    assert [figure for figure in figures if figure not in reason] == []


@pytest.mark.parametrize(
    ("account", "constraints", "rule", "figures"),
    [
        (Account(given=(offer(network=("open",)),)), EVERYWHERE, "network", ["'none'"]),
        (Account(given=(offer(lifetime=419.0),)), EVERYWHERE, "lifetime", ["419 s", "420 s"]),
        (Account(given=(offer(lifetime=419.0, extendable=True),)), EVERYWHERE, None, []),
        (Account(given=(offer(region="us"),)), Constraints(regions=["eu"]), "regions", ["in us", "eu"]),
        (Account(given=(offer(region="eu"),)), Constraints(regions=["eu"]), None, []),
        (Account(rates=None), Constraints(max_cost="9"), "max_cost", ["unknown", "$9"]),
        (
            Account(traits=attrs.evolve(reference_traits(), start_p50=None, start_p95=None)),
            Constraints(max_latency=60),
            "max_latency",
            ["unknown", "60 s"],
        ),
        (Account(given=(offer(setup=2.0),)), Constraints(max_latency=3), "max_latency", ["3.50 s"]),
    ],
)
def test_rules_of_offers(account: Account, constraints: Constraints, rule: str | None, figures: list[str]) -> None:
    """A control that an offer cannot enforce, and a figure that is unknown, rule it out."""
    plan = planned(account, constraints=constraints)
    if rule is None:
        assert order(plan) == ["acct"]
        return
    (excluded,) = plan.exclusions
    assert (excluded.by.plugin, excluded.by.rule, plan.candidates) == ("core", rule, ())
    assert [figure for figure in figures if figure not in excluded.by.reason] == []


def test_gpus() -> None:
    """Accelerators must be of the model asked for, and enough of them."""
    spec = SandboxSpec(gpu=Gpu(model="H100", count=2))
    given = (
        offer(id="one", gpu=Gpu(model="H100")),
        offer(id="other", gpu=Gpu(model="A100", count=8)),
        offer(id="two", gpu=Gpu(model="H100", count=2)),
    )
    plan = planned(Account(given=given), spec=spec)
    assert [ranked.candidate.offer.id for ranked in plan.candidates] == ["two"]
    assert [(e.offer, e.by.rule) for e in plan.exclusions] == [("one", "size"), ("other", "size")]


def test_ports() -> None:
    """An offer whose ports are declared usable may take a program that listens."""
    given = (offer(abilities={"Ports": Support("partial", "HTTP only")}),)
    assert order(planned(Account(given=given), spec=SandboxSpec(ports=[80]))) == ["acct"]


def test_all_rules_are_named() -> None:
    """An offer that breaks several rules is named with each of them."""
    plan = planned(spec=SandboxSpec(cpu=4, isolation="microvm"), constraints=Constraints(max_cost=0, max_latency=1))
    assert [e.by.rule for e in plan.exclusions] == ["isolation", "size", "max_cost", "max_latency"]


def test_preference_is_no_pin() -> None:
    """What is preferred comes first, in the order of the preferences, and every other candidate stays."""
    accounts = [Account(name=name) for name in "abcd"]
    plan = planned(*accounts, constraints=Constraints(prefer=["d", "b", "zz"]))
    assert order(plan) == ["d", "b", "a", "c"]
    assert [ranked.reason.startswith("preferred by the request; ") for ranked in plan.candidates] == [True, True, False, False]


# --- plugins ----------------------------------------------------------------------------------------------


def test_screen() -> None:
    """Every plugin that rules a candidate out is named with its rule; one without an opinion is not."""
    plan = planned(
        A,
        B,
        plugins=[
            ("residency", plugin(screen=lambda request, candidate: Exclusion("eu-only", "it is in the US") if candidate.provider == "a" else None)),
            ("budget", plugin(screen=lambda request, candidate: Exclusion("dear", "it is dear") if candidate.provider == "a" else None)),
            ("silent", plugin(screen=lambda request, candidate: None)),
        ],
    )  # fmt: skip
    assert order(plan) == ["b"]
    assert [(e.provider, e.by.plugin, e.by.rule, e.by.reason) for e in plan.exclusions] == [
        ("a", "budget", "dear", "it is dear"),
        ("a", "residency", "eu-only", "it is in the US"),
    ]
    assert "excluded a: it is dear (budget/dear)" in plan.reasons


def test_screen_beside_the_core() -> None:
    """A plugin is asked about what the core has ruled out too, so that all reasons are told."""
    ban = plugin(screen=lambda request, candidate: Exclusion("ban", "banned"))
    plan = planned(spec=SandboxSpec(cpu=4), plugins=[("ban", ban)])
    assert [(e.by.plugin, e.by.rule) for e in plan.exclusions] == [("core", "size"), ("ban", "ban")]


def raising(*_: Any) -> Any:
    """What a broken hook does."""
    raise ZeroDivisionError("oops")


def test_screen_raises() -> None:
    """A plugin that raises while screening rules the candidate out, by its name."""
    plan = planned(plugins=[("broken", plugin(screen=lambda request, candidate: raising()))])
    assert plan.candidates == ()
    by_plugin, _, reason = ruled_out(plan)["acct"]
    assert by_plugin == "broken"
    assert "ZeroDivisionError" in reason


def test_admit() -> None:
    """A denial ends the run with plugin, rule and reason; a plugin that raises denies as well."""
    deny = plugin(admit=lambda request: Denial("weekend", "nobody watches"))
    with pytest.raises(Denied, match=r"denied by guard \(weekend\): nobody watches"):
        planned(plugins=[("guard", deny)])
    with pytest.raises(Denied, match=r"denied by broken .*ZeroDivisionError") as caught:
        planned(plugins=[("broken", plugin(admit=lambda request: raising()))])
    assert caught.value.plugin == "broken"


def test_limits() -> None:
    """One that cannot be enforced refuses the run, and a plugin that raises while it is asked for limits stops it."""
    with pytest.raises(NotSupported, match=r"'tenant:default' \(concurrency\) cannot be enforced"):
        planned(plugins=[("cap", plugin(limits=lambda request: [Limit(key="tenant:default", kind="concurrency", count=3)]))])
    with pytest.raises(PluginError, match="'broken'"):
        planned(plugins=[("broken", plugin(limits=lambda request: raising()))])


def test_price() -> None:
    """A plugin's price replaces the rate card's, scales to the exposure, and obeys `max_cost`; one that raises stops the run."""
    flat = ("flat", plugin(price=lambda request, candidate, usage: Decimal("0.30")))
    (ranked,) = planned(plugins=[flat]).candidates
    assert (ranked.candidate.quote.expected, ranked.candidate.quote.source) == (Decimal("0.30"), "plugin")
    assert ranked.candidate.quote.high == Decimal("0.30") * Decimal("1.4")
    assert ruled_out(planned(plugins=[flat], constraints=Constraints(max_cost="0.4")))["acct"][1] == "max_cost"
    with pytest.raises(PluginError, match="'broken'"):
        planned(plugins=[("broken", plugin(price=lambda request, candidate, usage: raising()))])


@attrs.frozen
class Told:
    """A strategy that returns what it was told to."""

    answer: Any
    name: str = "told"

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Any:
        """The answer."""
        return self.answer(candidates)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda candidates: [Ranked(c, "") for c in candidates][1:], "exactly once"),
        (lambda candidates: [Ranked(candidates[0], "")] * 2, "exactly once"),
        (lambda candidates: [Ranked(attrs.evolve(c), "") for c in candidates], "exactly once"),
        (lambda candidates: [Ranked(c, "") for c in (*candidates, candidates[0])], "exactly once"),
        (lambda candidates: candidates, "AttributeError"),
        (lambda candidates: None, "TypeError"),
        (raising, "ZeroDivisionError: oops"),
    ],
)
def test_strategy_that_loses_a_candidate(answer: Any, says: str) -> None:
    """A strategy that drops, doubles, forges or raises is a `PluginError` with its name."""
    with pytest.raises(PluginError, match=rf"plugin 'told' \(rank\): .*{says}"):
        planned(A, B, strategy=Told(answer))


def test_unknown_strategy() -> None:
    """A strategy that is not installed is the caller's mistake, and the installed ones are named."""
    loaded = Plugins.load(Settings(), builtins=(), extra=(), entry_points=())
    planner = Planner((A,), loaded, {"cheapest": Cheapest()})
    request = Request(id="r", task=None, spec=SandboxSpec(), constraints=EVERYWHERE, strategy="best", lifetime=60)
    with pytest.raises(InvalidInput, match="strategy: expected one of cheapest, got 'best'"):
        planner.admit(request)


# --- predictions ------------------------------------------------------------------------------------------


def test_quote_uses_what_was_learned() -> None:
    """The expected cost is for the observed duration of the language, and at most for the timeout."""

    def usage(seconds: float) -> Usage:
        return planned(
            spec=SandboxSpec(environment=Environment(language="python")),
            knowledge=Knowledge(durations={"python": seconds}),
        ).candidates[0].candidate.quote.usage  # fmt: skip

    assert (usage(7.0).seconds, usage(1e6).seconds, usage(7.0).limit) == (7.0, 300.0, 420.0)
    assert planned().candidates[0].candidate.quote.usage.seconds == 300.0


def test_latency_uses_what_was_learned() -> None:
    """An observed start replaces the provider's own figure, by account, offer and region."""
    seen = Knowledge(observed={("a", "default", ""): Observed(start_p50=3, start_p95=4, starts=9)})
    plan = planned(A, B, knowledge=seen)
    latencies = {ranked.candidate.provider: ranked.candidate.latency for ranked in plan.candidates}
    assert (latencies["a"].p95, latencies["a"].source, latencies["a"].weight) == (4, "observed", 9)
    assert (latencies["b"].p95, latencies["b"].source, latencies["b"].weight) == (1.5, "in memory", 0)


def test_stale_prices_are_named() -> None:
    """A price that was checked more than 60 days ago says so in the reason, and a fresh one or none at all does not."""
    free = RateCard(source="own machine", checked_at=date(2020, 1, 1))
    day = 86400
    assert "checked" not in planned(at=AT + 60 * day).candidates[0].reason
    assert planned(at=AT + 62 * day).candidates[0].reason.endswith("its prices were last checked on 2026-01-01")
    assert "checked" not in planned(Account(rates=free)).candidates[0].reason


def test_no_account() -> None:
    """Without any account the plan is empty and gives no reasons."""
    loaded = Plugins.load(Settings(), builtins=(), extra=(), entry_points=())
    request = Request(id="r", task=None, spec=SandboxSpec(), constraints=EVERYWHERE, lifetime=60)
    plan = Planner((), loaded, {"cheapest": Cheapest()}).plan(request, (), (), {}, Knowledge(), AT)
    assert (plan.candidates, plan.reasons) == ((), ())


def test_same_input_same_plan() -> None:
    """Deciding is pure: the same request, facts and knowledge give an equal plan."""
    assert planned(A, B, HOST) == planned(A, B, HOST)


def test_decided_plan_round_trip() -> None:
    """A plan that was decided here survives JSON unchanged, exclusions and quotes included."""
    plan = planned(A, B, HOST, Account(name="c", rates=None), constraints=Constraints(exclude=["b"]))
    assert len(plan.candidates) == 2
    assert decode(Plan, encode(plan)) == plan


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans)
def test_any_plan_round_trip(plan: Plan) -> None:
    """Any plan survives JSON unchanged."""
    assert decode(Plan, encode(plan)) == plan
