"""Closes what stayed open: attempts whose router died, whose create was ambiguous, or whose destroy failed.

A pass lists the vendor first and reads the journal second. What it finds it destroys, and books; what it does not find is
absent once the look-up began after everything could have taken effect and shown, and stays under suspicion until the
vendor's own lifetime has passed. It takes over, destroys and settles; it never starts or extends anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import trio

from sandstorm._converter import from_json
from sandstorm._errors import CallerError, ProviderError, SandboxGone
from sandstorm._plan import Plan
from sandstorm._quote import ZERO
from sandstorm._result import Outcome
from sandstorm._store import OPEN_STATES, AttemptRow, RunRow
from sandstorm.provider import Provider, ResourceInfo

if TYPE_CHECKING:
    from sandstorm._attempt import Trial
    from sandstorm._engine import Engine

SOONEST, LATEST = 1.0, 60.0
"""Seconds between two passes while something is open: the pause doubles as long as nothing could be closed."""

LOOKUP_SECONDS = 60.0
"""How long an account may take to list what it has."""

DESTROY_SECONDS = 30.0


@attrs.frozen(kw_only=True)
class Reaped:
    """What a pass did with one attempt.

    Attributes:
        marker: The id of the attempt, which its vendor object carries.
        run: The id of its run.
        provider: The account.
        sandbox: The vendor's id, or None where none was found.
        done: `destroyed`, `gone` (the vendor had ended it), `absent` (it never came to be), or why it stays open.
    """

    marker: str
    run: str
    provider: str
    sandbox: str | None
    done: str

    @property
    def closed(self) -> bool:
        """Whether nothing is open any more."""
        return self.done in ("destroyed", "gone", "absent")


@attrs.define
class Reconciler:
    """The one of an engine. `serve` runs it in the background; `sweep` is one pass."""

    _engine: Engine
    _suspects: set[str] = attrs.field(factory=set)
    _awake: trio.Event = attrs.field(factory=trio.Event)

    def wake(self) -> None:
        """Something was left open: the next pass is soon."""
        self._awake.set()

    async def serve(self) -> None:
        """Makes passes as long as there is something to close. Nothing that goes wrong in one ends it."""
        while True:
            pause = SOONEST
            while await self._anything():
                swept = await self._guarded()
                pause = SOONEST if any(reaped.closed for reaped in swept) else min(pause * 2, LATEST)
                await trio.sleep(pause)
            with trio.move_on_after(LATEST):
                await self._awake.wait()
            self._awake = trio.Event()

    async def sweep(self) -> tuple[Reaped, ...]:
        """One pass over every account of which something is open."""
        accounts = {row.provider for row in await self._engine.store.open_attempts()}
        swept: list[Reaped] = []
        for account in sorted(accounts):
            swept += await self._account(account)
        return tuple(swept)

    async def sightings(self, account: str) -> tuple[Reaped, ...]:
        """Ends what the journal has closed and the vendor shows for the second time; what is not ours is let be."""
        provider = self._engine.accounts.providers[account]
        listed = await self._listed(account)
        return tuple(await self._sightings(provider, listed))

    async def _anything(self) -> bool:
        store = self._engine.store
        try:
            rows = await store.open_attempts()
            living = await store.living({row.epoch for row in rows})
        except CallerError as exc:
            self._engine.log.warning("the journal cannot be read: %s", exc)
            return False
        return any(self._due(row, living) for row in rows)

    async def _guarded(self) -> tuple[Reaped, ...]:
        try:
            return await self.sweep()
        except Exception:
            self._engine.log.exception("a pass over what is open failed")
            return ()

    async def _account(self, account: str) -> list[Reaped]:
        engine = self._engine
        provider = engine.accounts.providers.get(account)
        began = engine.wall()
        try:
            listed = None if provider is None else await self._listed(account)
        except (ProviderError, CallerError, trio.TooSlowError) as exc:
            # A failed page is no sighting, and no absence either.
            engine.log.warning("%s: could not look up what is there: %s", account, exc)
            listed = None
        rows = [row for row in await engine.store.open_attempts() if row.provider == account]
        living = await engine.store.living({row.epoch for row in rows})
        due = [row for row in rows if self._due(row, living)]
        if provider is None or listed is None:
            reason = "its account does not answer" if provider else "its account is not in the settings"
            return [_open(row, reason) for row in due]
        swept = [await self._close(provider, row, listed.get(row.id), began) for row in due]
        known = {row.id for row in rows}
        return swept + await self._sightings(provider, {m: info for m, info in listed.items() if m not in known})

    async def _listed(self, account: str) -> dict[str, ResourceInfo]:
        session = await self._engine.accounts.session(account)
        with trio.fail_after(LOOKUP_SECONDS):
            async with session.find() as found:
                return {info.marker: info async for info in found if info.marker is not None}

    def _due(self, row: AttemptRow, living: frozenset[int]) -> bool:
        """Whether an open attempt is this router's to close."""
        if row.id in self._engine.busy:
            return False
        if row.state in ("ambiguous", "releasing") and row.epoch == self._engine.epoch:
            return True
        if row.kept and row.state in ("bound", "started"):
            return self._engine.wall() > row.expires_at
        return row.epoch not in living

    async def _close(self, provider: Provider, row: AttemptRow, found: ResourceInfo | None, began: float) -> Reaped:
        taken = await self._engine.store.take(row, self._engine.epoch)
        if taken is None or taken.state not in OPEN_STATES:
            return _open(row, "another router closes it")
        sandbox = found.id if found is not None else taken.sandbox
        if sandbox is not None:
            return await self._release(taken, sandbox, listed=found is not None)
        lag = provider.traits.commit_lag.seconds + provider.traits.find_lag.seconds
        if began < taken.dispatch_by + lag:
            # Whoever has taken it over goes on looking; an intent would count as a create of its own under way.
            await self._engine.store.update(attrs.evolve(taken, state="ambiguous"), durable=True)
            return _open(taken, f"it may still come to be, for {taken.dispatch_by + lag - began:.0f} s")
        return await self._ended(taken, None, "absent")

    async def _release(self, row: AttemptRow, sandbox: str, *, listed: bool) -> Reaped:
        """Destroys a sandbox; it counts as gone only with the vendor's answer."""
        row = attrs.evolve(row, state="releasing", sandbox=sandbox)
        if not await self._engine.store.update(row, durable=True):
            return _open(row, "another router closes it")
        done = "destroyed"
        try:
            session = await self._engine.accounts.session(row.provider)
            with trio.fail_after(DESTROY_SECONDS):
                await (await session.attach(sandbox)).destroy()
        except SandboxGone:
            if listed:
                return _open(row, "its vendor lists it and says that it is gone")
            done = "gone"
        except (ProviderError, CallerError, trio.TooSlowError) as exc:
            return _open(row, f"it could not be destroyed: {type(exc).__name__}: {exc}")
        return await self._ended(row, sandbox, done)

    async def _ended(self, row: AttemptRow, sandbox: str | None, done: str) -> Reaped:
        """Writes down that nothing is open, what it cost, and what is known of its run."""
        found = await self._engine.store.run(row.run)
        assert found is not None
        run, attempts, ledger = found
        trial = self._trial(run, row)
        own = [each for each in ledger if each.attempt == row.id]
        if done == "absent":
            await trial.absent()
        elif any(each.kind == "release" for each in own):
            await trial.ended(booked=sum((each.amount for each in own if each.kind == "settle"), ZERO))
        else:
            await trial.ended()
        await self.conclude(run, [each for each in attempts if each.id != row.id] + [trial.row])
        return Reaped(marker=row.id, run=row.run, provider=row.provider, sandbox=sandbox, done=done)

    async def conclude(self, run: RunRow, attempts: Sequence[AttemptRow]) -> None:
        """The end of a run whose router died: it failed if nothing was started, and is unknown else."""
        if run.state != "running" or any(row.state in OPEN_STATES for row in attempts):
            return
        started = any(row.outcome == Outcome.MAYBE_STARTED.value for row in attempts)
        error = RuntimeError("its router died before the result was known")
        result = self._engine.recorder.error(error, ())
        ended = attrs.evolve(run, state="unknown" if started else "failed", result=result)
        await self._engine.store.finish(ended, None, ())

    async def _sightings(self, provider: Provider, unknown: Mapping[str, ResourceInfo]) -> list[Reaped]:
        """Ends what the journal has closed and the vendor still shows, at the second sighting: what is not ours is let be."""
        rows = await self._engine.store.attempts(unknown)
        seen = {row.id for row in rows}
        confirmed = [row for row in rows if row.id in self._suspects and row.state in ("released", "absent")]
        self._suspects = {marker for marker in self._suspects if marker not in unknown or marker in seen} | seen
        swept = []
        for row in confirmed:
            self._suspects.discard(row.id)
            taken = await self._engine.store.take(row, self._engine.epoch)
            if taken is not None:
                swept.append(await self._release(taken, unknown[row.id].id, listed=True))
        return swept

    def _trial(self, run: RunRow, row: AttemptRow) -> Trial:
        from sandstorm._attempt import Trial

        plan = from_json(Plan, run.plan or "")
        offers = [ranked for ranked in plan.candidates if ranked.candidate.provider == row.provider]
        ranked = next(ranked for ranked in offers if ranked.candidate.offer.id == row.offer)
        began = trio.current_time() - (self._engine.wall() - row.created_at)
        return Trial(engine=self._engine, plan=plan, candidate=ranked.candidate, row=row, secrets={}, began=began)


def _open(row: AttemptRow, why: str) -> Reaped:
    return Reaped(marker=row.id, run=row.run, provider=row.provider, sandbox=row.sandbox, done=why)
