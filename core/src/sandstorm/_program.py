"""From a task to commands: the recipe's file, its compile step, and the program itself."""

from __future__ import annotations

import attrs

from sandstorm._errors import InvalidInput
from sandstorm._languages import Languages
from sandstorm._result import Exit
from sandstorm._spec import SandboxSpec
from sandstorm._task import Task
from sandstorm.provider import Command


@attrs.frozen(kw_only=True)
class Program:
    """A task as a provider sees it.

    Attributes:
        files: What has to be in the work area first.
        commands: To be run in order, each only if the one before succeeded; the last is the program.
    """

    files: dict[str, bytes]
    commands: tuple[Command, ...]


def program(task: Task, languages: Languages, start_id: str) -> Program:
    """The files and commands of a task. Raises `InvalidInput` for an unknown language."""
    if task.code is None or task.language is None:
        return Program(files={}, commands=(_command(task, (*task.argv, *task.args), start_id),))
    recipe = languages.recipe(task.language)
    compiling = (_command(task, recipe.compile, f"{start_id}-c", stdin=b""),) if recipe.compile else ()
    running = _command(task, (*recipe.run, *task.args), start_id)
    return Program(files={recipe.file: task.code.encode()}, commands=(*compiling, running))


def fitted(spec: SandboxSpec, task: Task, languages: Languages) -> SandboxSpec:
    """The spec with the environment that the task's language needs. Raises `InvalidInput`."""
    if task.language is None or spec.environment.language is not None:
        return spec
    recipe = languages.recipe(task.language)
    return attrs.evolve(spec, environment=attrs.evolve(spec.environment, language=recipe.language))


def with_files(spec: SandboxSpec, files: dict[str, bytes]) -> SandboxSpec:
    """The spec with further files; a file of the caller's must not be in the way of one of ours."""
    taken = sorted(spec.files.keys() & files.keys())
    if taken:
        raise InvalidInput(f"spec.files.{taken[0]}", "another name, since the program itself is stored under it", taken[0])
    return attrs.evolve(spec, files={**spec.files, **files}) if files else spec


def not_compiled(exit: Exit) -> Exit:
    """How a program ended whose compile step did not succeed: the limit that the compiler ran into, else a compile error."""
    return Exit(kind="compile-error", code=exit.status) if exit.kind in ("exited", "signal") else exit


def _command(task: Task, argv: tuple[str, ...], start_id: str, stdin: bytes | None = None) -> Command:
    return Command(
        argv=argv,
        stdin=task.stdin if stdin is None else stdin,
        timeout=task.timeout,
        output_limit=task.output_limit,
        start_id=start_id,
    )
