"""An account under test: whatever is made through it is known by its marker, and gone at the end."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import attrs
import trio

from sandstorm.provider import Command, Exit, Facts, Offer, Order, Output, Process, Provider, Sandbox, SandboxSpec, Session
from sandstorm_conformance._dialect import Dialect, Program


@attrs.frozen
class Ran:
    """What came of a program."""

    stdout: bytes
    stderr: bytes
    exit: Exit


@attrs.define
class Account:
    """A connected provider, and short ways to ask it for something."""

    provider: Provider
    session: Session
    facts: Facts
    spec: SandboxSpec
    dialect: Dialect
    markers: list[str] = attrs.field(factory=list)

    def order(self, **fields: Any) -> Order:
        """An order on the first offer, with a marker that the sweep knows."""
        offers = [offer for offer in self.provider.offers(self.spec, self.facts) if isinstance(offer, Offer)]
        assert offers, "the provider makes no offer for the suite's spec"
        marker = f"conformance-{uuid.uuid4().hex[:20]}"
        self.markers.append(marker)
        values = {"dispatch_by": trio.current_time() + 300, "lifetime": 300.0, **fields}
        return Order(spec=self.spec, offer=offers[0], marker=marker, **values)

    async def create(self, **fields: Any) -> Sandbox:
        """A sandbox that the sweep knows."""
        return await self.session.create(self.order(**fields))

    async def upload(self, sandbox: Sandbox, path: str, *parts: bytes) -> None:
        """Puts a file into a sandbox."""
        await sandbox.upload(path, _each(parts))

    async def download(self, sandbox: Sandbox, path: str) -> bytes:
        """The whole file."""
        async with sandbox.download(path) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def start(self, sandbox: Sandbox, program: Program, **fields: Any) -> Process:
        """Starts a program of the dialect, with its files in place."""
        for path, data in program.files.items():
            await self.upload(sandbox, path, data)
        return await sandbox.start(Command(argv=program.argv, **{"timeout": 30.0, **fields}))

    async def collect(self, process: Process) -> Ran:
        """All that a program wrote, with its offsets checked, and its exit."""
        streams = {"stdout": b"", "stderr": b""}
        exits: list[Exit] = []
        async with process.events() as events:
            async for event in events:
                assert not exits, "something follows the exit"
                if isinstance(event, Output):
                    assert event.offset == len(streams[event.stream]), "an offset is wrong"
                    streams[event.stream] += event.data
                elif isinstance(event, Exit):
                    exits.append(event)
        assert exits, "the stream ended without an exit"
        return Ran(streams["stdout"], streams["stderr"], exits[0])

    async def run(self, sandbox: Sandbox, program: Program, **fields: Any) -> Ran:
        """What came of a program."""
        return await self.collect(await self.start(sandbox, program, **fields))

    async def found(self, marker: str | None) -> list[str]:
        """The ids that a look-up shows."""
        async with self.session.find(marker) as infos:
            return [info.id async for info in infos]

    async def wait_listed(self) -> None:
        """Returns once the declared find lag is over."""
        await trio.sleep(self.provider.traits.find_lag.seconds)

    async def sweep(self) -> None:
        """Destroys all that carries a marker of this account; fails where something stays."""
        await self.wait_listed()
        for marker in self.markers:
            for each in await self.found(marker):
                await (await self.session.attach(each)).destroy()
        left = [each for marker in self.markers for each in await self.found(marker)]
        assert not left, f"leaked: {left}"


async def _each(parts: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
