"""The plugins as the engine sees them: one typed method for each hook, guarded and attributed."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from sandstorm._constraints import matches
from sandstorm._converter import suggestion
from sandstorm._errors import InvalidInput, PluginError
from sandstorm._hookspecs import GROUP
from sandstorm._languages import RECIPES, Languages, Recipe
from sandstorm._limits import Limit
from sandstorm._loader import Implementation, Loaded, Loader, SetAside, aside_or_fatal, check_answer, check_object, described
from sandstorm._plan import Denial, Exclusion
from sandstorm._sources import BUILTINS, builtin, check_names, given, installed, unique

if TYPE_CHECKING:
    from sandstorm._events import Event, Sink
    from sandstorm._knowledge import Strategy
    from sandstorm._limits import SecretSource
    from sandstorm._plan import Candidate, Request
    from sandstorm._quote import Usage
    from sandstorm._settings import Settings
    from sandstorm._store import Store
    from sandstorm.provider import Provider

_logger = logging.getLogger("sandstorm.plugins")


@attrs.frozen(kw_only=True)
class PluginInfo:
    """A plugin that is loaded: where it comes from, and the hooks that it implements."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    builtin: bool


class Plugins:
    """The loaded plugins of one engine. `loaded` and `set_aside` say which they are."""

    def __init__(self, settings: Settings, loaded: Sequence[Loaded], set_aside: Sequence[SetAside]) -> None:
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
        sources = unique((*map(builtin, builtins), *map(installed, found), *map(given, extra)))
        check_names(settings, sources)
        loader = Loader(settings)
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
                expected = "accounts that are configured" + suggestion(wanted, accounts)
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
                    check_object(store, ("url", "open", "begin", "update", "finish"))
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
                check_answer(denial, Denial)
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
                    check_answer(limit, Limit)
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
                check_answer(answer, Exclusion)
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

    def _implementations(self, hook: str) -> tuple[Implementation, ...]:
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

    def _drop(self, plugin: Loaded, exc: Exception) -> None:
        """A store's plugin raised: fatal where it is named or built in, else it takes no further part."""
        self._set_aside.append(aside_or_fatal(self._settings, plugin.source, "store", exc))
        self._loaded.remove(plugin)
        self._index()


def _check_price(price: Any) -> None:
    check_answer(price, Decimal)
    if not price.is_finite() or price < 0:
        raise ValueError(f"returned {price}, which is no price")


def _refuse_two(stage: str, plugins: list[str], reason: str) -> NoReturn:
    raise PluginError(" and ".join(plugins[:2]), stage, reason)


def _scheme(url: str) -> str:
    """The URL without what may be a password."""
    scheme, colon, _ = url.partition(":")
    return f"{scheme}:" if colon else url[:20]
