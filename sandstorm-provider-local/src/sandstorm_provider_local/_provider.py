"""The local machine as a provider: what it offers, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date
from typing import Any

import attrs

from sandstorm.provider import (
    ABILITIES,
    FULL,
    Declined,
    Facts,
    Figure,
    Offer,
    RateCard,
    SandboxSpec,
    Session,
    Support,
    Traits,
    isolation_rank,
    recipe_runtimes,
)
from sandstorm_provider_local._limits import ENVIRONMENTS_DISK, IMAGE_DISK, LONGEST_LIFE

_MEASURED = "measured on Debian 12, kernel 6.18, two cores, 2026-11-23: bwrap, seccomp and cgroup, python3 -I -S"
_ATOMIC = "one mkdir on this machine"

_NEVER = {
    "Gate": Support("not-implemented", "its supervisor knows each start id, and burns none"),
    "LiveRates": Support("impossible", "no vendor charges for this machine"),
    "Gpu": Support("impossible", "devices stay out of the sandbox"),
    "NetworkRules": Support("not-implemented", "a rule for single hosts is not enforced yet"),
}
_OF_SUPERVISED_BOXES = (
    "Interactive",
    "Reconnect",
    "Interpreter",
    "Ports",
    "Pause",
    "Snapshot",
    "Fork",
    "Extend",
    "Metered",
    "Detach",
)
_HOST_PROGRAMS = "sandboxes of the level {} have the programs of this machine alone"
_ANY_FILES = {"OneShot": FULL, "Files": FULL, "Watch": FULL}
_IN_PLACE = ("process", "none")
"""Levels whose programs see the host's own paths: the work area is a new directory, which they find in $HOME."""
SUPERVISED = ("namespaces-noproc", "namespaces", "namespaces+cgroup")
"""Levels whose boxes have a supervisor of their own."""
_PACKAGES = {
    "node": "nodejs",
    "tsc": "node-typescript",
    "go": "golang-go",
    "javac": "default-jdk-headless",
    "java": "default-jdk-headless",
    "mcs": "mono-mcs",
    "mono": "mono-runtime",
    "php": "php-cli",
    "Rscript": "r-base-core",
    "lua": "lua5.4",
}
"""Debian's packages of the runtimes that have another name."""
_NEED_PROC = {
    "namespaces-noproc": frozenset({"rustc", "javac", "java", "mcs", "mono"}),
    "process": frozenset({"mcs", "mono"}),
}
"""By level, runtimes that do not even start with what there is of `/proc`."""
_NO_PROC = {
    "namespaces-noproc": "cannot be mounted in this container: start it with `--security-opt systempaths=unconfined` (Docker) "
    "or `--security-opt unmask=ALL` (podman)",
    "process": "is closed to sandboxes of the level process; ask for namespaces",
}


def _abilities(spec: SandboxSpec, data: Mapping[str, Any]) -> dict[str, Support]:
    """What sandboxes of the level that was verified can do on this machine."""
    declared = {**_ANY_FILES, **_NEVER}
    if data["level"] in SUPERVISED:
        declared |= {**_of_supervised(data), "Prepare": _preparing(data)}
        if spec.environment.image is not None:
            declared |= dict.fromkeys(("Snapshot", "Fork"), Support("partial", "only with an image that has /usr/bin/tar"))
    else:
        reason = f"sandboxes of the level {data['level']} have no supervisor that could do it"
        declared |= dict.fromkeys(_OF_SUPERVISED_BOXES, Support("not-implemented", reason))
        declared["Prepare"] = Support("not-implemented", _HOST_PROGRAMS.format(data["level"]))
    if spec.snapshot is not None:
        declared["OneShot"] = Support("not-implemented", "the files of a snapshot are put into a box")
    return {name: declared[name] for name in ABILITIES}


def _preparing(data: Mapping[str, Any]) -> Support:
    missing = [name for name in ("uv", "npm") if name not in data.get("installers", {})]
    return Support("partial", f"{' and '.join(missing)} cannot be found: install it for its packages") if missing else FULL


