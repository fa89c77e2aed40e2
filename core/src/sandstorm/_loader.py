"""Loads plugins, checks them against the hook specifications, and sorts out the broken ones.

This is the one module that imports pluggy. Plugins are trusted code: it guards against accidents, not malice, and it
fails closed. A plugin that the settings name must load; any other broken plugin is set aside with its reason.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import attrs
import pluggy

from sandstorm import _hookspecs
from sandstorm._converter import suggestion
from sandstorm._errors import InvalidInput, PluginError, SettingsError
from sandstorm._hookspecs import GROUP
from sandstorm._languages import Recipe
from sandstorm._sources import Source, origin
from sandstorm.provider import API_VERSION

if TYPE_CHECKING:
    from sandstorm._settings import Settings

T = TypeVar("T")

LIST_HOOKS: dict[str, tuple[str, ...] | type[Any]] = {
    "sandstorm_providers": ("name", "traits", "rates", "offers", "connect"),
    "sandstorm_languages": Recipe,
    "sandstorm_secrets": ("name", "lookup"),
    "sandstorm_strategies": ("name", "rank"),
    "sandstorm_sinks": ("name", "receive", "flush"),
}
"""The hooks that are called once, at the start: the class of what they return, or the attributes that it must have."""

_logger = logging.getLogger("sandstorm.plugins")


@attrs.frozen(kw_only=True)
class SetAside:
    """A broken plugin that nothing in the settings names: it takes no part, for this reason."""

    name: str
    distribution: str
    version: str
    reason: str


@attrs.frozen
class Implementation:
    """One plugin's function for a hook; `call` takes the arguments of the hook's specification in their order."""

    plugin: str
    call: Callable[..., Any]


@attrs.frozen(eq=False)
class Loaded:
    source: Source
    calls: dict[str, Implementation]
    started: dict[str, tuple[Any, ...]]


class _Broken(Exception):  # said of a plugin, and never seen outside
    """A plugin cannot be used, for the reason that this says."""


class Loader:
    """Loads plugins one by one into one pluggy manager, and sorts out the broken ones."""

    def __init__(self, settings: Settings) -> None:
        self.loaded: list[Loaded] = []
        self.set_aside: list[SetAside] = []
        self._settings = settings
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(_hookspecs)

    def add(self, source: Source) -> None:
        """Loads, checks and starts one plugin, or sets it aside. Raises `PluginError` or `SettingsError` if it is named."""
        try:
            plugin = self._instance(source.name, source.load())
            calls = self._calls(source.name, plugin)
            self.loaded.append(Loaded(source, calls, _start(calls)))
        except Exception as exc:
            if self._manager.has_plugin(source.name):
                self._manager.unregister(name=source.name)
            self.set_aside.append(aside_or_fatal(self._settings, source, "load", exc))

    def _instance(self, name: str, plugin: Any) -> Any:
        version = getattr(plugin, "SANDSTORM_API", API_VERSION)
        if type(version) is not int or version != API_VERSION:
            raise _Broken(f"needs contract version {version!r}; this core speaks {API_VERSION}")
        table = self._settings.plugins.get(name, {})
        shape = getattr(plugin, "Settings", None) if inspect.isclass(plugin) else None
        if shape is None:
            if table:
                raise self._settings.error(
                    InvalidInput(f"plugins.{name}.{next(iter(table))}", "no keys: it takes no settings", table)
                )
            return plugin() if inspect.isclass(plugin) else plugin
        return plugin(self._plugin_settings(name, shape, table))

    def _plugin_settings(self, name: str, shape: Any, table: Mapping[str, Any]) -> Any:
        from sandstorm._converter import decode  # cattrs is loaded only where there is something to decode

        if not (inspect.isclass(shape) and attrs.has(shape)):
            raise _Broken("its Settings is no attrs class")
        try:
            return decode(shape, table, f"plugins.{name}")
        except InvalidInput as exc:
            raise self._settings.error(exc) from exc

    def _calls(self, name: str, plugin: Any) -> dict[str, Implementation]:
        self._manager.register(plugin, name)
        calls = {}
        for caller in self._manager.get_hookcallers(plugin) or ():
            for function in caller.get_hookimpls():
                if function.plugin is plugin:
                    calls[caller.name] = _implementation(name, caller, function)
        for attribute in dir(plugin):
            if attribute.startswith(f"{GROUP}_") and attribute not in calls and _is_code(plugin, attribute):
                _refuse_unmarked(attribute, hasattr(_hookspecs, attribute))
        return calls


def aside_or_fatal(settings: Settings, source: Source, stage: str, exc: Exception) -> SetAside:
    """The record of a broken plugin. Raises where the plugin is named in the settings or comes with the core."""
    if source.builtin or source.name in settings.required:
        if isinstance(exc, SettingsError):
            raise exc
        raise PluginError(source.name, stage, described(exc)) from exc
    aside = SetAside(name=source.name, distribution=source.distribution, version=source.version, reason=described(exc))
    _logger.warning("plugin %r of %s is set aside: %s", source.name, origin(source), aside.reason)
    return aside


def described(exc: Exception) -> str:
    """An exception of a plugin as a reason: its class and text, on one line of at most 200 characters."""
    try:
        said = str(exc)
    except Exception:  # an exception that cannot even be shown is still named
        said = ""
    named = isinstance(exc, (_Broken, PluginError, InvalidInput, pluggy.PluginValidationError))
    line = " ".join((said if named and said else f"{type(exc).__name__}: {said}").split())
    return line if len(line) <= 200 else line[:197] + "..."


def _implementation(plugin: str, caller: pluggy.HookCaller, function: pluggy.HookImpl) -> Implementation:
    if not caller.has_spec():
        raise _Broken(f"{caller.name} is no hook{suggestion(caller.name, _specified())}")
    if function.wrapper or function.hookwrapper:
        raise _Broken(f"{caller.name} is a hook wrapper, and no plugin may wrap another")
    if function.tryfirst or function.trylast:
        raise _Broken(f"{caller.name} asks for tryfirst or trylast, and order is by name")
    if inspect.iscoroutinefunction(function.function) or inspect.isasyncgenfunction(function.function):
        raise _Broken(f"{caller.name} is async, and hooks are synchronous")
    specified = inspect.signature(getattr(_hookspecs, caller.name)).parameters
    return Implementation(plugin, _in_order(function.function, tuple(specified), tuple(function.argnames)))


def _in_order(function: Callable[..., T], specified: tuple[str, ...], taken: tuple[str, ...]) -> Callable[..., T]:
    """`function` as one that takes what the specification has, in its order."""
    if taken == specified:
        return function
    places = tuple(specified.index(name) for name in taken)
    return lambda *arguments: function(*[arguments[place] for place in places])


def _refuse_unmarked(attribute: str, is_hook: bool) -> NoReturn:
    if is_hook:
        raise _Broken(f"{attribute} lacks the marker @hookimpl, so that it would never be called")
    raise _Broken(f"{attribute} is no hook{suggestion(attribute, _specified())}")


def _is_code(plugin: Any, attribute: str) -> bool:
    static = inspect.getattr_static(plugin, attribute, None)
    return callable(static) or isinstance(static, (classmethod, property, cached_property))


def _specified() -> tuple[str, ...]:
    return tuple(name for name in dir(_hookspecs) if name.startswith(f"{GROUP}_"))


def _start(calls: Mapping[str, Implementation]) -> dict[str, tuple[Any, ...]]:
    """What the hooks of the start return, so that a plugin that raises in one of them is set aside whole."""
    started = {}
    for hook, shape in LIST_HOOKS.items():
        if hook in calls:
            try:
                started[hook] = tuple(calls[hook].call())
                for value in started[hook]:
                    check_object(value, shape)
            except Exception as exc:
                raise _Broken(f"{hook}: {described(exc)}") from exc
    return started


def check_object(value: Any, shape: tuple[str, ...] | type[Any]) -> None:
    if isinstance(shape, type):
        check_answer(value, shape)
        return
    for member in shape:
        if not hasattr(value, member):
            raise TypeError(f"returned {type(value).__name__}, which has no {member!r}")
        if member == "name" and not (isinstance(value.name, str) and value.name):
            raise TypeError(f"returned {type(value).__name__}, whose name is no text")


def check_answer(answer: Any, expected: type[Any]) -> None:
    if not isinstance(answer, expected):
        raise TypeError(f"returned {type(answer).__name__}, expected {expected.__name__}")
