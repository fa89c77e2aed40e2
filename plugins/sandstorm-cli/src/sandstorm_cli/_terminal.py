"""Standard error and output as people and programs see them: decorated on a terminal, plain text otherwise."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from sandstorm_cli._escape import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


_STOP = signal.SIGUSR1
"""Interrupts the run from the thread that hands out output. Unlike SIGINT, no shell starts its background jobs without it."""


class Written(Protocol):
    """Bytes that the program wrote to one of its streams."""

    @property
    def stream(self) -> str:
        """`stdout` or `stderr`."""
        ...

    @property
    def data(self) -> bytes:
        """The exact bytes."""
        ...


def decorated(*, err: bool) -> Console | None:
    """A rich console where the stream is a terminal, else None; rich loads only then. `NO_COLOR` takes the colours away."""
    stream = sys.stderr if err else sys.stdout
    if not stream.isatty():
        return None
    from rich.console import Console

    return Console(file=stream, highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)


def emit_json(data: Any) -> None:
    """Writes one JSON document to standard output, in ASCII, so that nothing in it can reach the terminal as a control."""
    click.echo(json.dumps(data, indent=2))


def emit_pairs(pairs: Sequence[tuple[str, str]], *, err: bool = False) -> None:
    """Writes one line for each label and text."""
    width = max((len(label) for label, _ in pairs), default=0)
    console = decorated(err=err)
    for label, text in pairs:
        if console is None:
            click.echo(f"{label:<{width}}  {one_line(text)}".rstrip(), err=err)
            continue
        from rich.text import Text

        console.print(Text.assemble((f"{label:<{width}}  ", "bold cyan"), one_line(text)), soft_wrap=True)


def emit_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes aligned columns to standard output; every cell stays on its line."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
    written = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *cells)
    ]
    console = decorated(err=False)
    if console is None:
        click.echo("\n".join(written))
        return
    from rich.text import Text

    console.print(Text(written[0], style="bold cyan"), soft_wrap=True)
    for line in written[1:]:
        console.print(Text(line), soft_wrap=True)


class Waiting:
    """A line on the terminal that says what is waited for; `stop` takes it away, from any thread and more than once."""

    def __init__(self, text: str, *, shown: bool) -> None:
        console = decorated(err=True) if shown else None
        self._status: Status | None = console.status(text) if console is not None else None
        self._lock = threading.Lock()
        if self._status is not None:
            self._status.start()

    @property
    def shown(self) -> bool:
        """Whether there is a line to see."""
        return self._status is not None

    def say(self, text: str) -> None:
        """Changes what is waited for; nothing once the line is gone."""
        with self._lock:
            if self._status is not None:
                from rich.text import Text

                self._status.update(Text(one_line(text)))

    def stop(self) -> None:
        """Takes the line away."""
        with self._lock:
            status, self._status = self._status, None
            if status is not None:
                status.stop()


@contextmanager
def waiting(text: str, *, shown: bool = True) -> Iterator[Waiting]:
    """Shows what is waited for while the block runs, if standard error is a terminal."""
    line = Waiting(text, shown=shown)
    try:
        yield line
    finally:
        line.stop()


class Relay:
    """Passes the program's bytes on as they come. `failed` is the error of the first write that did not succeed."""

    def __init__(self, line: Waiting) -> None:
        self._line = line
        self._streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
        self.failed: OSError | None = None
        self._caller = threading.get_ident()
        signal.signal(_STOP, signal.default_int_handler)

    def __call__(self, written: Written) -> None:
        """Writes one piece of output. Where that fails the run is interrupted, since nobody gets the rest."""
        self._line.stop()
        if self.failed is not None:
            return
        stream = self._streams[written.stream]
        try:
            stream.write(written.data)
            stream.flush()
        except OSError as exc:
            self.failed = exc
            # What is still buffered must not fail again when the interpreter flushes it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            signal.pthread_kill(self._caller, _STOP)