def _of_supervised(data: Mapping[str, Any]) -> dict[str, Support]:
    tar = data.get("tar", False)
    no_tar = Support("impossible", "there is no tar below /usr; install it (`apt install tar`)")
    no_freezer = Support("impossible", "no freezer control group can be used here; give this user one, or run as root")
    groups = data.get("groups") is not None
    return {
        **dict.fromkeys(("Interactive", "Reconnect", "Ports", "Extend", "Detach"), FULL),
        "Interpreter": Support("partial", "only python keeps its state between cells"),
        "Pause": FULL if data.get("freezer") else no_freezer,
        "Snapshot": FULL if tar else no_tar,
        "Fork": Support("partial", "the files are copied, and running programs are not") if tar else no_tar,
        "Metered": Support("partial", "memory and disk are counted as set aside, and CPU as used")
        if groups
        else Support("impossible", "use is counted by control groups, and none can be used here"),
    }


@attrs.frozen(kw_only=True)
class LocalProvider:
    """The machine that the router runs on. Its fields are those of the settings."""

    state_dir: str | None = None
    bwrap: str | None = None
    gvisor: bool = False
    runsc: str | None = None
    uv: str | None = None
    environments_disk: int = ENVIRONMENTS_DISK
    image_disk: int = IMAGE_DISK
    warn: bool = True
    name: str = "local"
    traits: Traits = attrs.field(
        factory=lambda: Traits(
            marker="name",
            commit_lag=Figure(0.0, _ATOMIC),
            find_lag=Figure(0.0, _ATOMIC),
            start_p50=0.020,
            start_p95=0.037,
            start_source=_MEASURED,
            by_invitation=True,
        )
    )
    rates: RateCard | None = attrs.field(
        factory=lambda: RateCard(source="this machine: no vendor charges for it", checked_at=date(2026, 11, 23), confidence="own")
    )

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer | Declined]:
        """An offer of exactly the size asked for, or every reason why there is none; for gVisor likewise where it is wanted."""
        return [answer for offer, data in _classes(facts) for answer in self._answers(spec, offer, data)]

    def _answers(self, spec: SandboxSpec, offer: str, data: Mapping[str, Any]) -> Sequence[Offer | Declined]:
        objections = _objections(spec, data)
        declined = [Declined(provider=self.name, id=offer, rule=rule, reason=reason) for rule, reason in objections]
        return declined or [self._offer(spec, offer, data)]

    def connect(self) -> AbstractAsyncContextManager[Session]:
        """A session with this machine. Raises `ProviderDown` where it has no place for its state."""
        from sandstorm_provider_local._environments import EnvironmentLimits
        from sandstorm_provider_local._session import open_session
        from sandstorm_provider_local._survey import Wanted

        limits = EnvironmentLimits(total=self.environments_disk, image=self.image_disk)
        wanted = Wanted(bwrap=self.bwrap, gvisor=self.gvisor, runsc=self.runsc, uv=self.uv, environments=limits)
        return open_session(self.state_dir, wanted, warn=self.warn)

    def _offer(self, spec: SandboxSpec, offer: str, data: Mapping[str, Any]) -> Offer:
        return Offer(
            provider=self.name,
            id=offer,
            cpu=spec.cpu,
            memory=spec.memory,
            disk=spec.disk,
            isolation=data["level"],
            isolation_detail=_detail(data),
            network=("none",),
            abilities=_abilities(spec, data),
            lifetime=LONGEST_LIFE,
            extendable=data["level"] in SUPERVISED,
            workdir=None if data["level"] in _IN_PLACE else "/work",
        )


