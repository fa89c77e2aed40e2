"""A provider in memory that obeys the whole contract on trio's clock."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import date
from decimal import Decimal
from types import TracebackType
from typing import TypeVar

import trio

from sandstorm._result import Artifact, Exit
from sandstorm._spec import isolation_rank, refuse_escape
from sandstorm._testing._program import CHUNK, Program, file_path
from sandstorm._testing._vendor import Box, Vendor
from sandstorm.provider import (
    FULL,
    Command,
    Declined,
    Environment,
    Facts,
    Figure,
    FileInfo,
    Offer,
    Order,
    Output,
    Rate,
    RateCard,
    ResourceInfo,
    Sandbox,
    SandboxLost,
    SandboxSpec,
    Session,
    Support,
    Traits,
    check_dispatch,
)

T = TypeVar("T")

REFERENCE_RATES = RateCard(
    rates=(Rate(resource="cpu", usd=Decimal("0.00001")), Rate(resource="memory", usd=Decimal("0.000002"))),
    source="made up for tests",
    checked_at=date(2026, 1, 1),
    confidence="own",
)
"""Rates in the order of magnitude of the vendors': 0.00001 USD per vCPU-second, 0.000002 USD per GiB-second."""


_ABILITIES = ("Reconnect", "Gate", "Prepare", "Files", "Ports", "Snapshot", "Fork", "Extend", "Detach")


def reference_traits(
    *, marker: str = "idempotency-key", find_lag: float = 0.0, start_seconds: float = 0.0, max_concurrent: int | None = None
) -> Traits:
    """The traits of a vendor in memory: creates take effect at once, and are listed `find_lag` seconds later."""
    return Traits(
        marker=marker,
        commit_lag=Figure(0.0, "in memory"),
        find_lag=Figure(find_lag, "in memory"),
        start_p50=start_seconds,
        start_p95=start_seconds,
        start_source="in memory",
        max_concurrent=max_concurrent,
    )


class ReferenceProvider:
    """A provider in memory. Runs the toy language of `sandstorm.testing`; everything else is as the contract says.

    May be connected any number of times, in one event loop after another: all sessions share `vendor`. The vendor
    enforces `traits.max_concurrent`, and shows a sandbox in `find` only after `traits.find_lag`.

    Attributes:
        name: The account.
        traits: How creates carry their marker, the lags and the cap.
        rates: What the vendor charges; None where that is unknown.
        vendor: The other side, for tests to look at and to evict from.
    """

    def __init__(
        self,
        name: str = "reference",
        *,
        traits: Traits | None = None,
        rates: RateCard | None = REFERENCE_RATES,
        isolation: str = "microvm",
        network: Sequence[str] = ("none", "open", "allow"),
        region: str | None = None,
        one_shot: bool = False,
        start_seconds: float = 0.0,
        lifetime: float = 3600.0,
        spot: bool = False,
        declines: tuple[str, str] | None = None,
    ) -> None:
        """`declines` is the rule and the reason for which it makes no offer at all; `lifetime` is the longest, in seconds."""
        self.name = name
        self.traits = traits or reference_traits(start_seconds=start_seconds)
        self.rates = rates
        self.vendor = Vendor(name=name, traits=self.traits, rates=rates, start_seconds=start_seconds)
        self._isolation = isolation
        self._network = tuple(network)
        self._region = region
        self._one_shot = one_shot
        self._lifetime = lifetime
        self._spot = spot
        self._declines = declines

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer | Declined]:
        """One offer of exactly the size asked for, or why there is none."""
        refusal = self._refusal(spec)
        if refusal is not None:
            rule, reason = refusal
            return (Declined(provider=self.name, rule=rule, reason=reason),)
        return (self._offer(spec),)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Session]:
        """A session. What it made lives on after it."""
        session = (OneShotSession if self._one_shot else ReferenceSession)(self.vendor)
        self.vendor.note("connect")
        await trio.lowlevel.checkpoint()
        try:
            yield session
        finally:
            session.close()

    def _refusal(self, spec: SandboxSpec) -> tuple[str, str] | None:
        if self._declines is not None:
            return self._declines
        if isolation_rank(spec.isolation) > isolation_rank(self._isolation):
            return "isolation", f"isolates by {self._isolation}, and {spec.isolation} is wanted"
        if spec.network.mode not in self._network:
            return "network", f'cannot enforce the network mode "{spec.network.mode}"'
        if spec.region is not None and spec.region != self._region:
            return "region", f"is not in the region {spec.region}"
        if spec.gpu is not None:
            return "gpu", "has no accelerators"
        if spec.environment.image is not None:
            return "environment", "cannot give an image"
        return None

    def _offer(self, spec: SandboxSpec) -> Offer:
        one_shot = FULL if self._one_shot else Support("not-implemented", "this reference provider was made without it")
        return Offer(
            provider=self.name,
            cpu=spec.cpu,
            memory=spec.memory,
            disk=spec.disk,
            region=self._region,
            isolation=self._isolation,
            isolation_detail="Nothing runs: a toy language is interpreted in memory.",
            network=self._network,
            abilities={"OneShot": one_shot, **dict.fromkeys(_ABILITIES, FULL)},
            lifetime=self._lifetime,
            extendable=False,
            spot=self._spot,
        )


