"""The one class that an author subclasses."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.abc import Clock

from sandstorm import SandboxSpec
from sandstorm import provider as contract
from sandstorm.provider import InvalidInput, Output, ProviderDown, Reconnect, SandboxGone, SandboxLost
from sandstorm_conformance._account import Account
from sandstorm_conformance._clauses import Test, clause
from sandstorm_conformance._dialect import Dialect

_OF_SANDBOXES = ("Reconnect", "Gate", "Interpreter", "Files", "Watch", "Ports", "Pause", "Snapshot", "Fork", "Extend", "Metered")
_OF_SESSIONS = ("Prepare", "OneShot", "LiveRates")
_ALL_BYTES = bytes(range(256)) * 300
_LONG = 120.0
"""Seconds after which a check that does not end has failed."""


class ProviderConformance:
    """Subclass it, and give a fixture `provider`. `dialect` and `spec` say how programs are written and which machine is asked for."""

    dialect = Dialect()
    spec = SandboxSpec(memory=128, disk=32)

    def new_clock(self) -> Clock | None:
        """The clock of one check: None for the real one."""
        return None

    def run_check(self, check: Test, provider: Any) -> None:
        """Runs one check, and sweeps whatever came of it."""

        async def main() -> None:
            async with provider.connect() as session:
                account = Account(provider, session, await session.refresh(), self.spec, self.dialect)
                try:
                    with trio.fail_after(_LONG):
                        await check(self, account)
                finally:
                    with trio.fail_after(_LONG) as scope:
                        scope.shield = True
                        await account.sweep()

        trio.run(main, clock=self.new_clock())

    @clause("offer:size:at-least-as-asked")
    async def test_offer_size(self, account: Account) -> None:
        offer = account.order().offer
        assert offer.cpu >= self.spec.cpu
        assert offer.memory >= self.spec.memory
        assert offer.disk >= self.spec.disk

    @clause("find:after-create:within-declared-lag")
    async def test_find_after_create(self, account: Account) -> None:
        sandbox = await account.create()
        await account.wait_listed()
        assert await account.found(account.markers[0]) == [sandbox.id]
        assert sandbox.id in await account.found(None)
        # Not by the sweep, which would not see it where this clause fails.
        await sandbox.destroy()

    @clause("find:marker:sees-own-only")
    async def test_find_own(self, account: Account) -> None:
        one, two = await account.create(), await account.create()
        await account.wait_listed()
        assert await account.found(account.markers[0]) == [one.id]
        assert await account.found(account.markers[1]) == [two.id]

    @clause("find:destroyed:gone")
    async def test_find_destroyed(self, account: Account) -> None:
        sandbox = await account.create()
        await sandbox.destroy()
        await account.wait_listed()
        assert await account.found(account.markers[0]) == []

    @clause("create:dispatch-by:refused")
    async def test_dispatch_by(self, account: Account) -> None:
        with pytest.raises(ProviderDown):
            await account.create(dispatch_by=trio.current_time() - 1)
        await account.wait_listed()
        assert await account.found(account.markers[0]) == []

    @clause("lifecycle:start-twice:runs-once")
    async def test_start_twice(self, account: Account) -> None:
        sandbox = await account.create()
        first = await account.run(sandbox, account.dialect.swaps(), start_id="start-1")
        program = account.dialect.swaps()
        command = contract.Command(argv=program.argv, timeout=30.0, start_id="start-1")
        second = await account.collect(await sandbox.start(command))
        assert (first.stdout, second.stdout) == (b"first", b"first")

    @clause("limits:lifetime:enforced")
    async def test_lifetime(self, account: Account) -> None:
        sandbox = await account.create(lifetime=3.0)
        await trio.sleep(6.0)
        with pytest.raises((SandboxLost, SandboxGone)):
            await account.run(sandbox, account.dialect.exits(0))
        with pytest.raises(SandboxGone):
            await account.session.attach(sandbox.id)

    @clause("destroy:twice:ok")
    async def test_destroy_twice(self, account: Account) -> None:
        sandbox = await account.create()
        await sandbox.destroy()
        await sandbox.destroy()

    @clause("attach:by-id:same-sandbox")
    async def test_attach(self, account: Account) -> None:
        sandbox = await account.create()
        await account.upload(sandbox, "here", b"data")
        assert await account.download(await account.session.attach(sandbox.id), "here") == b"data"

    @clause("attach:unknown:gone")
    async def test_attach_unknown(self, account: Account) -> None:
        with pytest.raises(SandboxGone):
            await account.session.attach("conformance-no-such")

    @clause("exec:output:binary-exact")
    async def test_output_exact(self, account: Account) -> None:
        ran = await account.run(await account.create(), account.dialect.emit(_ALL_BYTES, "x"))
        assert ran.stdout == _ALL_BYTES

    @clause("exec:output:split")
    async def test_output_split(self, account: Account) -> None:
        ran = await account.run(await account.create(), account.dialect.emit(b"out", "err"))
        assert (ran.stdout, ran.stderr) == (b"out", b"err\n")

    @clause("exec:stream:ends-with-exit")
    async def test_stream_ends(self, account: Account) -> None:
        process = await account.start(await account.create(), account.dialect.exits(0))
        async with process.events() as events:
            kinds = [type(event) for event in [event async for event in events]]
        assert kinds[-1:] == [contract.Exit]
        assert kinds.count(contract.Exit) == 1

    @clause("exec:stdin:eof")
    async def test_stdin(self, account: Account) -> None:
        sandbox = await account.create()
        for data in (b"", _ALL_BYTES):
            ran = await account.run(sandbox, account.dialect.echo(), stdin=data)
            assert (ran.stdout, ran.exit.code) == (data, 0)

    @clause("exit:code:exact")
    async def test_exit_code(self, account: Account) -> None:
        sandbox = await account.create()
        for code in (0, 1, 77):
            ran = await account.run(sandbox, account.dialect.exits(code))
            assert (ran.exit.kind, ran.exit.code) == ("exited", code)

    @clause("exit:signal:named")
    async def test_exit_signal(self, account: Account) -> None:
        ran = await account.run(await account.create(), account.dialect.dies(15))
        assert (ran.exit.kind, ran.exit.signal) == ("signal", 15)

    @clause("limits:deadline:kills-the-tree")
    async def test_deadline(self, account: Account) -> None:
        sandbox = await account.create()
        ran = await account.run(sandbox, account.dialect.leaves_child("late", 2.0), timeout=1.0)
        assert ran.exit.kind == "deadline"
        await trio.sleep(2.5)
        with pytest.raises(FileNotFoundError):
            await account.download(sandbox, "late")

    @clause("limits:output:cut")
    async def test_output_limit(self, account: Account) -> None:
        sandbox = await account.create()
        within = await account.run(sandbox, account.dialect.floods(1000), output_limit=1000)
        assert (len(within.stdout), within.exit.kind) == (1000, "exited")
        beyond = await account.run(sandbox, account.dialect.floods(100_000), output_limit=1000)
        assert (len(beyond.stdout), beyond.exit.kind) == (1000, "output-limit")

    @clause("kill:running:ends")
    async def test_kill(self, account: Account) -> None:
        process = await account.start(await account.create(), account.dialect.leaves_child("late", 50.0))
        await trio.sleep(0.5)
        await process.kill()
        await process.kill()
        assert (await account.collect(process)).exit.kind == "signal"

    @clause("files:round-trip:exact")
    async def test_round_trip(self, account: Account) -> None:
        sandbox = await account.create()
        for data in (b"", _ALL_BYTES, b"\0\xffab" * (5 * 1024 * 256)):
            await account.upload(sandbox, "deep/file", data)
            assert await account.download(sandbox, "deep/file") == data

    @clause("files:names:metacharacters")
    async def test_names(self, account: Account) -> None:
        sandbox = await account.create()
        for name in ("a b", "-rf", "$(id)", "`id`;*?", 'it\'s "q"', "ünï"):
            await account.upload(sandbox, name, name.encode())
            assert await account.download(sandbox, name) == name.encode()

    @clause("files:path:refuses-escape")
    async def test_escape(self, account: Account) -> None:
        sandbox = await account.create()
        for path in ("../escaped", "/escaped", "a/../../escaped"):
            with pytest.raises(InvalidInput):
                await account.upload(sandbox, path, b"x")
            with pytest.raises(InvalidInput):
                await account.download(sandbox, path)

    @clause("files:missing:named")
    async def test_missing(self, account: Account) -> None:
        with pytest.raises(FileNotFoundError):
            await account.download(await account.create(), "missing")

    @clause("abilities:reconnect:at-offset")
    async def test_reconnect(self, account: Account) -> None:
        if not account.order().offer.can("Reconnect"):
            pytest.skip("Reconnect is not declared")
        sandbox = await account.create()
        assert isinstance(sandbox, Reconnect)
        started = await account.start(sandbox, account.dialect.emit(b"0123456789", "x"))
        process = await sandbox.process(started.id, {"stdout": 4})
        async with process.events() as events:
            parts = [event async for event in events if isinstance(event, Output) and event.stream == "stdout"]
        assert parts[0].offset == 4
        assert b"".join(part.data for part in parts) == b"456789"

    @clause("abilities:declared:present")
    async def test_declared(self, account: Account) -> None:
        sandbox, offer = await account.create(), account.order().offer
        for names, thing in ((_OF_SANDBOXES, sandbox), (_OF_SESSIONS, account.session)):
            missing = [name for name in names if offer.can(name) and not isinstance(thing, getattr(contract, name))]
            assert not missing, f"declared and not there: {missing}"
