"""Sandboxes that this router runs itself, and that end with it: single programs, and boxes that have no supervisor."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from sandstorm.provider import CapacityError, Command, NotSupported, Order
from sandstorm_provider_local._birth import Scene
from sandstorm_provider_local._cgroup import Cgroup, Limits
from sandstorm_provider_local._confinement import Job
from sandstorm_provider_local._environments import Prepared
from sandstorm_provider_local._packages import Bench
from sandstorm_provider_local._plainbox import PlainBox
from sandstorm_provider_local._pool import CgroupPool
from sandstorm_provider_local._process import Bounds, LocalProcess
from sandstorm_provider_local._sandbox import OneShotSandbox
from sandstorm_provider_local._state import Record, Records, UidLease, new_record
from sandstorm_provider_local._survey import Ground
from sandstorm_provider_local._workarea import WorkArea

_DISK_CHECK = 0.5
"""Seconds between two looks at how much a box has written."""
_CLEANUP = 10.0


class Owned:
    """Those of one session."""

    def __init__(self, state: Path, records: Records, pool: CgroupPool | None, nursery: trio.Nursery) -> None:
        self._state = state
        self._records = records
        self._pool = pool
        self._nursery = nursery
        self.live: dict[str, PlainBox | OneShotSandbox] = {}

    def launch(
        self, ground: Ground, scene: Scene, prepared: Prepared | None, order: Order, command: Command
    ) -> tuple[OneShotSandbox, LocalProcess]:
        """A sandbox whose main process is the program; its files live in memory and go with it."""
        holds = _Holds(prepared)
        try:
            holds.lease = UidLease(self._state)
            holds.group = self.group(ground, order.offer.memory, order.offer.cpu)
            record = new_record(order, holds.lease.uid, keeps_files=False)
            self._records.add(record)
            holds.marker = order.marker
            env = {**scene.env, **order.spec.env, **order.secrets, **command.env}
            process = self._run(ground, scene, record, holds.group, command, env, files=order.spec.files)
        except BaseException:
            self._release(holds)
            raise
        sandbox = OneShotSandbox(order.marker, None, partial(self._release, holds))
        sandbox.adopt(process)
        self.live[order.marker] = sandbox
        self._nursery.start_soon(process.watch)
        return sandbox, process

    async def create(self, ground: Ground, scene: Scene, prepared: Prepared | None, order: Order) -> PlainBox:
        """A box on disk, each of whose programs runs in a sandbox of its own."""
        holds = _Holds(prepared)
        try:
            holds.lease = UidLease(self._state)
            holds.group = self.group(ground, order.offer.memory, order.offer.cpu)
            record = new_record(order, holds.lease.uid, keeps_files=True)
            work = self._records.add(record) / "work"
            holds.marker = order.marker
            work.mkdir(mode=0o700)
            if record.uid is not None:
                os.chown(work, record.uid, record.uid)
            box = self._plain_box(ground, scene, record, holds, {**scene.env, **order.spec.env, **order.secrets})
            for path, data in order.spec.files.items():
                await box.upload(path, _once(data))
        except BaseException:
            self._release(holds)
            raise
        self.live[order.marker] = box
        self._nursery.start_soon(self._expire, box, record.expires_at - time.time())
        return box

    def attach(self, ground: Ground, scene: Scene, record: Record) -> PlainBox:
        """A box on disk that another router made: its files."""
        holds = _Holds(None)
        holds.marker = record.marker
        holds.group = self.group(ground, record.memory, record.cpu)
        box = self._plain_box(ground, scene, record, holds, scene.env)
        self.live[record.marker] = box
        self._nursery.start_soon(self._expire, box, record.expires_at - time.time())
        return box

    def group(self, ground: Ground, memory: int, cpu: float) -> Cgroup | None:
        """A group with these limits, where this machine has any. Raises `CapacityError`."""
        if ground.pool is None:
            return None
        try:
            return ground.pool.take(Limits(memory + ground.overhead, cpu))
        except OSError as exc:
            raise CapacityError(f"no control group: {exc}") from exc

    @contextmanager
    def bench(self, ground: Ground, memory: int) -> Iterator[Bench]:
        """What an installer runs with."""
        holds = _Holds(None)
        try:
            lease = holds.lease = UidLease(self._state)
            group = holds.group = self.group(ground, memory, float(os.cpu_count() or 1))
            yield Bench(
                confinement=ground.bubblewrap,
                uid=lease.uid,
                join_fds=group.join_fds if group else (),
                memory=None if group else memory,
                max_tasks=None if group else ground.max_tasks,
                oom_kills=(lambda: group.oom_kills) if group else (lambda: 0),
            )
        finally:
            self._release(holds)

    async def close(self) -> None:
        """Kills every program; what has files on disk keeps them until it expires."""
        for sandbox in list(self.live.values()):
            sandbox.end()
        for sandbox in list(self.live.values()):
            if isinstance(sandbox, OneShotSandbox):
                await sandbox.destroy()
            else:
                await sandbox.leave()
        if self._pool is not None:
            with trio.move_on_after(_CLEANUP / 2):
                while not self._pool.all_empty:
                    self._pool.kill()
                    await trio.sleep(0.002)
            await trio.to_thread.run_sync(self._pool.close)

    def _plain_box(self, ground: Ground, scene: Scene, record: Record, holds: _Holds, env: Mapping[str, str]) -> PlainBox:
        work = self._records.directory(record.marker) / "work"

        def begin(box: PlainBox, command: Command) -> LocalProcess:
            if box.is_full():
                raise CapacityError(f"the work area of {record.marker} is full: {record.disk} MiB")
            process = self._run(ground, scene, record, holds.group, command, {**env, **command.env}, work=str(work))
            box.adopt(process)
            self._nursery.start_soon(process.watch, _DISK_CHECK, box.is_full)
            return process

        root = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return PlainBox(record.marker, work, WorkArea(root, record.uid), record.disk, partial(self._release, holds), begin)

    async def _expire(self, box: PlainBox, seconds: float) -> None:
        await trio.sleep(max(0.0, seconds))
        await box.destroy()

    def _run(
        self,
        ground: Ground,
        scene: Scene,
        record: Record,
        group: Cgroup | None,
        command: Command,
        env: Mapping[str, str],
        *,
        files: Mapping[str, bytes] | None = None,
        work: str | None = None,
    ) -> LocalProcess:
        if command.interactive or command.terminal is not None or command.detached:
            raise NotSupported("a program that ends with its router takes no input while it runs, and is not detached")
        job = Job(
            argv=command.argv,
            env=env,
            cwd=command.cwd or "",
            stdin=command.stdin,
            files=files or {},
            work=work,
            disk=record.disk,
            uid=record.uid,
            join_fds=group.join_fds if group else (),
            memory=None if group else record.memory,
            max_tasks=None if group else ground.max_tasks,
            binds=scene.binds,
        )
        bounds = Bounds(deadline=trio.current_time() + command.timeout, output_limit=command.output_limit)
        oom_kills = (lambda: group.oom_kills) if group else (lambda: 0)
        try:
            return LocalProcess(scene.confinement.spawn(job), bounds, oom_kills)
        except OSError as exc:
            raise CapacityError(f"the sandbox could not be started: {exc}") from exc

    def _release(self, holds: _Holds) -> None:
        """Gives everything back that belongs to a sandbox, the group last since it counts what the rest still holds."""
        if holds.marker is not None:
            self._records.remove(holds.marker)
            self.live.pop(holds.marker, None)
        if holds.lease is not None:
            holds.lease.close()
        if holds.prepared is not None:
            holds.prepared.lease.close()
        if holds.group is not None and self._pool is not None:
            self._pool.give_back(holds.group)


class _Holds:
    """What one sandbox holds."""

    def __init__(self, prepared: Prepared | None) -> None:
        self.marker: str | None = None
        self.lease: UidLease | None = None
        self.group: Cgroup | None = None
        self.prepared = prepared


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