class ReferenceSession:
    """A connected account."""

    def __init__(self, vendor: Vendor) -> None:
        self._vendor = vendor
        self._open = True

    def close(self) -> None:
        """Ends the session; whatever is called on it or its sandboxes afterwards raises `RuntimeError`."""
        self._vendor.now()
        self._open = False

    async def refresh(self) -> Facts:
        """No facts are needed; they are dated all the same."""
        await self.send("refresh")
        return Facts(at=time.time(), ttl=300.0)

    async def check(self) -> None:
        """Always works."""
        await self.send("check")

    async def create(self, order: Order) -> Sandbox:
        """A sandbox, after `start_seconds`. It exists from the moment of the call, also where that is cancelled."""
        await self._before(order)
        box = self._vendor.create(order)
        await self._ready(box)
        return ReferenceSandbox(self, self._vendor, box)

    async def prepare(self, environment: Environment, marker: str) -> str:
        """The name of an environment, built once."""
        await self.send("prepare")
        return self._vendor.prepare(environment)

    async def attach(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox by its id. Raises `SandboxGone`."""
        await self.send("attach")
        return ReferenceSandbox(self, self._vendor, self._vendor.attach(sandbox_id))

    @asynccontextmanager
    async def find(self, marker: str | None = None) -> AsyncIterator[AsyncIterator[ResourceInfo]]:
        """The sandboxes that exist as the look-up begins, or those with this marker."""
        await self.send("find")
        async with aclosing(_each(self._vendor.listed(marker))) as infos:
            yield infos

    async def send(self, step: str, box: Box | None = None) -> None:
        """A request on its way: may be cancelled before it is sent, and is in the vendor's log from then on."""
        await trio.lowlevel.checkpoint()
        self._require_open()
        self._vendor.note(step, box=box)

    async def _before(self, order: Order) -> None:
        await trio.lowlevel.checkpoint()
        self._require_open()
        check_dispatch(order, trio.current_time())

    async def _ready(self, box: Box) -> None:
        at = min(box.ready_at, box.ends_at)
        if at > self._vendor.now():
            await trio.sleep_until(self._vendor.deadline(at))
            self._vendor.reached(at)
        self._vendor.advance(box)
        box.require_alive()

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError("the session is closed")


class OneShotSession(ReferenceSession):
    """A connected account that also makes sandboxes with the program as their main process."""

    async def launch(self, order: Order, command: Command) -> tuple[Sandbox, ReferenceProcess]:
        """A sandbox and its program, which starts by itself once the sandbox is ready."""
        await self._before(order)
        box = self._vendor.create(order, "launch")
        box.require_alive()
        program = self._vendor.start(box, command)
        await self._ready(box)
        return ReferenceSandbox(self, self._vendor, box), ReferenceProcess(self, self._vendor, box, program)


class ReferenceSandbox:
    """A sandbox that exists. Its `native` handle is what the vendor keeps of it."""

    __slots__ = ("_box", "_session", "_vendor", "id", "native")

    def __init__(self, session: ReferenceSession, vendor: Vendor, box: Box) -> None:
        self.id = box.id
        self.native: object = box
        self._session = session
        self._vendor = vendor
        self._box = box

    async def start(self, command: Command) -> ReferenceProcess:
        """Starts a program, once for each start id. Raises `SandboxLost`, `SandboxGone`, `Conflict`."""
        await self._send("start")
        program = self._vendor.start(self._box, command)
        return ReferenceProcess(self._session, self._vendor, self._box, program)

    async def process(self, process_id: str, offsets: Mapping[str, int]) -> ReferenceProcess:
        """The program with this id; its events begin at the offset of each stream. Raises `LookupError`."""
        await self._send("process")
        program = self._box.programs.get(process_id.removeprefix(f"{self.id}/"))
        if program is None or program.id != process_id:
            raise LookupError(f"no program {process_id} was started in {self.id}")
        return ReferenceProcess(self._session, self._vendor, self._box, program, offsets)

    async def burn(self, start_id: str) -> bool:
        """Whether a start was not done, and from now on never will be. Raises `SandboxLost`, `SandboxGone`."""
        await self._send("burn")
        return self._vendor.burn(self._box, start_id)

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file in one step, once all of it is there. Raises `InvalidInput`, `SandboxLost`, `SandboxGone`."""
        refuse_escape("path", path)
        data = b"".join([chunk async for chunk in chunks])
        await self._send("upload")
        self._box.files[file_path(None, path)] = data

    @asynccontextmanager
    async def download(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Reads a file as it is now. Raises `FileNotFoundError`, `InvalidInput`, `SandboxLost`, `SandboxGone`."""
        refuse_escape("path", path)
        await self._send("download")
        data = self._box.files.get(file_path(None, path))
        if data is None:
            raise FileNotFoundError(path)
        async with aclosing(_each(data[at : at + CHUNK] for at in range(0, len(data), CHUNK))) as chunks:
            yield chunks

    @asynccontextmanager
    async def list(self, path: str, *, recursive: bool = False) -> AsyncIterator[AsyncIterator[FileInfo]]:
        """What is in a directory; a directory is there as long as there is a file below it. Raises `FileNotFoundError`."""
        await self._send("list")
        top = _place(path)
        below = {name: data for name, data in self._box.files.items() if name.startswith(top)}
        if top and not below:
            raise FileNotFoundError(path)
        found: dict[str, FileInfo] = {}
        for name, data in below.items():
            parts = name[len(top) :].split("/")
            for depth in range(1, len(parts) if recursive else 2):
                if depth < len(parts):
                    directory = top + "/".join(parts[:depth])
                    found[directory] = FileInfo(path=directory, kind="directory", mode=0o755)
            if recursive or len(parts) == 1:
                found[name] = FileInfo(path=name, size=len(data))
        async with aclosing(_each(found[name] for name in sorted(found))) as entries:
            yield entries

    async def stat(self, path: str) -> FileInfo:
        """One entry. Raises `FileNotFoundError`."""
        await self._send("stat")
        name, top = _place(path).rstrip("/"), _place(path)
        if name in self._box.files:
            return FileInfo(path=name, size=len(self._box.files[name]))
        if top and not any(each.startswith(top) for each in self._box.files):
            raise FileNotFoundError(path)
        return FileInfo(path=name or ".", kind="directory", mode=0o755)

    async def make_directory(self, path: str) -> None:
        """Nothing: directories come with their files."""
        await self._send("make_directory")

    async def remove(self, path: str) -> None:
        """Removes a file, or all that are below a path. Raises `FileNotFoundError`."""
        await self._send("remove")
        name, top = _place(path).rstrip("/"), _place(path)
        gone = [each for each in self._box.files if each == name or each.startswith(top)]
        if not gone:
            raise FileNotFoundError(path)
        for each in gone:
            del self._box.files[each]

    async def url(self, port: int) -> str:
        """An address at which nothing answers."""
        await self._send("url")
        return f"http://{self.id}.invalid:{port}"

    async def snapshot(self, marker: str, retention: float) -> str:
        """The id of a copy of its files."""
        await self._send("snapshot")
        return self._vendor.snapshot(self._box, marker, retention)

    async def fork(self, order: Order) -> Sandbox:
        """Another sandbox with a copy of its files."""
        await self._send("fork")
        check_dispatch(order, trio.current_time())
        return ReferenceSandbox(self._session, self._vendor, self._vendor.fork(self._box, order))

    async def extend(self, lifetime: float) -> None:
        """Lets it live for `lifetime` seconds from now."""
        await self._send("extend")
        self._vendor.extend(self._box, lifetime)

    async def destroy(self) -> None:
        """Ends the sandbox. Idempotent; succeeds if it is already gone."""
        await self._session.send("destroy", self._box)
        self._vendor.destroy(self._box)

    async def _send(self, step: str) -> None:
        await self._session.send(step, self._box)
        self._vendor.advance(self._box)
        self._box.require_alive()


class ReferenceProcess:
    """A started program."""

    __slots__ = ("_box", "_offsets", "_program", "_session", "_vendor", "id")

    def __init__(
        self,
        session: ReferenceSession,
        vendor: Vendor,
        box: Box,
        program: Program,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.id = program.id
        self._session = session
        self._vendor = vendor
        self._box = box
        self._program = program
        self._offsets = offsets or {}

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Output | Artifact | Exit]]:
        """What the program has written since its start (or the offsets) and writes from now on, and its `Exit` last.

        Raises `SandboxLost` where the sandbox ends first, and `SandboxGone` where it was released before.
        """
        return EventStream(self._session, self._vendor, self._box, self._program, self._offsets)

    async def kill(self) -> None:
        """Ends the program. Succeeds if it has ended."""
        await self._session.send("kill", self._box)
        self._vendor.kill(self._box, self._program)


