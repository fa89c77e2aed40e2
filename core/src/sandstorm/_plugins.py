"""The plugins: loaded, checked, and called through one typed method for each hook.

This is the one module that imports pluggy. Plugins are trusted code: it guards against accidents, not malice, and it
fails closed. A plugin that the settings name must load; any other broken plugin is set aside with its reason.
"""

# whatever a plugin raises is attributed to it; interrupts and cancellation are no `Exception`

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import attrs
import pluggy

from sandstorm import _hookspecs
from sandstorm._constraints import matches
from sandstorm._errors import InvalidInput, PluginError, SettingsError
from sandstorm._hookspecs import GROUP
from sandstorm._languages import RECIPES, Languages, Recipe
from sandstorm._limits import Limit
from sandstorm._plan import Denial, Exclusion
from sandstorm.provider import API_VERSION

if TYPE_CHECKING:
    from sandstorm._events import Event, Sink
    from sandstorm._knowledge import Strategy
    from sandstorm._limits import SecretSource
    from sandstorm._plan import Candidate, Request
    from sandstorm._quote import Usage
    from sandstorm._settings import Settings
    from sandstorm._store import Store
    from sandstorm.provider import Provider

T = TypeVar("T")

BUILTINS = (
    ("sqlite", "sandstorm._sqlite:SqlitePlugin"),
    ("strategies", "sandstorm._strategies:StrategiesPlugin"),
)
"""The plugins that come with the core: name, and where the object stands."""

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
class PluginInfo:
    """A plugin that is loaded: where it comes from, and the hooks that it implements."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    builtin: bool


@attrs.frozen(kw_only=True)
class SetAside:
    """A broken plugin that nothing in the settings names: it takes no part, for this reason."""

    name: str
    distribution: str
    version: str
    reason: str


@attrs.frozen(kw_only=True)
class _Source:
    """A plugin before it is loaded."""

    name: str
    distribution: str
    version: str
    load: Callable[[], Any]
    builtin: bool = False


@attrs.frozen
class _Implementation:
    """One plugin's function for a hook; `call` takes the arguments of the hook's specification in their order."""

    plugin: str
    call: Callable[..., Any]


@attrs.frozen(eq=False)
class _Loaded:
    source: _Source
    calls: dict[str, _Implementation]
    started: dict[str, tuple[Any, ...]]


class _Broken(Exception):  # said of a plugin, and never seen outside
    """A plugin cannot be used, for the reason that this says."""


class Plugins:
    """The loaded plugins of one engine. `loaded` and `set_aside` say which they are."""

    def __init__(self, settings: Settings, loaded: Sequence[_Loaded], set_aside: Sequence[SetAside]) -> None:
        self._settings = settings
        self._loaded = sorted(loaded, key=lambda plugin: plugin.source.name)
        self._set_aside = list(set_aside)
        self._index()

    def _index(self) -> None:
        """Looks up once what is called for each run, so that a call costs no more than the functions themselves."""
        self._admit = self._implementations("sandstorm_admit")
        self._limits = self._implementations("sandstorm_limits")
        self._screen = self._implementations("sandstorm_screen")
        self._price = self._implementations("sandstorm_price")
        self._observe = self._implementations("sandstorm_observe")

    @classmethod
    def load(
        cls,
        settings: Settings,
        *,
        builtins: Sequence[tuple[str, str]] = BUILTINS,
        extra: Iterable[tuple[str, Any]] = (),
        entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
    ) -> Plugins:
        """The built-in plugins, those of the installed distributions, and the `extra` ones given in code.

        Raises `PluginError` for two of one name and for a named one that is missing or broken, and `SettingsError` for a
        table that no plugin owns or that its plugin does not accept.
        """
        found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        sources = _unique((*map(_builtin, builtins), *map(_installed, found), *map(_given, extra)))
        _check_names(settings, sources)
        loader = _Loader(settings)
        for name in sorted(sources):
            if name not in settings.disable:
                loader.add(sources[name])
        return cls(settings, loader.loaded, loader.set_aside)

    @property
    def loaded(self) -> tuple[PluginInfo, ...]:
        """The plugins that take part, by name."""
        return tuple(
            PluginInfo(
                name=plugin.source.name,
                distribution=plugin.source.distribution,
                version=plugin.source.version,
                hooks=tuple(sorted(plugin.calls)),
                builtin=plugin.source.builtin,
            )
            for plugin in self._loaded
        )

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        """The broken plugins that take no part, by name."""
        return tuple(sorted(self._set_aside, key=lambda plugin: plugin.name))

    # --- start --------------------------------------------------------------------------------------------

    def providers(self) -> tuple[Provider, ...]:
        """Every configured account. Raises `PluginError` where two have one name, `SettingsError` where one is missing."""
        accounts = self._named("sandstorm_providers")
        for wanted in self._settings.providers:
            if not any(matches(account, wanted) for account in accounts):
                expected = "accounts that are configured" + _suggestion(wanted, accounts)
                raise self._settings.error(InvalidInput("providers", expected, wanted))
        return tuple(accounts.values())

    def languages(self) -> Languages:
        """The built-in recipes and those of plugins. Raises `PluginError` where a name is taken."""
        owners = {name: "sandstorm-core" for recipe in RECIPES for name in (recipe.language, *recipe.aliases)}
        recipes: list[Recipe] = []
        for plugin, recipe in self._started("sandstorm_languages"):
            for name in dict.fromkeys((recipe.language, *recipe.aliases)):
                if name in owners:
                    raise PluginError(plugin, "languages", f"the language {name!r} is already that of {owners[name]}")
                owners[name] = plugin
            recipes.append(recipe)
        return Languages((*RECIPES, *recipes))

    def secrets(self) -> tuple[SecretSource, ...]:
        """The sources of secrets, in the order in which they are asked."""
        return tuple(source for _, source in self._started("sandstorm_secrets"))

    def strategies(self) -> dict[str, Strategy]:
        """The routing strategies by name. Raises `PluginError` where two have one name."""
        return self._named("sandstorm_strategies")

    def store(self, url: str) -> Store:
        """The store that serves `url`. Raises `PluginError` for two, `SettingsError` for none."""
        answers: list[tuple[str, Any]] = []
        for plugin in list(self._loaded):
            implementation = plugin.calls.get("sandstorm_store")
            if implementation is None:
                continue
            try:
                store = implementation.call(url)
                if store is not None:
                    _check_object(store, ("url", "open", "begin", "update", "finish"))
                    answers.append((implementation.plugin, store))
            except InvalidInput as exc:  # the URL is wrong, and not the plugin
                raise self._settings.error(exc) from exc
            except Exception as exc:
                self._drop(plugin, exc)
        if len(answers) > 1:
            _refuse_two("store", [name for name, _ in answers], f"both serve {_scheme(url)}")
        if not answers:
            raise self._settings.error(InvalidInput("store", "a URL that an installed store serves", _scheme(url)))
        return answers[0][1]  # type: ignore[no-any-return]

    def sinks(self) -> tuple[Sink, ...]:
        """The objects that receive events."""
        return tuple(sink for _, sink in self._started("sandstorm_sinks"))

    # --- admit --------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> Denial | None:
        """The first denial by plugin name, or None. An exception, or an answer of another kind, denies."""
        for implementation in self._admit:
            try:
                denial = implementation.call(request)
                if denial is None:
                    continue
                _check_answer(denial, Denial)
            except Exception as exc:
                return Denial("raised", described(exc), implementation.plugin)
            return Denial(denial.rule, denial.reason, implementation.plugin)
        return None

    def limits(self, request: Request) -> tuple[Limit, ...]:
        """Every limit that applies. Raises `PluginError` where a plugin raises or returns something else."""
        limits: list[Limit] = []
        for implementation in self._limits:
            try:
                answer = tuple(implementation.call(request))
                for limit in answer:
                    _check_answer(limit, Limit)
            except Exception as exc:
                raise PluginError(implementation.plugin, "limits", described(exc)) from exc
            limits.extend(answer)
        return tuple(limits)

    # --- screen and quote ---------------------------------------------------------------------------------

    def screen(self, request: Request, candidate: Candidate) -> tuple[Exclusion, ...]:
        """Every exclusion of the candidate. An exception, or an answer of another kind, excludes."""
        exclusions: list[Exclusion] = []
        for implementation in self._screen:
            try:
                answer = implementation.call(request, candidate)
                if answer is None:
                    continue
                _check_answer(answer, Exclusion)
            except Exception as exc:
                exclusions.append(Exclusion("raised", described(exc), implementation.plugin))
            else:
                exclusions.append(Exclusion(answer.rule, answer.reason, implementation.plugin))
        return tuple(exclusions)

    def price(self, request: Request, candidate: Candidate, usage: Usage) -> Decimal | None:
        """The price in US dollars, or None for the provider's own card. Raises `PluginError`, also where two answer."""
        prices: list[tuple[str, Decimal]] = []
        for implementation in self._price:
            try:
                answer = implementation.call(request, candidate, usage)
                if answer is None:
                    continue
                _check_price(answer)
            except Exception as exc:
                raise PluginError(implementation.plugin, "price", described(exc)) from exc
            prices.append((implementation.plugin, answer))
        if len(prices) > 1:
            _refuse_two("price", [name for name, _ in prices], f"both price {candidate.provider}")
        return prices[0][1] if prices else None

    # --- after --------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Shows the event to every plugin; what they raise is logged and swallowed."""
        for implementation in self._observe:
            try:
                implementation.call(event)
            except Exception as exc:
                _logger.warning("plugin %r (observe): %s", implementation.plugin, described(exc))

    # --- how ----------------------------------------------------------------------------------------------

    def _implementations(self, hook: str) -> tuple[_Implementation, ...]:
        return tuple(plugin.calls[hook] for plugin in self._loaded if hook in plugin.calls)

    def _started(self, hook: str) -> Iterator[tuple[str, Any]]:
        for plugin in self._loaded:
            for value in plugin.started.get(hook, ()):
                yield plugin.source.name, value

    def _named(self, hook: str) -> dict[str, Any]:
        named: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for plugin, value in self._started(hook):
            if value.name in named:
                _refuse_two(hook.removeprefix("sandstorm_"), [owners[value.name], plugin], f"both have {value.name!r}")
            named[value.name] = value
            owners[value.name] = plugin
        return named

    def _drop(self, plugin: _Loaded, exc: Exception) -> None:
        """A store's plugin raised: fatal where it is named or built in, else it takes no further part."""
        self._set_aside.append(_aside_or_fatal(self._settings, plugin.source, "store", exc))
        self._loaded.remove(plugin)
        self._index()


