"""The contract for authors of provider adapters.

A pure part decides (`Provider`), a connected part acts (`Session`, `Sandbox`, `Process`). Everything an adapter
raises is one of the provider errors below, mapped in one `map_<provider>_errors()` at its boundary.
Abilities are further protocols; an offer declares each with a `Support`.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from sandstorm._errors import (
    Ambiguous,
    AuthError,
    CapacityError,
    Conflict,
    InvalidInput,
    InvalidSpec,
    NotSupported,
    OutOfCredit,
    PreparationFailed,
    ProviderDown,
    ProviderError,
    QuotaError,
    RateLimited,
    SandboxGone,
    SandboxLost,
    StreamLost,
)
from sandstorm._files import FileChange, FileInfo
from sandstorm._hookspecs import hookimpl
from sandstorm._languages import Recipe, recipe_runtimes
from sandstorm._offer import (
    ABILITIES,
    FULL,
    Declined,
    Facts,
    Figure,
    Offer,
    Rate,
    RateCard,
    Support,
    Traits,
)
from sandstorm._result import Artifact, Exit
from sandstorm._spec import ISOLATION_LEVELS, Environment, Gpu, Network, SandboxSpec, isolation_rank, refuse_escape

if TYPE_CHECKING:
    from sandstorm._launcher import BoundedExec, ExecAnswer, ImageTools, LaunchedProcess, Launcher, StartState

API_VERSION = 1
"""The version of this contract. A plugin says which one it needs as `SANDSTORM_API`; the loader refuses another, by name."""

Marker = str
"""Unique among all that was ever asked for: `[a-z0-9-]{1,40}`."""


@attrs.frozen(kw_only=True)
class Order:
    """What `create` is to make.

    Attributes:
        spec: The machine wanted; its files are in the work area before the first program starts.
        offer: The offer that was chosen; the sandbox must obey it.
        marker: Goes into the vendor's idempotency key, else its name, else its metadata.
        dispatch_by: Trio clock time after which the adapter must refuse to send, with `ProviderDown`.
        lifetime: Seconds after which the vendor is to end the sandbox, whatever happens to the router.
        secrets: Environment variables whose values never reach a log, a label or an error.
        keep: Whether it has to outlive the router. Where not, an adapter that can end it with its router does so.
    """

    spec: SandboxSpec
    offer: Offer
    marker: Marker
    dispatch_by: float
    lifetime: float
    keep: bool = False
    secrets: Mapping[str, str] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class Command:
    """What `start` is to run.

    Attributes:
        argv: Program and arguments; no shell is involved.
        env: Environment variables beside those of the sandbox.
        cwd: Working directory, relative to the work area; None for the work area.
        stdin: All that the program may read; it ends after these bytes.
        timeout: Seconds after which the whole process tree is killed.
        output_limit: Bytes of stdout and stderr together, after which the whole tree is killed.
        start_id: Names this start, so that sending it again does not start it twice.
        interactive: Whether stdin stays open for `Interactive.write` after those bytes.
        terminal: Columns and rows of a terminal of its own, or None. Its output is then all `stdout`, and it is interactive.
        detached: Whether it goes on when nobody follows it any more, up to its timeout.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = attrs.field(factory=dict)
    cwd: str | None = None
    stdin: bytes = b""
    timeout: float
    output_limit: int = 16 * 1024 * 1024
    start_id: str = ""
    interactive: bool = False
    terminal: tuple[int, int] | None = None
    detached: bool = False


@attrs.frozen
class Output:
    """Bytes that the program wrote: `stream` is `stdout` or `stderr`, `offset` counts within that stream."""

    stream: str
    data: bytes
    offset: int


@attrs.frozen(kw_only=True)
class ResourceInfo:
    """A vendor object as `find` sees it.

    Attributes:
        id: The vendor's id.
        marker: The marker that it carries, or None for a foreign object.
        kind: `sandbox`, `image`, `snapshot` or `policy`.
        state: The vendor's word for its state.
        created_at: Wall-clock seconds since 1970, or None where the vendor does not say.
        expires_at: Likewise: when the vendor ends it by itself.
        idle: Seconds without activity, or None where the vendor does not say.
    """

    id: str
    marker: Marker | None
    kind: str = "sandbox"
    state: str = "running"
    created_at: float | None = None
    expires_at: float | None = None
    idle: float | None = None


