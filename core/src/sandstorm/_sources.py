"""Where plugins come from: the core's own, those of installed distributions, and those given in code."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from sandstorm._converter import suggestion
from sandstorm._errors import InvalidInput, PluginError

if TYPE_CHECKING:
    from sandstorm._settings import Settings

BUILTINS = (
    ("secrets", "sandstorm._secrets:SecretsPlugin"),
    ("sqlite", "sandstorm._sqlite:SqlitePlugin"),
    ("strategies", "sandstorm._strategies:StrategiesPlugin"),
)
"""The plugins that come with the core: name, and where the object stands."""


@attrs.frozen(kw_only=True)
class Source:
    """A plugin before it is loaded."""

    name: str
    distribution: str
    version: str
    load: Callable[[], Any]
    builtin: bool = False


def unique(sources: Iterable[Source]) -> dict[str, Source]:
    """The sources by name. Raises `PluginError` where two have one name."""
    named: dict[str, Source] = {}
    for source in sources:
        other = named.setdefault(source.name, source)
        if other is not source:
            both = f"{origin(other)} and {origin(source)}"
            raise PluginError(source.name, "load", f"two plugins have this name: {both}; uninstall or rename one")
    return named


def check_names(settings: Settings, known: Mapping[str, Source]) -> None:
    """Raises `PluginError` or `SettingsError` for a plugin that the settings name and that is not there."""
    for name in settings.plugins:
        if name not in known:
            expected = f"a table that an installed plugin owns{suggestion(name, known)}"
            raise settings.error(InvalidInput(f"plugins.{name}", expected, name))
    for name in settings.require:
        if name not in known:
            raise PluginError(name, "load", f"the settings require it, and it is not installed{suggestion(name, known)}")
    for name in settings.disable:
        if name not in known:
            raise settings.error(InvalidInput("disable", f"plugins that are installed{suggestion(name, known)}", name))


def builtin(entry: tuple[str, str]) -> Source:
    """The source of one of `BUILTINS`."""
    from sandstorm import __version__

    name, place = entry
    module, _, attribute = place.partition(":")
    return Source(
        name=name,
        distribution="sandstorm-core",
        version=__version__,
        load=lambda: getattr(importlib.import_module(module), attribute),
        builtin=True,
    )


def installed(entry: importlib.metadata.EntryPoint) -> Source:
    """The source of an entry point."""
    distribution = entry.dist
    return Source(
        name=entry.name,
        distribution=distribution.name if distribution else "",
        version=distribution.version if distribution else "",
        load=entry.load,
    )


def given(entry: tuple[str, Any]) -> Source:
    """The source of a plugin that the calling code made."""
    name, plugin = entry
    return Source(name=name, distribution="", version="", load=lambda: plugin)


def origin(source: Source) -> str:
    """Where a plugin comes from, for people."""
    return f"{source.distribution} {source.version}".strip() or "the calling code"
