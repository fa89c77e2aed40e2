"""The levels that do without bubblewrap: what of them this machine has, tried like all others.

`process` and `none` are for where bubblewrap does not work and the caller names them; `gvisor` is for those who ask for it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import attrs

from sandstorm_provider_local._gvisor import PLATFORMS, Gvisor, find_runsc, runsc_version
from sandstorm_provider_local._landlock import NEEDED_ABI, Landlock, landlock_abi
from sandstorm_provider_local._pool import CgroupPool
from sandstorm_provider_local._runtimes import Runtimes
from sandstorm_provider_local._seccomp import seccomp_filter
from sandstorm_provider_local._selftest import Verdict, verify
from sandstorm_provider_local._unconfined import Unconfined

_NO_RUNSC = "there is no runsc that runs: install gVisor (`apt install runsc`), or name it with `runsc`"


@attrs.frozen(kw_only=True)
class Site:
    """What the levels are tried with.

    Attributes:
        directory: The session's directory, in which programs get theirs.
        etc: What stands in for `/etc`.
        runtimes: The programs that sandboxes have, `python3` among them.
        pool: The control groups, or None.
        uid: A user id for the trial; None for the caller's own.
    """

    directory: Path
    etc: str
    runtimes: Runtimes
    pool: CgroupPool | None
    uid: int | None


_T = TypeVar("_T", Landlock, Unconfined, Gvisor, Landlock | Unconfined)


@attrs.frozen
class Rung(Generic[_T]):
    """A level that was tried: what came of it, and what it was verified with; None for both where it does not hold."""

    verdict: Verdict
    level: _T | None = None
    pool: CgroupPool | None = None


async def find_weaker(site: Site) -> Rung[Landlock | Unconfined]:
    """The stronger of `process` and `none` that holds here."""
    rung: Rung[Landlock | Unconfined] = Rung(Verdict(level=None, verified=(), failed=()))
    for level in _weaker(site):
        rung = await _try(site, level)
        if rung.level is not None:
            break
    return rung


async def find_gvisor(site: Site, setting: str | None) -> Rung[Gvisor]:
    """The level of gVisor, on the first platform that holds here. `setting` is the path of `runsc`, or None to look below `/usr`."""
    runsc = find_runsc(setting)
    version = runsc_version(runsc) if runsc else None
    if runsc is None or version is None:
        return Rung(Verdict(level=None, verified=(), failed=(_NO_RUNSC,)))
    rung: Rung[Gvisor] = Rung(Verdict(level=None, verified=(), failed=()))
    for name in PLATFORMS:
        level = Gvisor(
            runsc=runsc,
            version=version,
            platform=name,
            scratch=site.directory,
            path=site.runtimes.path,
            etc=site.etc,
            extra=site.runtimes.extra,
        )
        rung = await _try(site, level)
        if rung.level is not None:
            break
    return rung


def _weaker(site: Site) -> Iterator[Landlock | Unconfined]:
    abi, seccomp = landlock_abi(), seccomp_filter(platform.machine(), namespaces=False)
    if abi >= NEEDED_ABI and seccomp is not None:
        yield Landlock(
            abi=abi,
            scratch=site.directory,
            path=site.runtimes.path,
            seccomp=seccomp,
            etc=site.etc,
            extra=site.runtimes.extra,
        )
    yield Unconfined(scratch=site.directory, path=site.runtimes.path)


async def _try(site: Site, level: _T) -> Rung[_T]:
    rung: Rung[_T] = Rung(Verdict(level=None, verified=(), failed=()))
    for pool in (site.pool, None) if site.pool else (None,):
        verdict = await verify(level, site.runtimes.programs["python3"], pool, site.uid, site.directory)
        if verdict.level is not None:
            return Rung(verdict, level, pool)
        rung = Rung(verdict)
    return rung
