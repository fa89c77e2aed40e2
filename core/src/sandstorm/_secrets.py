"""Secrets by name: from the environment, from a file, and from the sources of plugins."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from sandstorm._errors import InvalidInput, PluginError, SandstormError, SettingsError
from sandstorm._hookspecs import hookimpl
from sandstorm._limits import SecretSource
from sandstorm._masker import SHORTEST

PREFIX = "SANDSTORM_SECRET_"
"""Environment variables of this prefix are secrets by their names; others are read only where the settings list them."""

MAX_BYTES = 1024 * 1024
"""Bytes that a file of secrets may have; more is no such file."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PLACE = re.compile(r"\(at (line \d+, column \d+|end of document)\)")

_log = logging.getLogger("sandstorm")


async def resolve(names: Sequence[str], sources: Sequence[SecretSource]) -> dict[str, str]:
    """The values of secrets, each from the first source that has it.

    Raises `InvalidInput` for a name or value that cannot be an environment variable or that no source has, and
    `PluginError` where a source fails. None of them shows a value.
    """
    return {name: await _looked_up(name, sources) for name in names}


async def _looked_up(name: str, sources: Sequence[SecretSource]) -> str:
    if not name or "=" in name:
        raise InvalidInput("spec.secrets", "names of environment variables, without '='", name)
    for source in sources:
        try:
            value: Any = await source.lookup(name)
        except SandstormError:
            raise
        except Exception as exc:
            from sandstorm._loader import described  # it imports pluggy, which only an engine needs

            raise PluginError(source.name, "secrets", described(exc)) from exc
        if value is not None:
            return _checked(name, value, source)
    raise InvalidInput("spec.secrets", _missing(name, sources), name)


def _checked(name: str, value: Any, source: SecretSource) -> str:
    if not isinstance(value, str):
        raise PluginError(source.name, "secrets", f"its value of {name} is {type(value).__name__}, not text")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidInput("spec.secrets", f"secrets of valid Unicode without NUL, unlike the one in {source.name}", name)
    if len(value.encode()) < SHORTEST:
        _log.warning("the secret %s has fewer than %d bytes: it is not masked in what is recorded", name, SHORTEST)
    return value


def _missing(name: str, sources: Iterable[SecretSource]) -> str:
    places = [f"{source.name} ({source.advice(name)})" if isinstance(source, _BUILTIN) else source.name for source in sources]
    return f"the name of a secret that a source has: looked in {', '.join(places)}" if places else "no secrets without a source"


@attrs.frozen
class EnvironmentSource:
    """Secrets from environment variables of this process.

    Attributes:
        variables: The variable of each secret that has one by the settings; for others it is `PREFIX` and the name.
        environ: The variables and their values, as they are when a secret is looked up.
    """

    variables: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    environ: Mapping[str, str] = attrs.field(factory=lambda: os.environ, repr=False)
    name: str = "the environment"

    async def lookup(self, secret: str) -> str | None:
        """The value of its variable, or None where that is not set or empty."""
        return self.environ.get(self.variables.get(secret, PREFIX + secret)) or None

    def advice(self, secret: str) -> str:
        """What to do so that the secret is found here. The settings' own variable is not shown: it may be a value by mistake."""
        if secret in self.variables:
            return f"set the variable that plugins.secrets.environment gives for {secret}"
        return f"set {PREFIX}{secret}, or list {secret} in plugins.secrets.environment"


@attrs.frozen
class FileSource:
    """Secrets from a TOML file of `NAME = "value"`, read anew for every lookup."""

    path: Path

    @property
    def name(self) -> str:
        """Which file it is."""
        return f"the file {str(self.path)!r}"

    async def lookup(self, secret: str) -> str | None:
        """The value, or None where the file does not have it or has it empty.

        Raises `SettingsError` for a file that cannot be used or that others can read.
        """
        return (await trio.to_thread.run_sync(_values, self.path)).get(secret) or None

    def advice(self, secret: str) -> str:
        """What to do so that the secret is found here."""
        return f'add {secret} = "..."'


_BUILTIN = (EnvironmentSource, FileSource)


def _values(path: Path) -> dict[str, str]:
    """The names and values in a file. No error shows a value, or keeps what was read as its cause."""
    import tomllib  # with a file only

    content = _content(path)
    problem = ""
    try:
        values = tomllib.loads(content.decode())
    except UnicodeDecodeError as exc:
        problem = f"another encoding at byte {exc.start}"
    except (ValueError, RecursionError) as exc:
        place = _PLACE.search(str(exc))
        problem = f"an error at {place[1]}" if place else "an error"
    if problem:
        raise SettingsError(str(path), 'TOML in UTF-8, with lines such as NAME = "value"', problem)
    for name, value in values.items():
        if not isinstance(value, str):
            raise SettingsError(f"{path}: {name}", "text in quotes", type(value).__name__)
    return values


def _content(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK, a pipe in the place of the file would be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            _refuse_open_to_others(path, status)
            content = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise SettingsError(str(path), "a file of secrets that can be read", exc.strerror or type(exc).__name__) from None
    if len(content) > MAX_BYTES:
        raise SettingsError(str(path), f"at most {MAX_BYTES} bytes of secrets", "more")
    return content


def _refuse_open_to_others(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SettingsError(str(path), "a regular file of secrets", "something else")
    if os.name == "posix" and status.st_mode & 0o077:
        mode = f"mode {stat.S_IMODE(status.st_mode):o}"
        raise SettingsError(str(path), f"a file that nobody else may use: run chmod 600 {path}", mode)


def _variables(value: Any) -> dict[str, str]:
    """The variable of each secret, from a list of names or a table. What is refused is not shown: it may be a value."""
    if isinstance(value, (list, tuple)):
        if not all(isinstance(name, str) and _VARIABLE.match(name) for name in value):
            raise InvalidInput("environment", "a list of names of environment variables", "something else")
        return {name: name for name in value}
    if not isinstance(value, Mapping):
        raise InvalidInput("environment", 'a list of names, or a table such as { NAME = "VARIABLE" }', type(value).__name__)
    for name, variable in value.items():
        if not isinstance(variable, str) or not _VARIABLE.match(variable):
            raise InvalidInput(f"environment.{name}", "the name of an environment variable, not a value", type(variable).__name__)
    return dict(value)


def _file(value: Any) -> Path | None:
    if value is None:
        return None
    if isinstance(value, str) and "\0" not in value:
        path = Path(value)
        with contextlib.suppress(RuntimeError):  # there is no home directory: the path stays relative
            path = path.expanduser()
        if path.is_absolute():
            return path
    raise InvalidInput("file", "an absolute path, or one that begins with ~/", value)


@attrs.frozen(kw_only=True)
class SecretsSettings:
    """Where secrets are looked up, beside variables that begin with `SANDSTORM_SECRET_`.

    Attributes:
        environment: Names of variables that are secrets, or a table of secrets and the variables that hold them.
        file: The path of a TOML file of `NAME = "value"` that nobody else may read, or None.
    """

    environment: Any = attrs.field(factory=dict, converter=_variables, repr=False)
    file: Any = attrs.field(default=None, converter=_file)


class SecretsPlugin:
    """The built-in sources of secrets as a plugin."""

    SANDSTORM_API = 1
    Settings = SecretsSettings

    def __init__(self, settings: SecretsSettings) -> None:
        self._settings = settings

    @hookimpl
    def sandstorm_secrets(self) -> list[SecretSource]:
        """The environment, then the file."""
        sources: list[SecretSource] = [EnvironmentSource(self._settings.environment)]
        if self._settings.file is not None:
            sources.append(FileSource(self._settings.file))
        return sources
