"""Where commands come from: our own modules, and the entry point group `sandstorm.commands`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

GROUP = "sandstorm.commands"

OWN = {
    "run": "sandstorm_cli._run:run",
    "plan": "sandstorm_cli._run:plan",
    "attach": "sandstorm_cli._attach:attach",
    "sandbox": "sandstorm_cli._sandbox:sandbox",
    "prepare": "sandstorm_cli._prepare:prepare",
    "runs": "sandstorm_cli._runs:runs",
    "reap": "sandstorm_cli._reap:reap",
    "providers": "sandstorm_cli._providers:providers",
    "plugins": "sandstorm_cli._plugins:plugins",
    "doctor": "sandstorm_cli._doctor:doctor",
    "completion": "sandstorm_cli._completion:completion",
}


class CommandBroken(click.ClickException):
    """A command that another distribution adds does not load."""


class BrokenCommand(click.Command):
    """Stands in for a command that does not load: it is listed with the reason, and calling it says so."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            name,
            short_help=f"does not load: {reason}",
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
        self.reason = reason

    def invoke(self, ctx: click.Context) -> Any:
        """Raises `CommandBroken`."""
        raise CommandBroken(f"the command {self.name!r} does not load: {self.reason}")


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called or listed, and not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Our own commands in the order of the table, then those of other distributions."""
        return [*OWN, *sorted(foreign())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, or a `BrokenCommand` where it does not load."""
        if cmd_name in OWN:
            return own(cmd_name)
        found = foreign().get(cmd_name)
        return None if found is None else load(cmd_name, found)


def own(name: str) -> click.Command:
    """One of our commands; a `BrokenCommand` where the import name of the core gives something else."""
    module, _, attribute = OWN[name].partition(":")
    try:
        command: click.Command = getattr(import_module(module), attribute)
    except ImportError as exc:
        return BrokenCommand(name, f"{exc}; `sandstorm doctor` says what is wrong")
    return command


def foreign() -> dict[str, list[EntryPoint]]:
    """The commands that other distributions add, by name; a name of ours cannot be taken."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in OWN and entry not in found.setdefault(entry.name, []):
            found[entry.name].append(entry)
    return found


def load(name: str, entries: list[EntryPoint]) -> click.Command:
    """The command behind an entry point; a `BrokenCommand` where it raises, is none, or two claim the name."""
    if len(entries) > 1:
        return BrokenCommand(name, "claimed by " + " and ".join(sorted(origin(entry) for entry in entries)))
    try:
        command = entries[0].load()
    except Exception as exc:
        return BrokenCommand(name, f"{origin(entries[0])}: {type(exc).__name__}: {exc}")
    if not isinstance(command, click.Command):
        return BrokenCommand(name, f"{origin(entries[0])}: {entries[0].value} is no click command")
    return command


def origin(entry: EntryPoint) -> str:
    """The name of the distribution that an entry point belongs to."""
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def added_commands() -> list[dict[str, str]]:
    """The commands of other distributions; `reason` says why one does not load, and is empty where it does."""
    found = []
    for name, entries in sorted(foreign().items()):
        command = load(name, entries)
        reason = command.reason if isinstance(command, BrokenCommand) else ""
        found.append({"name": name, "distribution": " and ".join(sorted(map(origin, entries))), "reason": reason})
    return found