class _Loader:
    """Loads plugins one by one into one pluggy manager, and sorts out the broken ones."""

    def __init__(self, settings: Settings) -> None:
        self.loaded: list[_Loaded] = []
        self.set_aside: list[SetAside] = []
        self._settings = settings
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(_hookspecs)

    def add(self, source: _Source) -> None:
        """Loads, checks and starts one plugin, or sets it aside. Raises `PluginError` or `SettingsError` if it is named."""
        try:
            plugin = self._instance(source.name, source.load())
            calls = self._calls(source.name, plugin)
            self.loaded.append(_Loaded(source, calls, _start(calls)))
        except Exception as exc:
            if self._manager.has_plugin(source.name):
                self._manager.unregister(name=source.name)
            self.set_aside.append(_aside_or_fatal(self._settings, source, "load", exc))

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

    def _calls(self, name: str, plugin: Any) -> dict[str, _Implementation]:
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


def _unique(sources: Iterable[_Source]) -> dict[str, _Source]:
    unique: dict[str, _Source] = {}
    for source in sources:
        other = unique.setdefault(source.name, source)
        if other is not source:
            both = f"{_origin(other)} and {_origin(source)}"
            raise PluginError(source.name, "load", f"two plugins have this name: {both}; uninstall or rename one")
    return unique


