"""What the clients share: the keyword arguments of a call, and how the engine is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from sandstorm._check import number, text
from sandstorm._constraints import Constraints
from sandstorm._errors import InvalidInput
from sandstorm._spec import SandboxSpec
from sandstorm._task import Task

if TYPE_CHECKING:
    from sandstorm._engine import Engine
    from sandstorm._plan import Request
    from sandstorm._plugins import Plugins
    from sandstorm._settings import Settings
    from sandstorm.provider import Output

SettingsSource = str | os.PathLike[str] | Mapping[str, Any] | None
OnOutput = Callable[["Output"], None]


class TaskOptions(TypedDict, total=False):
    """What to run, beside code and language.

    Attributes:
        task: The whole task as a value, instead of code, language and the others.
        argv: A command instead of code.
        args: Arguments for the program.
        stdin: What it reads.
        timeout: Seconds after which it is killed.
        outputs: Files to bring back.
        effects: `unknown`, `idempotent` or `none`.
        output_limit: Bytes of output after which it is killed.
    """

    task: Task | None
    argv: Sequence[str] | None
    args: Sequence[str] | None
    stdin: bytes | str | None
    timeout: float | None
    outputs: Sequence[str] | None
    effects: str | None
    output_limit: int | None


class RouteOptions(TypedDict, total=False):
    """Where a run may go.

    Attributes:
        spec: The machine wanted.
        constraints: What it may cost, how long it may wait, where it may go.
        strategy: The routing strategy; that of the settings by default.
        tenant: A trusted label.
    """

    spec: SandboxSpec | None
    constraints: Constraints | None
    strategy: str | None
    tenant: str


class RunOptions(TaskOptions, RouteOptions, total=False):
    """The keyword arguments of `run`, `detach` and `plan`: those of `TaskOptions` and of `RouteOptions`, and one more.

    Attributes:
        key: An idempotency key: of the tenant's runs with one key one is started, and the others give its result, as far as
            the journal keeps it.
    """

    key: str | None


@attrs.frozen(kw_only=True)
class Setup:
    """What a client will use.

    Attributes:
        settings: The path of the settings file, or None where the defaults apply.
        store: The URL of the store.
    """

    settings: str | None
    store: str


class Opener:
    """Opens an engine from settings, further plugins and a store."""

    def __init__(self, *, settings: SettingsSource = None, plugins: Iterable[tuple[str, object]] = (), store: Any = None) -> None:
        self._settings = settings
        self._plugins = tuple(plugins)
        self._store = store

    def setup(self) -> Setup:
        """Which settings file and store apply; opens neither the store nor a plugin. Raises `SettingsError`."""
        from sandstorm._settings import default_store_url

        settings = self._read_settings()
        return Setup(settings=settings.path, store=settings.store or default_store_url())

    def check(self, task: Task, strategy: str | None = None) -> None:
        """Raises `InvalidInput` for a language or strategy that no plugin has; opens neither the store nor an account."""
        plugins, settings = self._installed
        if task.language is not None:
            plugins.languages().recipe(task.language)
        known = plugins.strategies()
        wanted = strategy or settings.strategy
        if wanted not in known:
            raise InvalidInput("strategy", "one of " + ", ".join(sorted(known)), wanted)

    def language_of(self, path: str) -> str | None:
        """The language that a file's name tells, or None."""
        recipe = self._installed[0].languages().of_file(path)
        return None if recipe is None else recipe.language

    @cached_property
    def _installed(self) -> tuple[Plugins, Settings]:
        """The plugins and settings: loaded once, for the engine and for questions that need none."""
        from sandstorm._plugins import Plugins

        settings = self._read_settings()
        return Plugins.load(settings, extra=self._plugins), settings

    def _read_settings(self) -> Settings:
        from sandstorm._settings import load_settings, settings_of

        given = self._settings
        return settings_of(given) if isinstance(given, Mapping) else load_settings(given)

    def _open_engine(self) -> Any:
        from sandstorm._engine import open_engine

        plugins, settings = self._installed
        return open_engine(settings, plugins, store=self._store)


class ExecOptions(TypedDict, total=False):
    """How a program is started in a sandbox.

    Attributes:
        stdin: What it reads; with `interactive`, what it reads first.
        env: Environment variables beside those of the sandbox.
        cwd: Its working directory, relative to the work area.
        timeout: Seconds after which it is killed.
        output_limit: Bytes of output after which it is killed.
        interactive: Whether its stdin stays open for `write`.
        terminal: Columns and rows of a terminal for it, which makes it interactive.
    """

    stdin: bytes
    env: Mapping[str, str] | None
    cwd: str | None
    timeout: float
    output_limit: int
    interactive: bool
    terminal: tuple[int, int] | None


def known(options: Mapping[str, Any], shape: type) -> None:
    """Raises `InvalidInput` for a keyword argument that `shape` does not have."""
    for name in options:
        if name not in shape.__annotations__:
            raise InvalidInput(name, "one of the arguments " + ", ".join(sorted(shape.__annotations__)), name)


def task_of(code: str | None, language: str | None, options: Mapping[str, Any], shape: type = RunOptions) -> Task:
    """The task that the arguments of a call describe. Raises `InvalidInput`."""
    known(options, shape)
    given = {name: value for name, value in options.items() if value is not None and name in TaskOptions.__annotations__}
    task: Task | None = given.pop("task", None)
    if task is None:
        return Task(code=code, language=language, **given)
    if code is not None or language is not None or given:
        raise InvalidInput("task", "either a task or its fields, and not both", given or code or language)
    return task


def request_of(
    engine: Engine, task: Task | None, options: Mapping[str, Any], lifetime: float | None = None, *, keep: bool = False
) -> Request:
    """The request that the arguments of a call describe. Raises `InvalidInput`."""
    if lifetime is not None:
        lifetime = number("lifetime", "a number of seconds above 0", above=True)(lifetime)
    return engine.request(
        task,
        options.get("spec") or SandboxSpec(),
        options.get("constraints") or Constraints(),
        options.get("strategy"),
        options.get("tenant", "default"),
        lifetime,
        keep=keep,
        key=text("key", "a text", optional=True, filled=True)(options.get("key")),
    )
