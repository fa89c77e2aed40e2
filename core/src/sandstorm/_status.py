"""What people ask about a client: its accounts, its plugins, one of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from sandstorm._errors import InvalidInput
from sandstorm._loader import SetAside
from sandstorm._offer import Declined, Facts, Offer, RateCard, Traits
from sandstorm._plugins import PluginInfo
from sandstorm._spec import SandboxSpec
from sandstorm._store import AttemptRow, LedgerRow, RunRow

if TYPE_CHECKING:
    from sandstorm._engine import Engine


@attrs.frozen(kw_only=True)
class ProviderStatus:
    """One configured account.

    Attributes:
        name: The account.
        ok: Whether its free check passed.
        detail: What the check said where it did not.
        isolation: The level of its first offer for the default machine, or None.
        offers: What it offers for the default machine, or why not.
        facts: What its offers rest on.
        rates: What it charges.
        traits: What is true of it.
    """

    name: str
    ok: bool
    detail: str
    isolation: str | None
    offers: tuple[Offer | Declined, ...]
    facts: Facts | None
    rates: RateCard | None
    traits: Traits


@attrs.frozen(kw_only=True)
class PluginReport:
    """The plugins that were loaded, and those that were set aside with the reason."""

    loaded: tuple[PluginInfo, ...]
    set_aside: tuple[SetAside, ...]


@attrs.frozen(kw_only=True)
class RunRecord:
    """One run of the journal with its attempts and its money."""

    run: RunRow
    attempts: tuple[AttemptRow, ...]
    ledger: tuple[LedgerRow, ...]


def plugin_report(engine: Engine) -> PluginReport:
    """The engine's plugins."""
    return PluginReport(loaded=tuple(engine.plugins.loaded), set_aside=tuple(engine.plugins.set_aside))


async def provider_statuses(engine: Engine) -> tuple[ProviderStatus, ...]:
    """Every account of the engine, asked now."""
    names: Sequence[str] = tuple(engine.accounts.providers)
    facts = await engine.accounts.facts(names)
    return tuple([await _status(engine, name, facts[name]) for name in names])


async def run_record(engine: Engine, run_id: str) -> RunRecord:
    """A run by its id or the beginning of it. Raises `InvalidInput`."""
    found = await engine.store.run(run_id)
    if found is None:
        raise InvalidInput("run", "the id of a stored run, or the beginning of one", run_id)
    run, attempts, ledger = found
    return RunRecord(run=run, attempts=tuple(attempts), ledger=tuple(ledger))


async def _status(engine: Engine, name: str, facts: Facts | Exception) -> ProviderStatus:
    provider = engine.accounts.providers[name]
    offers: tuple[Offer | Declined, ...] = ()
    detail = ""
    try:
        if isinstance(facts, Exception):
            raise facts
        offers = tuple(provider.offers(SandboxSpec(), facts))
        await (await engine.accounts.session(name)).check()
    except Exception as exc:
        detail = f"{type(exc).__name__}: {exc}"
    given = next((offer for offer in offers if isinstance(offer, Offer)), None)
    return ProviderStatus(
        name=name,
        ok=not detail,
        detail=detail,
        isolation=None if given is None else given.isolation,
        offers=offers,
        facts=None if isinstance(facts, Exception) else facts,
        rates=provider.rates,
        traits=provider.traits,
    )