def _check_names(settings: Settings, known: Mapping[str, _Source]) -> None:
    for name in settings.plugins:
        if name not in known:
            expected = f"a table that an installed plugin owns{_suggestion(name, known)}"
            raise settings.error(InvalidInput(f"plugins.{name}", expected, name))
    for name in settings.require:
        if name not in known:
            raise PluginError(name, "load", f"the settings require it, and it is not installed{_suggestion(name, known)}")
    for name in settings.disable:
        if name not in known:
            raise settings.error(InvalidInput("disable", f"plugins that are installed{_suggestion(name, known)}", name))


def _aside_or_fatal(settings: Settings, source: _Source, stage: str, exc: Exception) -> SetAside:
    """The record of a broken plugin. Raises where the plugin is named in the settings or comes with the core."""
    if source.builtin or source.name in settings.required:
        if isinstance(exc, SettingsError):
            raise exc
        raise PluginError(source.name, stage, described(exc)) from exc
    aside = SetAside(name=source.name, distribution=source.distribution, version=source.version, reason=described(exc))
    _logger.warning("plugin %r of %s is set aside: %s", source.name, _origin(source), aside.reason)
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


# --- where plugins come from --------------------------------------------------------------------------------


def _builtin(entry: tuple[str, str]) -> _Source:
    from sandstorm import __version__

    name, place = entry
    module, _, attribute = place.partition(":")
    return _Source(
        name=name,
        distribution="sandstorm-core",
        version=__version__,
        load=lambda: getattr(importlib.import_module(module), attribute),
        builtin=True,
    )


