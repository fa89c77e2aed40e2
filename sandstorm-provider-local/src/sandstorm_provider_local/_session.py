"""A session with this machine: what it can do, and the sandboxes that are made here."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO

import trio

from sandstorm.provider import (
    Command,
    Environment,
    Facts,
    InvalidSpec,
    Marker,
    Order,
    Process,
    ProviderDown,
    ResourceInfo,
    Sandbox,
    check_dispatch,
)
from sandstorm_provider_local._birth import scene
from sandstorm_provider_local._box import Box
from sandstorm_provider_local._boxes import Boxes, reap
from sandstorm_provider_local._cgroup import find_hierarchy, sweep
from sandstorm_provider_local._confinement import MIB, Confinement
from sandstorm_provider_local._environments import Environments, Prepared, needs_preparation
from sandstorm_provider_local._notice import tell_once
from sandstorm_provider_local._owned import Owned
from sandstorm_provider_local._pool import CgroupPool
from sandstorm_provider_local._sandbox import OneShotSandbox, StoredSnapshot
from sandstorm_provider_local._snapshots import Snapshots
from sandstorm_provider_local._state import Record, Records, new_session_directory, state_directory
from sandstorm_provider_local._survey import Ground, Wanted, survey
from sandstorm_provider_local._warden import Warden

_CLEANUP = 20.0
_INSTALL_MEMORY = 2048
"""MiB that an installer gets."""


@asynccontextmanager
async def open_session(state_dir: str | None, wanted: Wanted | None = None, *, warn: bool = False) -> AsyncIterator[LocalSession]:
    """A session; at its end its programs are killed, its boxes end unless they are kept, and its groups are removed."""
    state = state_directory(state_dir)
    directory = new_session_directory(state)
    failed: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            session = LocalSession(state, directory, wanted or Wanted(), nursery, warn=warn)
            await session.sweep()
            try:
                yield session
            except Exception as exc:  # raised again below, so that the nursery does not wrap what its user raised
                failed = exc
            finally:
                await session.close()
                nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class LocalSession:
    """The local machine as a connected account."""

    def __init__(self, state: Path, directory: Path, wanted: Wanted, nursery: trio.Nursery, *, warn: bool) -> None:
        self._state = state
        self._directory = directory
        self._wanted = wanted
        self._warn = warn
        self._records = Records(state, directory)
        self._snapshots = Snapshots(state)
        hierarchy = find_hierarchy()
        self._pool = CgroupPool(hierarchy) if hierarchy else None
        self._boxes = Boxes(state, self._records, self._snapshots, nursery, self._fork)
        self._owned = Owned(state, self._records, self._pool, nursery)
        self._ground: Ground | None = None
        self._gvisor: Ground | None = None
        self._facts: Facts | None = None
        self._refreshing = trio.Lock()
        self._warden: Warden | None = None

    # --- what it can do -----------------------------------------------------------------------------------

    async def refresh(self) -> Facts:
        """What offers rest on: the isolation that was verified just now, runtimes, and the size of this machine."""
        async with self._refreshing:
            if self._warden is None:
                self._warden = Warden(self._pool.hierarchy if self._pool else None)
            data, self._ground, self._gvisor = await survey(self._state, self._directory, self._wanted, self._pool)
            self._facts = Facts(data=data, at=time.time(), ttl=0.0)
            return self._facts

    async def check(self) -> None:
        """Raises `ProviderDown`, with the remedy, where no sandbox can be made here."""
        facts = await self.refresh()
        if facts.data["level"] is None:
            raise ProviderDown(f"{'; '.join(facts.data['failed'])}: {facts.data['remedy']}")

    # --- sandboxes ----------------------------------------------------------------------------------------

    async def create(self, order: Order) -> Sandbox:
        """A box: its files and its background programs outlive single programs. Raises `Conflict` where the marker is taken."""
        if order.spec.snapshot is None:
            return await self._create(order, None)
        with await self._snapshots.open(order.spec.snapshot) as archive:
            return await self._create(order, archive)

    async def launch(self, order: Order, command: Command) -> tuple[Sandbox, Process]:
        """A sandbox whose main process is the program; its files live in memory and go with it."""
        ground = await self._ready(order)
        if order.spec.snapshot is not None:
            raise InvalidSpec("snapshot: the files of a snapshot are put into a box; create a sandbox")
        prepared = await self._prepared(order.spec.environment)
        return self._owned.launch(ground, scene(ground, prepared), prepared, order, command)

    async def attach(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox, or snapshot, by its id. Raises `SandboxGone`."""
        await trio.lowlevel.checkpoint()
        known = self._boxes.known(sandbox_id) or self._owned.live.get(sandbox_id)
        if known is not None:
            return known
        if self._snapshots.get(sandbox_id) is not None:
            return StoredSnapshot(sandbox_id, partial(self._snapshots.remove, sandbox_id))
        record = self._records.get(sandbox_id)
        if record.supervised:
            return await self._boxes.attach(record)
        if record.keeps_files:
            ground = await self._found_ground(record.offer)
            return self._owned.attach(ground, scene(ground, None), record)
        return OneShotSandbox(sandbox_id, None, partial(self._forget, record))

    def find(self, marker: Marker | None = None) -> AbstractAsyncContextManager[AsyncIterator[ResourceInfo]]:
        """Every sandbox and snapshot of this user on this machine, of whichever router, or those with this marker."""
        return self._find(marker)

    @asynccontextmanager
    async def _find(self, marker: Marker | None) -> AsyncIterator[AsyncIterator[ResourceInfo]]:
        async def found() -> AsyncIterator[ResourceInfo]:
            await trio.lowlevel.checkpoint()
            for record in self._records.all():
                if marker in (None, record.marker):
                    state, idle = await self._look_at(record)
                    yield ResourceInfo(
                        id=record.marker,
                        marker=record.marker,
                        state=state,
                        created_at=record.created_at,
                        expires_at=record.expires_at,
                        idle=idle,
                    )
            for stored in self._snapshots.all():
                if marker in (None, stored.id):
                    expired = stored.expires_at <= time.time()
                    yield ResourceInfo(
                        id=stored.id,
                        marker=stored.id,
                        kind="snapshot",
                        state="expired" if expired else "stored",
                        created_at=stored.created_at,
                        expires_at=stored.expires_at,
                    )

        yield found()

    async def _look_at(self, record: Record) -> tuple[str, float | None]:
        if record.supervised:
            return await self._boxes.look(record)
        return ("orphaned" if record.is_orphaned else "running"), None

    async def prepare(self, environment: Environment, marker: Marker) -> str:
        """The key under which an environment is kept, built if it is not there. Raises `InvalidSpec`, `PreparationFailed`."""
        ground = await self._found_ground()
        prepared = await self._environments(ground).prepare(environment, partial(self._owned.bench, ground, _INSTALL_MEMORY))
        prepared.lease.close()
        return prepared.key

    # --- their parts --------------------------------------------------------------------------------------

    async def _create(self, order: Order, archive: IO[bytes] | None) -> Sandbox:
        ground = await self._ready(order)
        prepared = await self._prepared(order.spec.environment)
        if not isinstance(ground.confinement, Confinement):
            if archive is not None:
                raise InvalidSpec("snapshot: boxes of this isolation cannot start from one; ask for namespaces")
            return await self._owned.create(ground, scene(ground, prepared), prepared, order)
        try:
            return await self._boxes.create(ground, scene(ground, prepared), order, archive)
        finally:
            if prepared is not None:
                prepared.lease.close()

    async def _fork(self, box: Box, order: Order) -> Box:
        ground = await self._ready(order)
        with await self._snapshots.fork(box.archive) as archive:
            prepared = await self._prepared(order.spec.environment)
            try:
                return await self._boxes.create(ground, scene(ground, prepared), order, archive)
            finally:
                if prepared is not None:
                    prepared.lease.close()

    async def _prepared(self, environment: Environment) -> Prepared | None:
        if not needs_preparation(environment):
            return None
        ground = await self._found_ground()
        return await self._environments(ground).prepare(environment, partial(self._owned.bench, ground, _INSTALL_MEMORY))

    def _environments(self, ground: Ground) -> Environments:
        return Environments(
            self._state / "environments",
            programs=ground.runtimes.programs,
            path=ground.runtimes.path,
            uv=self._wanted.uv,
            limits=self._wanted.environments,
        )

    async def _ready(self, order: Order) -> Ground:
        ground = await self._found_ground(order.offer.id)
        if sum(map(len, order.spec.files.values())) > order.offer.disk * MIB:
            raise InvalidSpec(f"files: more than the disk of {order.offer.disk} MiB")
        check_dispatch(order, trio.current_time())
        if self._warn:
            tell_once(ground.level, ground.not_enforced)
        return ground

    async def _found_ground(self, offer: str = "default") -> Ground:
        if self._facts is None:
            await self.refresh()
        ground = self._gvisor if offer == "gvisor" else self._ground
        if ground is None and offer == "default":
            await self.check()
        if ground is None:
            raise ProviderDown(f"no sandbox of the offer {offer} can be made on this machine")
        return ground

    def _forget(self, record: Record) -> None:
        if record.is_orphaned:
            self._records.remove(record.marker)
        else:
            raise ProviderDown(f"{record.marker} runs under another router, which ends it with its program")

    # --- its end ------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Removes what dead routers and supervisors of this user left, and what is past its lifetime or retention."""
        reap()
        if self._pool is not None:
            await trio.to_thread.run_sync(sweep, self._pool.hierarchy)
        for record in self._records.stale(time.time()):
            await trio.to_thread.run_sync(self._boxes.remove, record)
        await trio.to_thread.run_sync(self._records.remove_broken)
        await trio.to_thread.run_sync(self._snapshots.sweep)

    async def close(self) -> None:
        """Kills every program of this session, ends its boxes unless they are kept, and removes its groups; bounded."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP):
            await self._boxes.close()
            await self._owned.close()
        if self._warden is not None:
            self._warden.close()