class Process(Protocol):
    """A started program."""

    @property
    def id(self) -> str:
        """Durable: means the same program to another process."""
        ...

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What the program writes, and its `Exit` last. A stream that ends without it raises `StreamLost`."""
        ...

    async def kill(self) -> None:
        """Ends the whole process tree, daemons included. Succeeds if it has ended."""
        ...


class Sandbox(Protocol):
    """A sandbox that exists."""

    @property
    def id(self) -> str:
        """The vendor's id."""
        ...

    @property
    def native(self) -> object:
        """The vendor's own handle."""
        ...

    async def start(self, command: Command) -> Process:
        """Starts a program. Raises `SandboxLost`, `SandboxGone`, `Ambiguous`."""
        ...

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file, relative to the work area, parents included; any size, exact bytes."""
        ...

    def download(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Reads a file, relative to the work area. Raises `FileNotFoundError` where there is none."""
        ...

    async def destroy(self) -> None:
        """Ends the sandbox. Idempotent; succeeds if it is already gone."""
        ...


class Session(Protocol):
    """A connected account."""

    async def refresh(self) -> Facts:
        """What offers rest on: templates, quotas, probes. Free of charge."""
        ...

    async def check(self) -> None:
        """Whether the account works. Free of charge; raises a typed error."""
        ...

    async def create(self, order: Order) -> Sandbox:
        """Makes a sandbox that obeys `order.offer` and carries `order.marker`."""
        ...

    async def attach(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox by its id. Raises `SandboxGone`."""
        ...

    def find(self, marker: Marker | None = None) -> AbstractAsyncContextManager[AsyncIterator[ResourceInfo]]:
        """Every object of ours in the account, or those with this marker, whatever their state."""
        ...


class Provider(Protocol):
    """One configured account. Pure: costs nothing to hold."""

    @property
    def name(self) -> str:
        """The account: the provider's name, or `provider:account` where there are several."""
        ...

    @property
    def traits(self) -> Traits:
        """What is true of it before anything is asked."""
        ...

    @property
    def rates(self) -> RateCard | None:
        """What it charges: None where no price is known, a card without rates where nothing is charged."""
        ...

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer | Declined]:
        """What it would give for `spec`, each offer at least as large, or why not. No I/O."""
        ...

    def connect(self) -> AbstractAsyncContextManager[Session]:
        """A session; its context owns a nursery for watches and heartbeats."""
        ...


@runtime_checkable
class OneShot(Protocol):
    """Of a session: creates with the program as the main process."""

    async def launch(self, order: Order, command: Command) -> tuple[Sandbox, Process]:
        """A sandbox whose main process is the program; `order.spec.files` are there before it starts."""
        ...


@runtime_checkable
class Interactive(Protocol):
    """Of a process: takes input while it runs."""

    async def write(self, data: bytes) -> None:
        """Sends bytes to the program's stdin."""
        ...

    async def close_stdin(self) -> None:
        """Ends the program's stdin."""
        ...

    async def signal(self, number: int) -> None:
        """Sends a signal to the program."""
        ...

    async def resize(self, columns: int, rows: int) -> None:
        """Sets the size of its terminal."""
        ...


@runtime_checkable
class Reconnect(Protocol):
    """Of a sandbox: takes up a running program's output again."""

    async def process(self, process_id: str, offsets: Mapping[str, int]) -> Process:
        """The program with this id; its events begin at the offset of each stream."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Of a sandbox: says for sure whether a program was started, and that it never will be."""

    async def burn(self, start_id: str) -> bool:
        """True where the start was not done, and from now on never will be; False where it was done.

        Raises `Ambiguous` where neither could be found out.
        """
        ...


@runtime_checkable
class Prepare(Protocol):
    """Of a session: builds an environment once, keyed by content, single-flight."""

    async def prepare(self, environment: Environment, marker: Marker) -> str:
        """The vendor's name of what was built. Raises `PreparationFailed`."""
        ...


@runtime_checkable
class Interpreter(Protocol):
    """Of a sandbox: runs code in a process that keeps its state."""

    async def run_cell(self, code: str, language: str, command: Command) -> Process:
        """Runs one cell; its events carry `Artifact`s too. Of `command` the limits and the start id count.

        A cell that is past its timeout or its output limit ends the interpreter, and its state with it; the next cell
        begins anew.
        """
        ...


