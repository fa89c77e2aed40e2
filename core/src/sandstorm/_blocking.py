"""A sandbox and its programs, for blocking code: every call goes to the loop in the background."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sandstorm._box import SNAPSHOT_RETENTION, Box, Watching
from sandstorm._call import ExecOptions, OnOutput, TaskOptions, known, task_of
from sandstorm._files import FileChange, FileInfo
from sandstorm._loop import Held, Loop
from sandstorm._result import Exit, RunResult
from sandstorm._running import Running
from sandstorm._transfer import OnBytes

if TYPE_CHECKING:
    from sandstorm._plan import Plan
    from sandstorm.provider import Output


class BlockingBox:
    """A sandbox, for blocking code. Made by `Sandstorm.sandbox` and `Sandstorm.open_sandbox`."""

    def __init__(self, loop: Loop, box: Box) -> None:
        self._loop = loop
        self._box = box

    @property
    def id(self) -> str:
        """The vendor's id of the sandbox."""
        return self._box.id

    @property
    def provider(self) -> str:
        """The account that runs it."""
        return self._box.provider

    @property
    def isolation(self) -> str:
        """The level that was verified there."""
        return self._box.isolation

    @property
    def plan(self) -> Plan:
        """The decision that led to it."""
        return self._box.plan

    @property
    def expires_at(self) -> float:
        """Wall-clock seconds since 1970 at which it ends at the latest."""
        return self._box.expires_at

    @property
    def native(self) -> object:
        """The vendor's own handle."""
        return self._box.native

    def run(
        self,
        code: str | None = None,
        language: str | None = None,
        *,
        keep_state: bool = False,
        on_output: OnOutput | None = None,
        **options: Unpack[TaskOptions],
    ) -> RunResult:
        """What came of a program that runs to its end here.

        With `keep_state` it is a cell of an interpreter: what it defines is there for the next one, and what it shows (a
        picture, a table) comes in `RunResult.artifacts`.
        """
        task = task_of(code, language, options, TaskOptions)
        return self._loop.call(lambda: self._box.run(task, on_output, keep_state=keep_state))

    @contextmanager
    def exec(self, *argv: str, **options: Unpack[ExecOptions]) -> Iterator[BlockingRunning]:
        """A program whose output is handed out as it comes; it is killed where the context ends first."""
        known(options, ExecOptions)
        with held(Held(self._loop, lambda: self._box.exec(argv, **options))) as running:
            yield BlockingRunning(self._loop, running)

    def upload(self, path: str, source: bytes | Path, on_bytes: OnBytes | None = None) -> None:
        """Writes a file in the work area from bytes or from a local file; parents are made."""
        self._loop.call(self._box.upload, path, source, on_bytes)

    def download(self, path: str) -> bytes:
        """The contents of a file in the work area. Raises `FileNotFoundError`."""
        return self._loop.call(self._box.download, path)

    def download_to(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a file of the work area to a local file; its size in bytes."""
        return self._loop.call(self._box.download_to, path, target, on_bytes)

    def upload_directory(self, path: str, source: Path, on_bytes: OnBytes | None = None) -> int:
        """Writes a local directory into one of the work area; how many files that were."""
        return self._loop.call(self._box.upload_directory, path, source, on_bytes)

    def download_directory(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> list[FileInfo]:
        """Writes a directory of the work area to a local one; the entries that were left out: links, pipes and the like."""
        return self._loop.call(self._box.download_directory, path, target, on_bytes)

    def list(self, path: str = ".", *, recursive: bool = False) -> list[FileInfo]:
        """What is in a directory of the work area. Raises `FileNotFoundError`."""
        return self._loop.call(lambda: self._box.list(path, recursive=recursive))

    def stat(self, path: str) -> FileInfo:
        """One entry of the work area. Raises `FileNotFoundError`."""
        return self._loop.call(self._box.stat, path)

    def make_directory(self, path: str) -> None:
        """Makes a directory, parents included."""
        self._loop.call(self._box.make_directory, path)

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with all that is in it. Raises `FileNotFoundError`."""
        self._loop.call(self._box.remove, path)

    @contextmanager
    def watch(self, path: str = ".") -> Iterator[Iterator[FileChange]]:
        """The changes in a directory from now on, as they come."""
        with held(Held(self._loop, lambda: self._box.watch(path))) as watching:
            yield _changes(self._loop, watching)

    def url(self, port: int) -> str:
        """The address at which a port of the sandbox can be reached, such as `http://127.0.0.1:41234`."""
        return self._loop.call(self._box.url, port)

    def pause(self) -> None:
        """Stops everything in it; `resume` goes on from there. Its lifetime goes on."""
        self._loop.call(self._box.pause)

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._loop.call(self._box.resume)

    def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now."""
        self._loop.call(self._box.extend, lifetime)

    def snapshot(self, retention: float = SNAPSHOT_RETENTION) -> str:
        """The name of a copy of its files, for `SandboxSpec.snapshot`; it is kept for `retention` seconds."""
        return self._loop.call(self._box.snapshot, retention)

    @contextmanager
    def fork(self, *, keep: bool = False) -> Iterator[BlockingBox]:
        """Another sandbox with the same files, destroyed at the end unless it is to be kept."""
        with held(Held(self._loop, lambda: self._box.fork(keep=keep))) as box:
            yield BlockingBox(self._loop, box)

    def destroy(self) -> None:
        """Ends it now, whether it was to be kept or not. Succeeds if it has ended."""
        self._loop.call(self._box.destroy)


class BlockingRunning:
    """A program under way: iterate for its output; `exit` is set once that has ended."""

    def __init__(self, loop: Loop, running: Running) -> None:
        self._loop = loop
        self._running = running

    @property
    def exit(self) -> Exit | None:
        """How the program ended, or None while it runs."""
        return self._running.exit

    def __iter__(self) -> BlockingRunning:
        return self

    def __next__(self) -> Output:
        output = self._loop.call(self._running.next)
        if output is None:
            raise StopIteration
        return output

    def write(self, data: bytes) -> None:
        """Sends bytes to its stdin. Raises `NotSupported` where it was not started as interactive."""
        self._loop.call(self._running.write, data)

    def close_stdin(self) -> None:
        """Ends its stdin."""
        self._loop.call(self._running.close_stdin)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self._loop.call(self._running.signal, number)

    def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal."""
        self._loop.call(self._running.resize, columns, rows)

    def kill(self) -> None:
        """Ends the program and everything that it started."""
        self._loop.call(self._running.kill)


def _changes(loop: Loop, watching: Watching) -> Iterator[FileChange]:
    while (change := loop.call(watching.next)) is not None:
        yield change


@contextmanager
def held(context: Held[Any]) -> Iterator[Any]:
    """The value of a context that is held in the loop; it ends with the block, also after Ctrl-C."""
    try:
        value = context.entered.result()
        yield value
    except BaseException:
        context.job.cancel() if not context.entered.done() else context.leave()
        context.job.future.exception()
        raise
    context.leave()
    context.job.future.result()