def _installed(entry: importlib.metadata.EntryPoint) -> _Source:
    distribution = entry.dist
    return _Source(
        name=entry.name,
        distribution=distribution.name if distribution else "",
        version=distribution.version if distribution else "",
        load=entry.load,
    )


def _given(entry: tuple[str, Any]) -> _Source:
    name, plugin = entry
    return _Source(name=name, distribution="", version="", load=lambda: plugin)


def _origin(source: _Source) -> str:
    return f"{source.distribution} {source.version}".strip() or "the calling code"


# --- what a plugin may be -----------------------------------------------------------------------------------


def _implementation(plugin: str, caller: pluggy.HookCaller, function: pluggy.HookImpl) -> _Implementation:
    if not caller.has_spec():
        raise _Broken(f"{caller.name} is no hook{_suggestion(caller.name, _specified())}")
    if function.wrapper or function.hookwrapper:
        raise _Broken(f"{caller.name} is a hook wrapper, and no plugin may wrap another")
    if function.tryfirst or function.trylast:
        raise _Broken(f"{caller.name} asks for tryfirst or trylast, and order is by name")
    if inspect.iscoroutinefunction(function.function) or inspect.isasyncgenfunction(function.function):
        raise _Broken(f"{caller.name} is async, and hooks are synchronous")
    specified = inspect.signature(getattr(_hookspecs, caller.name)).parameters
    return _Implementation(plugin, _in_order(function.function, tuple(specified), tuple(function.argnames)))


def _in_order(function: Callable[..., T], specified: tuple[str, ...], taken: tuple[str, ...]) -> Callable[..., T]:
    """`function` as one that takes what the specification has, in its order."""
    if taken == specified:
        return function
    places = tuple(specified.index(name) for name in taken)
    return lambda *arguments: function(*[arguments[place] for place in places])


def _refuse_unmarked(attribute: str, is_hook: bool) -> NoReturn:
    if is_hook:
        raise _Broken(f"{attribute} lacks the marker @hookimpl, so that it would never be called")
    raise _Broken(f"{attribute} is no hook{_suggestion(attribute, _specified())}")


def _is_code(plugin: Any, attribute: str) -> bool:
    static = inspect.getattr_static(plugin, attribute, None)
    return callable(static) or isinstance(static, (classmethod, property, cached_property))


def _specified() -> tuple[str, ...]:
    return tuple(name for name in dir(_hookspecs) if name.startswith(f"{GROUP}_"))


def _start(calls: Mapping[str, _Implementation]) -> dict[str, tuple[Any, ...]]:
    """What the hooks of the start return, so that a plugin that raises in one of them is set aside whole."""
    started = {}
    for hook, shape in LIST_HOOKS.items():
        if hook in calls:
            try:
                started[hook] = tuple(calls[hook].call())
                for value in started[hook]:
                    _check_object(value, shape)
            except Exception as exc:
                raise _Broken(f"{hook}: {described(exc)}") from exc
    return started


# --- what it may answer -------------------------------------------------------------------------------------


def _check_object(value: Any, shape: tuple[str, ...] | type[Any]) -> None:
    if isinstance(shape, type):
        _check_answer(value, shape)
        return
    for member in shape:
        if not hasattr(value, member):
            raise TypeError(f"returned {type(value).__name__}, which has no {member!r}")
        if member == "name" and not (isinstance(value.name, str) and value.name):
            raise TypeError(f"returned {type(value).__name__}, whose name is no text")


def _check_answer(answer: Any, expected: type[Any]) -> None:
    if not isinstance(answer, expected):
        raise TypeError(f"returned {type(answer).__name__}, expected {expected.__name__}")


def _check_price(price: Any) -> None:
    _check_answer(price, Decimal)
    if not price.is_finite() or price < 0:
        raise ValueError(f"returned {price}, which is no price")


def _refuse_two(stage: str, plugins: list[str], reason: str) -> NoReturn:
    raise PluginError(" and ".join(plugins[:2]), stage, reason)


def _suggestion(name: str, known: Iterable[str]) -> str:
    from sandstorm._converter import suggestion

    return suggestion(name, known)


def _scheme(url: str) -> str:
    """The URL without what may be a password."""
    scheme, colon, _ = url.partition(":")
    return f"{scheme}:" if colon else url[:20]
