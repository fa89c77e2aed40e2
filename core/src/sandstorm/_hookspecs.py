"""The hooks, by the stage in which they are called.

Hooks are synchronous, pure and fast; they return values or objects, and async lives in the methods of those
objects. Implementations may leave out arguments that they do not need. Arguments are only ever added.
All since 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from decimal import Decimal

    from sandstorm._events import Event, Sink
    from sandstorm._knowledge import Strategy
    from sandstorm._languages import Recipe
    from sandstorm._limits import Limit, SecretSource
    from sandstorm._plan import Candidate, Denial, Exclusion, Request
    from sandstorm._quote import Usage
    from sandstorm._store import Store
    from sandstorm.provider import Provider

GROUP = "sandstorm"
"""The entry point group, and the name under which pluggy keeps the hooks."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def hookimpl(function: _Function) -> _Function:
    """Marks a function or method as an implementation of the hook of its name.

    Sets what pluggy's own marker sets, without importing pluggy: importing a plugin stays light.
    """
    options = {
        "wrapper": False,
        "hookwrapper": False,
        "optionalhook": False,
        "tryfirst": False,
        "trylast": False,
        "specname": None,
    }
    setattr(function, f"{GROUP}_impl", options)
    return function


def hookspec(function: _Function) -> _Function:
    """Marks a function as a hook specification, as pluggy's own marker does."""
    options = {"firstresult": False, "historic": False, "warn_on_impl": None, "warn_on_impl_args": None}
    setattr(function, f"{GROUP}_spec", options)
    return function


# --- start ------------------------------------------------------------------------------------------------


@hookspec
def sandstorm_providers() -> Iterable[Provider]:  # type: ignore[empty-body]
    """Called once for each engine, after settings were read: one object per configured account. No I/O.

    Return an empty list where nothing is configured; raise where the configuration is wrong.
    """


@hookspec
def sandstorm_languages() -> Iterable[Recipe]:  # type: ignore[empty-body]
    """Called once for each engine: further language recipes. A name that is taken is an error."""


@hookspec
def sandstorm_secrets() -> Iterable[SecretSource]:  # type: ignore[empty-body]
    """Called once for each engine: sources of secrets, asked in the order of their plugins' names."""


@hookspec
def sandstorm_strategies() -> Iterable[Strategy]:  # type: ignore[empty-body]
    """Called once for each engine: routing strategies. A name that is taken is an error."""


@hookspec
def sandstorm_store(url: str) -> Store | None:
    """Called once for each engine with the store's URL: the store that serves its scheme, or None.

    Exactly one plugin must answer.
    """


@hookspec
def sandstorm_sinks() -> Iterable[Sink]:  # type: ignore[empty-body]
    """Called once for each engine: objects that receive events through a bounded queue and flush by a deadline."""


# --- admit ------------------------------------------------------------------------------------------------


@hookspec
def sandstorm_admit(request: Request) -> Denial | None:
    """Called first for each run: a `Denial` ends it, None allows it. An exception denies, naming the plugin."""


@hookspec
def sandstorm_limits(request: Request) -> Iterable[Limit]:  # type: ignore[empty-body]
    """Called once a run is admitted: the limits that apply to it. An exception stops the run."""


# --- screen and quote -------------------------------------------------------------------------------------


@hookspec
def sandstorm_screen(request: Request, candidate: Candidate) -> Exclusion | None:
    """Called for each candidate: an `Exclusion` rules it out, None lets it pass. An exception excludes it.

    Every plugin is asked, so that all that rule a candidate out are named.
    """


@hookspec
def sandstorm_price(request: Request, candidate: Candidate, usage: Usage) -> Decimal | None:
    """Called for each candidate: the price in US dollars of `usage`, or None for the provider's own rate card.

    Two answers for one price are an error; an exception stops the run.
    """


# --- after ------------------------------------------------------------------------------------------------


@hookspec
def sandstorm_observe(event: Event) -> None:
    """Called after something happened, where plugins learn for the next run. An exception is logged and swallowed."""
