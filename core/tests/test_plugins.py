"""Plugins fail closed: what loads, what is refused, and what each hook's exception means."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pluggy
import pytest
from strategies import sample_candidate, sample_request

from sandstorm._errors import InvalidInput, PluginError, SettingsError
from sandstorm._events import Event
from sandstorm._hookspecs import hookimpl
from sandstorm._languages import Recipe
from sandstorm._limits import Limit
from sandstorm._loader import described
from sandstorm._plan import Denial, Exclusion
from sandstorm._plugins import Plugins
from sandstorm._quote import Usage
from sandstorm._settings import Settings, settings_of
from sandstorm._sources import BUILTINS
from sandstorm.provider import API_VERSION

REQUEST = sample_request()
CANDIDATE = sample_candidate()
USAGE = Usage(seconds=1.0, limit=60.0)
foreign_hookimpl = pluggy.HookimplMarker("sandstorm")


def load(*plugins: tuple[str, Any], settings: Settings | None = None) -> Plugins:
    """Only these plugins, without built-in or installed ones."""
    return Plugins.load(settings or Settings(), builtins=(), extra=plugins, entry_points=())


def plugin(**hooks: Any) -> Any:
    """A plugin object whose hooks are these functions, marked."""
    marked = {f"sandstorm_{name}": staticmethod(hookimpl(function)) for name, function in hooks.items()}
    return type("Plugin", (), marked)()


def raising(*_: Any) -> Any:
    """What a broken hook does."""
    raise ValueError("first line\nsecond line")


@attrs.frozen
class Account:
    """Has what a provider has."""

    name: str
    traits: object = None
    rates: object = None

    def offers(self, spec: object, facts: object) -> list[object]:
        """None."""
        return []

    def connect(self) -> AbstractAsyncContextManager[Any]:
        """Never called here."""
        raise NotImplementedError


class Journal:
    """Has what a store has."""

    open = begin = update = finish = None

    def __init__(self, url: str) -> None:
        self.url = url


class Listener:
    """Keeps what it observes."""

    def __init__(self, seen: list[Event]) -> None:
        self.seen = seen

    @hookimpl
    def sandstorm_observe(self, event: Event) -> None:
        """Kept."""
        self.seen.append(event)


class Configured:
    """A plugin with settings."""

    SANDSTORM_API = API_VERSION

    @attrs.frozen(kw_only=True)
    class Settings:
        """Its table."""

        colour: str
        size: int = attrs.field(default=1, validator=attrs.validators.ge(1))
        tags: list[str] = attrs.field(factory=list)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @hookimpl
    def sandstorm_providers(self) -> list[Account]:
        """One account, named after the settings."""
        return [Account(self.settings.colour)]


# --- loading ------------------------------------------------------------------------------------------------


def test_the_built_in_plugins_load_and_answer() -> None:
    """The strategies and the SQLite store are plugins like any other."""
    plugins = Plugins.load(Settings(), entry_points=())
    assert [info.name for info in plugins.loaded] == [name for name, _ in BUILTINS]
    assert all(info.builtin and info.distribution == "sandstorm-core" for info in plugins.loaded)
    assert {"cheapest", "fastest", "balanced", "ordered"} <= set(plugins.strategies())
    assert plugins.store("sqlite:///:memory:").url == "sqlite:///:memory:"
    assert plugins.languages().recipe("py").language == "python"


def test_a_built_in_plugin_that_does_not_load_is_fatal() -> None:
    """The core without its own parts is broken, whatever the settings name."""
    with pytest.raises(PluginError, match=r"'gone'.*ModuleNotFoundError"):
        Plugins.load(Settings(), builtins=(("gone", "sandstorm_gone:Plugin"),), entry_points=())


def test_settings_reach_the_plugin() -> None:
    """A class with `Settings` is made from its table."""
    plugins = load(("paint", Configured), settings=settings_of({"plugins": {"paint": {"colour": "red", "tags": ["a"]}}}))
    assert [account.name for account in plugins.providers()] == ["red"]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"color": "red"}, "x.toml: plugins.paint.color: expected a key that exists (did you mean 'colour'?), got 'color'"),
        ({"colour": 3}, "x.toml: plugins.paint.colour: expected text, got 3"),
        ({"colour": "red", "tags": ["a", 1]}, "x.toml: plugins.paint.tags[1]: expected text, got 1"),
        ({}, "x.toml: plugins.paint.colour: expected a value, since there is no default, got None"),
        ({"colour": "red", "size": 0}, "x.toml: plugins.paint.size: expected values that are accepted ('size' must be >= 1: 0)"),
        ({"colour": "red", "size": True}, "x.toml: plugins.paint.size: expected a whole number, got True"),
    ],
)
def test_a_wrong_table_is_located(table: dict[str, Any], line: str) -> None:
    """The line names the file, the plugin and the key."""
    with pytest.raises(SettingsError) as caught:
        load(("paint", Configured), settings=settings_of({"plugins": {"paint": table}}, "/etc/x.toml"))
    assert str(caught.value).startswith(line)


def test_a_plugin_without_settings_takes_no_keys() -> None:
    """A key that nobody reads is refused, not ignored; an empty table only means that the plugin must load."""
    assert load(("a", plugin()), settings=settings_of({"plugins": {"a": {}}})).loaded
    with pytest.raises(SettingsError, match=r"plugins\.a\.x: expected no keys"):
        load(("a", plugin()), settings=settings_of({"plugins": {"a": {"x": 1}}}))


def test_a_table_that_no_plugin_owns_is_fatal() -> None:
    """A misspelt table does not silently do nothing."""
    with pytest.raises(SettingsError, match=r"plugins\.lokal: .* \(did you mean 'local'\?\)"):
        load(("local", plugin()), settings=settings_of({"plugins": {"lokal": {}}}))


def test_a_required_plugin_that_is_missing_is_fatal() -> None:
    """`require` is a promise."""
    with pytest.raises(PluginError, match=r"'lokal' \(load\): .* \(did you mean 'local'\?\)"):
        load(("local", plugin()), settings=Settings(require=["lokal"]))


def test_a_disabled_plugin_takes_no_part_and_must_exist() -> None:
    """Turning something off by a misspelt name would leave it on."""
    assert load(("a", plugin(admit=raising)), settings=Settings(disable=["a"])).admit(REQUEST) is None
    with pytest.raises(SettingsError, match=r"disable: .*did you mean 'quota'"):
        load(("quota", plugin()), settings=Settings(disable=["qouta"]))


def test_two_plugins_of_one_name_are_fatal() -> None:
    """Neither is guessed to be the right one."""
    with pytest.raises(PluginError, match="two plugins have this name"):
        load(("a", plugin()), ("a", plugin()))


class Unmarked:
    """A hook without the marker."""

    def sandstorm_admit(self, request: object) -> None:
        """Would never be called."""


class Misspelt:
    """No such hook."""

    def sandstorm_admitt(self, request: object) -> None:
        """Would never be called."""


class MarkedMisspelt:
    """No such hook, with the marker."""

    @hookimpl
    def sandstrom_admit(self, request: object) -> None:
        """Would never be called."""


class Wrapper:
    """A wrapper."""

    @foreign_hookimpl(wrapper=True)
    def sandstorm_admit(self, request: object) -> Iterator[None]:
        """Would see the others' answers."""
        return (yield)


