"""The settings: `sandstorm.toml`, found and decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from sandstorm._check import one_of, table, text, texts
from sandstorm._errors import InvalidInput, SettingsError

FILE = "sandstorm.toml"
MAX_BYTES = 1024 * 1024
"""Bytes that a settings file may have; more is no settings file."""


def _plugin_table(where: str, value: Any) -> dict[str, Any]:
    return table(where)(value)


@attrs.frozen(kw_only=True)
class Settings:
    """What `sandstorm.toml` says.

    Attributes:
        strategy: The routing strategy of runs that name none.
        store: The URL of the store, or None for the SQLite file of `default_store_url`.
        providers: Accounts that take part by name, so that those that do so by invitation only do.
        keep: What is stored of code and output: `everything`; `results`: no code, input, files and environment; `nothing`: no output either.
        require: Plugins that must load, beside those that have a table.
        disable: Plugins that are not loaded.
        plugins: The table of each plugin, by its name.
        path: The file that this was read from, or None.
    """

    strategy: str = attrs.field(default="cheapest", converter=text("strategy", "the name of a strategy", filled=True))
    store: str | None = attrs.field(default=None, converter=text("store", "the URL of a store", optional=True, filled=True))
    providers: tuple[str, ...] = attrs.field(default=(), converter=texts("providers", "a list of accounts"))
    keep: str = attrs.field(default="everything", converter=one_of("keep", "everything", "results", "nothing"))
    require: tuple[str, ...] = attrs.field(default=(), converter=texts("require", "a list of plugins"))
    disable: tuple[str, ...] = attrs.field(default=(), converter=texts("disable", "a list of plugins"))
    plugins: dict[str, dict[str, Any]] = attrs.field(factory=dict, converter=table("plugins", _plugin_table))
    path: str | None = None

    def __attrs_post_init__(self) -> None:
        for name in self.disable:
            if name in self.required:
                raise InvalidInput("disable", "plugins that are not asked for elsewhere in the settings", name)

    @property
    def required(self) -> frozenset[str]:
        """The plugins that are named: each has a table or stands in `require`, and must load."""
        return frozenset((*self.require, *self.plugins))

    def error(self, problem: InvalidInput) -> SettingsError:
        """The same problem, located in the file."""
        return _located(self.path, problem)


def load_settings(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    cwd: str | os.PathLike[str] | None = None,
) -> Settings:
    """The settings of `path`, else of `$SANDSTORM_SETTINGS`, `./sandstorm.toml` or the user's file; else the defaults.

    Raises `SettingsError`: a file that was asked for must be there, and what is there must be right.
    """
    base = Path(cwd) if cwd is not None else Path()
    asked = path if path is not None else environ.get("SANDSTORM_SETTINGS") or None
    if asked is not None:
        return _read(base / asked)
    for place in (base / FILE, _home(environ, "XDG_CONFIG_HOME", ".config") / "sandstorm" / FILE):
        if _stands_at(place):
            return _read(place)
    return Settings()


def settings_of(data: Mapping[str, Any], path: str | None = None) -> Settings:
    """The settings in a table such as a TOML file gives. Raises `SettingsError`; `path` is the file that it names."""
    from sandstorm._converter import decode  # cattrs is loaded only where there is something to decode

    try:
        if "path" in data:
            raise InvalidInput("path", "a key that exists", "path")
        # A plugin's table is left as it is until the plugin says what it should hold.
        plugins = table("plugins", _plugin_table)(data.get("plugins", {}))
        settings = decode(Settings, {name: value for name, value in data.items() if name != "plugins"})
        return attrs.evolve(settings, plugins=plugins, path=path)
    except InvalidInput as exc:
        raise _located(path, exc) from exc.__cause__


def default_store_url(environ: Mapping[str, str] = os.environ) -> str:
    """The URL of the SQLite file under `$XDG_STATE_HOME`, or under `~/.local/state`."""
    return f"sqlite:///{_home(environ, 'XDG_STATE_HOME', '.local/state') / 'sandstorm' / 'sandstorm.db'}"


def _home(environ: Mapping[str, str], variable: str, below: str) -> Path:
    """The directory that a variable of the XDG base directory specification names; a relative one counts as unset."""
    named = Path(environ.get(variable) or "")
    if named.is_absolute():
        return named
    try:
        return Path(environ.get("HOME") or Path.home()) / below
    except RuntimeError as exc:
        raise SettingsError(variable, "an absolute path, since there is no home directory", environ.get(variable)) from exc


def _stands_at(place: Path) -> bool:
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # whatever else is wrong with it, reading says so
        return True
    return True


def _read(place: Path) -> Settings:
    import tomllib  # with a file only: the user namespace stays light

    try:
        with place.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        raise SettingsError(_shown(place), "a file that can be read", getattr(exc, "strerror", None) or str(exc)) from exc
    if len(content) > MAX_BYTES:
        raise SettingsError(_shown(place), f"at most {MAX_BYTES} bytes", "more")
    try:
        data = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise SettingsError(_shown(place.name), "TOML", " ".join(str(exc).split())) from exc
    return settings_of(data, str(place))


def _shown(place: Path | str) -> str:
    """A path as an error may name it, on one line."""
    shown = str(place)
    return shown if shown.isprintable() else repr(shown)


def _located(path: str | None, problem: InvalidInput) -> SettingsError:
    where = _shown(Path(path).name) if path else "settings"
    return SettingsError(f"{where}: {_shown(problem.field)}", problem.expected, problem.got)
