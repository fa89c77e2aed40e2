"""Sandboxes and runs by their ids, or the beginnings of them; and how a shell completes those."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from sandstorm import InvalidInput, Sandstorm

_RUNS_COMPLETED = 50
"""How many of the newest runs a shell is offered."""

if TYPE_CHECKING:
    from sandstorm import BlockingBox, KeptSandbox


class SandboxId(click.ParamType[str]):
    """The id of a kept sandbox, or the beginning of one."""

    name = "sandbox"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The sandboxes that are there now."""
        found = _asked(ctx, lambda client: [(kept.id, f"{kept.title} on {kept.provider}") for kept in client.sandboxes()])
        return [CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete)]


class RunId(click.ParamType[str]):
    """The id of a run, or the beginning of one."""

    name = "run"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The newest runs of the journal."""
        found = _asked(ctx, lambda client: [(row.id, row.title) for row in client.runs(limit=_RUNS_COMPLETED)])
        return [CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete)]


def _asked(ctx: click.Context, question: Callable[[Sandstorm], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The answer of a client. None where that fails: a shell that completes a word has no place for an error."""
    logging.disable()
    try:
        with Sandstorm(settings=ctx.params.get("settings")) as client:
            return question(client)
    except Exception:
        return []


def beginning(name: str, kept: Iterable[KeptSandbox]) -> str:
    """The id of the one sandbox whose id, or the id of whose run, begins so. Raises `InvalidInput`."""
    found = [each.id for each in kept if name and (each.id.startswith(name) or each.run.startswith(name))]
    if not found:
        raise InvalidInput("sandbox", "the id of a sandbox that is kept, or the beginning of one", name)
    if len(found) > 1:
        raise InvalidInput("sandbox", "an unambiguous beginning, of one of " + ", ".join(sorted(found)), name)
    return found[0]


@contextmanager
def opened(client: Sandstorm, name: str) -> Iterator[BlockingBox]:
    """A kept sandbox, by its id, that of its run or the beginning of either. Raises `InvalidInput`, `SandboxGone`."""
    with ExitStack() as stack:
        try:
            box = stack.enter_context(client.open_sandbox(name))
        except InvalidInput as exc:
            if exc.field != "sandbox" or (full := beginning(name, client.sandboxes())) == name:
                raise
            box = stack.enter_context(client.open_sandbox(full))
        yield box