class OldWrapper:
    """A wrapper of the old kind."""

    @foreign_hookimpl(hookwrapper=True)
    def sandstorm_admit(self, request: object) -> Iterator[None]:
        """Would see the others' answers."""
        yield


class First:
    """Wants to be first."""

    @foreign_hookimpl(tryfirst=True)
    def sandstorm_admit(self, request: object) -> None:
        """Would come out of turn."""


class Argument:
    """Takes what the hook does not have."""

    @hookimpl
    def sandstorm_admit(self, request: object, budget: object) -> None:
        """Could not be called."""


class Asynchronous:
    """Hooks are synchronous."""

    @hookimpl
    async def sandstorm_admit(self, request: object) -> None:
        """Would return a coroutine, which is no denial."""


class Newer:
    """Made for another contract."""

    SANDSTORM_API = 2


class Unready:
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no key")


class Unreadable:
    """Raises what cannot be shown."""

    def __init__(self) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError

        raise Mute


class NotAttrs:
    """Its settings are no attrs class."""

    Settings = dict


BROKEN = {
    "Unmarked": (Unmarked, "sandstorm_admit lacks the marker @hookimpl"),
    "Misspelt": (Misspelt, "sandstorm_admitt is no hook (did you mean 'sandstorm_admit'?)"),
    "MarkedMisspelt": (MarkedMisspelt, "sandstrom_admit is no hook (did you mean 'sandstorm_admit'?)"),
    "Wrapper": (Wrapper, "sandstorm_admit is a hook wrapper"),
    "OldWrapper": (OldWrapper, "sandstorm_admit is a hook wrapper"),
    "First": (First, "sandstorm_admit asks for tryfirst or trylast"),
    "Argument": (Argument, "budget"),
    "Asynchronous": (Asynchronous, "sandstorm_admit is async"),
    "Newer": (Newer, "needs contract version 2; this core speaks 1"),
    "Unready": (Unready, "RuntimeError: no key"),
    "Unreadable": (Unreadable, "Mute"),
    "NotAttrs": (NotAttrs, "its Settings is no attrs class"),
    "Unconfigured": (Configured, "plugins.x.colour: expected a value"),
    "RaisingProviders": (plugin(providers=raising), "sandstorm_providers: ValueError: first line second line"),
    "RaisingSinks": (plugin(sinks=raising, providers=lambda: [Account("lost")]), "sandstorm_sinks: ValueError"),
    "NoList": (plugin(strategies=lambda: None), "sandstorm_strategies: TypeError"),
    "NoRecipe": (plugin(languages=lambda: ["go"]), "sandstorm_languages: TypeError: returned str, expected Recipe"),
    "NoSink": (plugin(sinks=lambda: [object()]), "sandstorm_sinks: TypeError: returned object, which has no 'name'"),
    "NoName": (plugin(providers=lambda: [Account(3)]), "whose name is no text"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_set_aside_whole_and_reported_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The others work on, and one line says which is missing and why."""
    broken, reason = BROKEN[kind]
    plugins = load(("x", broken), ("y", plugin(providers=lambda: [Account("y")])))
    assert [info.name for info in plugins.loaded] == ["y"]
    assert [account.name for account in plugins.providers()] == ["y"]
    assert plugins.admit(REQUEST) is None
    assert [aside.name for aside in plugins.set_aside] == ["x"]
    assert reason in plugins.set_aside[0].reason
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_that_the_settings_name_is_fatal(kind: str) -> None:
    """Whoever asks for a policy by name is not run without it."""
    broken, reason = BROKEN[kind]
    with pytest.raises((PluginError, SettingsError)) as caught:
        load(("x", broken), settings=Settings(require=["x"]))
    assert reason in str(caught.value)


def test_a_plugin_may_be_a_module_and_import_others() -> None:
    """An imported module whose name begins like a hook is no misspelt hook."""
    module = types.ModuleType("sandstorm_policy_x")
    module.__dict__.update(
        sandstorm_kit_x=types.ModuleType("sandstorm_kit_x"),
        sandstorm_admit=hookimpl(lambda request: Denial("no", "never")),
    )
    plugins = load(("x", module))
    assert plugins.loaded[0].hooks == ("sandstorm_admit",)
    assert plugins.admit(REQUEST) == Denial("no", "never", "x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_never_swallowed(error: type[BaseException]) -> None:
    """Ctrl-C in a plugin is the user's, at the start as in a hook."""

    def interrupted() -> Any:
        raise error

    with pytest.raises(error):
        load(("x", plugin(admit=interrupted))).admit(REQUEST)
    with pytest.raises(error):
        load(("x", plugin(screen=interrupted))).screen(REQUEST, CANDIDATE)
    with pytest.raises(error):
        load(("x", plugin(observe=interrupted))).observe(Event(at=0.0, run="r", tenant="t"))
    with pytest.raises(error):
        load(("x", plugin(providers=interrupted)))


# --- installed plugins --------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A directory that looks like installed distributions, for as long as a test runs."""
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("sandstorm_test_")]:
        del sys.modules[name]


def install(site: Path, distribution: str, source: str, *, entry: str = "deny") -> None:
    """What an installer leaves behind for one plugin."""
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[sandstorm]\n{entry} = {module}\n")


DENY = """
from sandstorm._hookspecs import hookimpl
from sandstorm._plan import Denial

@hookimpl
def sandstorm_admit(request):
    return Denial("closed", "Not today.")
"""


def load_installed(site: Path, settings: Settings | None = None) -> Plugins:
    """The plugins that are installed there, and no others."""
    found = [entry for d in importlib.metadata.distributions(path=[str(site)]) for entry in d.entry_points]
    return Plugins.load(settings or Settings(), builtins=(), entry_points=found)


def test_an_installed_plugin_is_found_and_named(site: Path) -> None:
    """Name, distribution and version come from the metadata; the answer is attributed."""
    install(site, "sandstorm-test-deny", DENY)
    plugins = Plugins.load(Settings(disable=["sqlite"]))
    info = next(info for info in plugins.loaded if info.name == "deny")
    assert (info.distribution, info.version, info.builtin) == ("sandstorm-test-deny", "1.2", False)
    assert info.hooks == ("sandstorm_admit",)
    assert load_installed(site).admit(REQUEST) == Denial("closed", "Not today.", "deny")


def test_two_distributions_with_one_plugin_name_are_both_named(site: Path) -> None:
    """The message says what to uninstall."""
    install(site, "sandstorm-test-one", DENY)
    install(site, "sandstorm-test-two", DENY)
    with pytest.raises(PluginError, match=r"(?=.*sandstorm-test-one 1\.2)(?=.*sandstorm-test-two 1\.2)"):
        load_installed(site)


def test_an_installed_plugin_that_does_not_import_is_set_aside(site: Path) -> None:
    """A plugin whose dependency is missing does not stop the others, unless it is named."""
    install(site, "sandstorm-test-bad", "import no_such_module_at_all")
    aside = load_installed(site).set_aside[0]
    assert (aside.distribution, aside.version) == ("sandstorm-test-bad", "1.2")
    assert aside.reason == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    with pytest.raises(PluginError, match="no_such_module_at_all"):
        load_installed(site, settings_of({"plugins": {"deny": {}}}))


# --- start --------------------------------------------------------------------------------------------------


def test_order_is_by_name() -> None:
    """Not by who was installed or given first."""
    plugins = load(("b", plugin(providers=lambda: [Account("1")])), ("a", plugin(providers=lambda: [Account("2")])))
    assert [account.name for account in plugins.providers()] == ["2", "1"]


def test_two_accounts_of_one_name_are_fatal() -> None:
    """Which of them is meant could not be said."""
    plugins = load(("a", plugin(providers=lambda: [Account("e2b")])), ("b", plugin(providers=lambda: [Account("e2b")])))
    with pytest.raises(PluginError, match=r"'a and b' .providers.: both have 'e2b'"):
        plugins.providers()


def test_an_account_that_the_settings_name_must_exist() -> None:
    """`providers` takes an account or its provider; a misspelt one is a line and not an empty plan."""
    team = ("a", plugin(providers=lambda: [Account("e2b:team-b")]))
    assert load(team, settings=Settings(providers=["e2b"])).providers()
    with pytest.raises(SettingsError, match=r"providers: .*did you mean 'e2b:team-b'"):
        load(team, settings=Settings(providers=["e2b:team-a"])).providers()


def test_a_language_that_is_taken_is_fatal() -> None:
    """Also under an alias of a built-in one."""
    go = Recipe(language="zig", file="main.zig", run=["zig", "run", "main.zig"])
    assert load(("zig", plugin(languages=lambda: [go]))).languages().recipe("zig") == go
    with pytest.raises(PluginError, match="'js' is already that of sandstorm-core"):
        load(("x", plugin(languages=lambda: [attrs.evolve(go, aliases=["js"])]))).languages()


def test_exactly_one_store_serves_a_url() -> None:
    """Two are an error that names both, none is an error of the setting, and neither shows a password."""
    one = plugin(store=lambda url: Journal(url) if url.startswith("x:") else None)
    assert load(("a", one)).store("x://u:secret@h").url == "x://u:secret@h"
    with pytest.raises(PluginError, match=r"'a and b' .store.: both serve x:"):
        load(("a", one), ("b", plugin(store=Journal))).store("x://u:secret@h")
    with pytest.raises(SettingsError, match="store: expected a URL that an installed store serves, got 'y:'"):
        load(("a", one)).store("y://u:secret@h")


def test_a_store_plugin_that_raises_is_set_aside_unless_it_is_named() -> None:
    """Another one may still answer; a URL that the store itself refuses is an error of the setting."""
    broken = ("bad", plugin(store=raising, admit=raising))
    plugins = load(broken, ("good", plugin(store=Journal)))
    assert plugins.store("x:").url == "x:"
    assert [aside.name for aside in plugins.set_aside] == ["bad"]
    assert plugins.admit(REQUEST) is None
    with pytest.raises(PluginError, match=r"'bad' .store.: ValueError: first line second line"):
        load(broken, settings=Settings(require=["bad"])).store("x:")

    def refused(url: str) -> None:
        raise InvalidInput("store", "a path", url)

    with pytest.raises(SettingsError, match="settings: store: expected a path"):
        load(("x", plugin(store=refused))).store("x:")


# --- each run -----------------------------------------------------------------------------------------------


def test_the_first_denial_ends_the_run() -> None:
    """It carries the plugin's name, and None lets the next one speak."""
    plugins = load(
        ("c", plugin(admit=lambda: Denial("late", "c"))),
        ("b", plugin(admit=lambda request: Denial("rule", request.id))),
        ("a", plugin(admit=lambda request: None)),
    )
    assert plugins.admit(REQUEST) == Denial("rule", "run-1", "b")


@pytest.mark.parametrize("answer", [True, False, "no", Exclusion("a", "b")])
def test_an_answer_of_the_wrong_kind_denies_and_excludes(answer: object) -> None:
    """`True` is neither a yes nor a no."""
    denial = load(("x", plugin(admit=lambda: answer))).admit(REQUEST)
    assert denial is not None
    assert (denial.rule, denial.plugin) == ("raised", "x")
    if not isinstance(answer, Exclusion):
        (exclusion,) = load(("x", plugin(screen=lambda: answer))).screen(REQUEST, CANDIDATE)
        assert (exclusion.rule, exclusion.plugin) == ("raised", "x")
        assert exclusion.reason.startswith("TypeError: returned")


def test_an_exception_in_admit_denies_and_in_screen_excludes() -> None:
    """Each names the plugin and the exception on one line."""
    broken = load(("x", plugin(admit=raising, screen=raising)))
    assert broken.admit(REQUEST) == Denial("raised", "ValueError: first line second line", "x")
    assert broken.screen(REQUEST, CANDIDATE) == (Exclusion("raised", "ValueError: first line second line", "x"),)


def test_every_plugin_is_asked_to_screen() -> None:
    """All that rule a candidate out are named, and arguments may be left out or swapped."""
    plugins = load(
        ("a", plugin(screen=lambda candidate, request: Exclusion("a", candidate.provider + request.id))),
        ("b", plugin(screen=lambda candidate: None)),
        ("c", plugin(screen=lambda: Exclusion("c", "always"))),
    )
    assert plugins.screen(REQUEST, CANDIDATE) == (Exclusion("a", "localrun-1", "a"), Exclusion("c", "always", "c"))


@pytest.mark.parametrize("answer", [raising, lambda: None, lambda: [3], lambda: Limit(key="k")])
def test_limits_that_cannot_be_had_stop_the_run(answer: Any) -> None:
    """No limit is forgotten because its plugin failed."""
    good = plugin(limits=lambda request: [Limit(key=request.tenant)])
    assert [limit.key for limit in load(("a", good)).limits(REQUEST)] == ["default"]
    with pytest.raises(PluginError, match=r"'x' .limits."):
        load(("a", good), ("x", plugin(limits=answer))).limits(REQUEST)


@pytest.mark.parametrize("answer", ["-1", "NaN", "Infinity", "sNaN"])
def test_a_figure_that_is_no_price_stops_the_run(answer: str) -> None:
    """A negative or unbounded price would always or never win."""
    with pytest.raises(PluginError, match=r"'x' .price.: ValueError"):
        load(("x", plugin(price=lambda: Decimal(answer)))).price(REQUEST, CANDIDATE, USAGE)


def test_one_price_counts() -> None:
    """None leaves it to the rate card; two answers, an exception or a float stop the run."""
    one = plugin(price=lambda usage: Decimal(str(usage.limit)))
    assert load(("a", one), ("b", plugin(price=lambda: None))).price(REQUEST, CANDIDATE, USAGE) == Decimal("60.0")
    assert load().price(REQUEST, CANDIDATE, USAGE) is None
    with pytest.raises(PluginError, match=r"'a and b' .price.: both price local"):
        load(("a", one), ("b", one.__class__())).price(REQUEST, CANDIDATE, USAGE)
    for wrong in (raising, lambda: 0.1, lambda: 0):
        with pytest.raises(PluginError, match=r"'x' .price."):
            load(("x", plugin(price=wrong))).price(REQUEST, CANDIDATE, USAGE)


def test_what_observe_raises_is_swallowed_loudly(caplog: pytest.LogCaptureFixture) -> None:
    """The next plugin still sees the event, and a line names the one that raised."""
    seen: list[Event] = []
    event = Event(at=0.0, run="r", tenant="t")
    load(("a", plugin(observe=raising)), ("b", Listener(seen))).observe(event)
    assert seen == [event]
    assert [record.getMessage() for record in caplog.records] == ["plugin 'a' (observe): ValueError: first line second line"]


def test_a_reason_is_one_short_line() -> None:
    """What a plugin raises is shown, but it does not flood a terminal or a log."""
    line = described(ValueError("x\n" * 1000))
    assert len(line) == 200
    assert "\n" not in line