class EventStream:
    """The events of a program: a context manager and an iterator in one, since ten thousand may be open."""

    __slots__ = ("_at", "_box", "_offsets", "_over", "_program", "_session", "_vendor")

    def __init__(self, session: ReferenceSession, vendor: Vendor, box: Box, program: Program, offsets: Mapping[str, int]) -> None:
        self._session = session
        self._vendor = vendor
        self._box = box
        self._program = program
        self._offsets = offsets
        self._at = 0
        self._over = False

    async def __aenter__(self) -> AsyncIterator[Output | Artifact | Exit]:
        await self._session.send("events", self._box)
        self._box.require_alive()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Output | Exit:
        if self._over:
            raise StopAsyncIteration
        await trio.lowlevel.checkpoint()
        while True:
            self._vendor.advance(self._box)
            event = self._next()
            if event is not None:
                return event
            await self._wait_due()

    def _next(self) -> Output | Exit | None:
        program = self._program
        while self._at < len(program.chunks):
            output = _after(program.chunks[self._at], self._offsets)
            self._at += 1
            if output is not None:
                return output
        if program.lost is not None:
            raise SandboxLost(program.lost)
        self._over = program.exit is not None
        return program.exit

    async def _wait_due(self) -> None:
        """Returns once the program's next step is due, its sandbox ends, or it was killed."""
        at = min(self._program.due_at, self._box.ends_at)
        with trio.move_on_at(self._vendor.deadline(at)) as scope:
            await self._program.changed.wait()
        if scope.cancelled_caught:
            self._vendor.reached(at)


def _place(path: str) -> str:
    """The beginning of the names of all files below a directory; empty for the work area itself."""
    return "" if path in ("", ".") else file_path(None, path) + "/"


def _after(output: Output, offsets: Mapping[str, int]) -> Output | None:
    """The part of an output from the offset of its stream on, or None if nothing is left of it."""
    skip = offsets.get(output.stream, 0) - output.offset
    if skip <= 0:
        return output
    return Output(output.stream, output.data[skip:], output.offset + skip) if skip < len(output.data) else None


async def _each(items: Iterable[T]) -> AsyncGenerator[T, None]:
    for item in items:
        await trio.lowlevel.checkpoint()
        yield item