@runtime_checkable
class Files(Protocol):
    """Of a sandbox: looks after its files. Paths are relative to the work area, which is `"."`."""

    def list(self, path: str, *, recursive: bool = False) -> AbstractAsyncContextManager[AsyncIterator[FileInfo]]:
        """What is in a directory, itself excluded; links are not followed. Raises `FileNotFoundError`."""
        ...

    async def stat(self, path: str) -> FileInfo:
        """One entry; a link is not followed. Raises `FileNotFoundError`."""
        ...

    async def make_directory(self, path: str) -> None:
        """Makes a directory, parents included. Succeeds if it is there."""
        ...

    async def remove(self, path: str) -> None:
        """Removes a file, a link, or a directory with all that is in it. Raises `FileNotFoundError`."""
        ...


@runtime_checkable
class Watch(Protocol):
    """Of a sandbox: says which files change."""

    def watch(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[FileChange]]:
        """The changes in a directory, without those in the directories below it, from now on."""
        ...


@runtime_checkable
class Ports(Protocol):
    """Of a sandbox: reaches what listens inside."""

    async def url(self, port: int) -> str:
        """The address at which the port can be reached, such as `http://127.0.0.1:41234`."""
        ...


@runtime_checkable
class Pause(Protocol):
    """Of a sandbox: stops and continues without losing its state."""

    async def pause(self) -> None:
        """Stops it."""
        ...

    async def resume(self) -> None:
        """Continues it."""
        ...


@runtime_checkable
class Snapshot(Protocol):
    """Of a sandbox: captures its files."""

    async def snapshot(self, marker: Marker, retention: float) -> str:
        """The vendor's id of the snapshot, verified after the capture; `retention` in seconds."""
        ...


@runtime_checkable
class Fork(Protocol):
    """Of a sandbox: makes another one in the same state."""

    async def fork(self, order: Order) -> Sandbox:
        """The copy."""
        ...


@runtime_checkable
class Extend(Protocol):
    """Of a sandbox: moves the end of its life."""

    async def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now."""
        ...


@runtime_checkable
class Metered(Protocol):
    """Of a sandbox: says what it has used."""

    async def usage(self) -> Mapping[str, float]:
        """Billed quantities by the resources of `Rate`, in its units."""
        ...


@runtime_checkable
class LiveRates(Protocol):
    """Of a session: says what the vendor charges now."""

    async def live_rates(self) -> RateCard:
        """The account's rates."""
        ...


def check_dispatch(order: Order, now: float) -> None:
    """Raises `ProviderDown` once `order.dispatch_by` has passed: adapters call it right before they send."""
    if now >= order.dispatch_by:
        raise ProviderDown(f"not sent: the time to send {order.marker} has passed")


def __getattr__(name: str) -> Any:
    # The launcher needs trio, which importing a plugin should not load.
    if name not in ("BoundedExec", "ExecAnswer", "ImageTools", "LaunchedProcess", "Launcher", "StartState"):
        raise AttributeError(f"module 'sandstorm.provider' has no attribute {name!r}")
    from sandstorm import _launcher

    return getattr(_launcher, name)


__all__ = [
    "ABILITIES",
    "API_VERSION",
    "FULL",
    "ISOLATION_LEVELS",
    "Ambiguous",
    "Artifact",
    "AuthError",
    "BoundedExec",
    "CapacityError",
    "Command",
    "Conflict",
    "Declined",
    "Environment",
    "ExecAnswer",
    "Exit",
    "Extend",
    "Facts",
    "Figure",
    "FileChange",
    "FileInfo",
    "Files",
    "Fork",
    "Gate",
    "Gpu",
    "ImageTools",
    "Interactive",
    "Interpreter",
    "InvalidInput",
    "InvalidSpec",
    "LaunchedProcess",
    "Launcher",
    "LiveRates",
    "Marker",
    "Metered",
    "Network",
    "NotSupported",
    "Offer",
    "OneShot",
    "Order",
    "OutOfCredit",
    "Output",
    "Pause",
    "Ports",
    "PreparationFailed",
    "Prepare",
    "Process",
    "Provider",
    "ProviderDown",
    "ProviderError",
    "QuotaError",
    "Rate",
    "RateCard",
    "RateLimited",
    "Recipe",
    "Reconnect",
    "ResourceInfo",
    "Sandbox",
    "SandboxGone",
    "SandboxLost",
    "SandboxSpec",
    "Session",
    "Snapshot",
    "StartState",
    "StreamLost",
    "Support",
    "Traits",
    "Watch",
    "check_dispatch",
    "hookimpl",
    "isolation_rank",
    "recipe_runtimes",
    "refuse_escape",
]