def _classes(facts: Facts) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The id of each offer with the facts that it rests on."""
    yield "default", facts.data
    if facts.data.get("gvisor") is not None:
        remedy = "see why runsc fails, or set gvisor = false"
        yield "gvisor", {**facts.data, "bwrap": None, "without_namespaces": "", "remedy": remedy, **facts.data["gvisor"]}


def _objections(spec: SandboxSpec, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each rule that forbids an offer, with its reason and remedy."""
    level = data.get("level")
    if level is None:
        failed = "; ".join(data.get("failed", ())) or "it has not been tried yet"
        yield "isolation-unavailable", f"no sandbox can be made here ({failed}): {data.get('remedy') or 'connect first'}"
    elif isolation_rank(spec.isolation) > isolation_rank(level):
        yield "isolation-floor", _below(spec.isolation, level, data)
    yield from _environment_objections(spec, data)
    if spec.network.mode != "none":
        yield "network", f'only no network can be enforced here, not {spec.network.mode!r}; use network="none"'
    if spec.gpu is not None:
        yield "gpu", "devices stay out of the sandbox; use a provider with GPUs"
    if spec.region is not None:
        yield "region", f"this machine is in no region, so not in {spec.region!r}; leave the region out"
    if spec.cpu > data.get("cpu", 0) or spec.memory > data.get("memory", 0):
        has = f"{data.get('cpu', 0)} vCPU and {data.get('memory', 0)} MiB"
        yield "size", f"this machine has {has}; {spec.cpu:g} vCPU and {spec.memory} MiB are asked for"
    most = data.get("memory", 0) // 2
    if spec.disk > most:
        yield "size", f"work areas live in memory, of which at most half, {most} MiB, is for one; {spec.disk} MiB are asked for"
    if spec.ports and level is not None and level not in SUPERVISED:
        yield "ports", f"sandboxes of the level {level} have no supervisor that could reach into them; leave the ports out"
    if spec.user is not None:
        yield "user", "programs run as an unprivileged user of the sandbox's own; leave the user out"
    if spec.workdir is not None:
        yield "workdir", "programs start in the work area, and it is not chosen; leave workdir out"
    if spec.idle_timeout is not None and level is not None and level not in SUPERVISED:
        yield (
            "idle-timeout",
            f"sandboxes of the level {level} have no supervisor that could see whether they are idle; leave it out",
        )


def _below(floor: str, level: str, data: Mapping[str, Any]) -> str:
    given = f"{floor} is asked for, and this machine gives {level}"
    if not data.get("without_namespaces"):
        return f"{given}; name another provider"
    why = f"{given}, since no namespaces can be made ({data['without_namespaces']})"
    return f'{why}: {data["remedy"]}; or accept less with isolation="{level}"'


def _environment_objections(spec: SandboxSpec, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    environment, runtimes = spec.environment, data.get("runtimes", {})
    plain = data.get("level") is not None and data["level"] not in SUPERVISED
    if plain and (environment.image is not None or environment.requirements):
        yield "environment", _HOST_PROGRAMS.format(data["level"])
    elif environment.image is not None or environment.requirements:
        from sandstorm_provider_local._environments import objections

        yield from objections(environment, data.get("installers", {}))
    if environment.language is not None and environment.image is None:
        for runtime in recipe_runtimes(environment.language):
            if runtime not in runtimes:
                package = _PACKAGES.get(runtime, runtime)
                place = f"{runtime} below /usr, where sandboxes see it"
                remedy = f"install {package} (for example `apt install {package}`)"
                yield "runtime-missing", f"{environment.language} needs {place}; {remedy}"
            elif runtime in _NEED_PROC.get(str(data.get("level")), ()):
                yield "runtime-missing", f"{environment.language} needs /proc, which {_NO_PROC[data['level']]}"


def _detail(data: Mapping[str, Any]) -> str:
    level = data["level"]
    parts = [data["groups"] or "no cgroup, so memory is limited for each process only and CPU is not"]
    if level in SUPERVISED:
        parts = [f"bwrap {data['bwrap']}", "seccomp" if data["seccomp"] else "NO seccomp on this machine", *parts]
    elif level == "gvisor":
        parts = [f"runsc {data['version']} on {data['platform']}", *parts]
    elif level == "process":
        parts = ["Landlock and seccomp", *parts]
    if level == "namespaces-noproc":
        parts.append("no /proc")
    told = f"{level} ({', '.join(parts)}); verified: {', '.join(data['verified'])}"
    if data["failed"]:
        told += f"; NOT enforced: {', '.join(data['failed'])}"
    if level in _IN_PLACE:
        told += "; the work area is the directory $HOME"
    return f"{told}; a kernel of its own" if level == "gvisor" else f"{told}; shared host kernel: a kernel bug escapes this"
