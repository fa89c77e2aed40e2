"""The local machine as a provider: what it offers, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date

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

_LIFETIME = 86400.0
_MEASURED = "measured on Debian 12, kernel 6.18, two cores, 2026-11-23: bwrap, seccomp and cgroup, python3 -I -S"
_ATOMIC = "one mkdir on this machine"

_LATER = {
    "Interactive": "programs get all of their input at the start",
    "Reconnect": "a program ends with the router that started it",
    "Prepare": "environments are not built here yet",
    "Interpreter": "no state is kept between programs",
    "Extend": "the lifetime is fixed at the start",
    "Metered": "use is not measured; nothing is charged for it",
    "NetworkRules": "a rule for single hosts is not enforced yet",
}
_NEVER = {
    "Ports": "there is no network in the sandbox",
    "Pause": "memory cannot be kept without a machine of its own",
    "Snapshot": "memory cannot be kept without a machine of its own",
    "Fork": "memory cannot be copied without a machine of its own",
    "LiveRates": "no vendor charges for this machine",
    "Gpu": "devices stay out of the sandbox",
}
_PACKAGES = {"python3": "python3", "node": "nodejs", "Rscript": "r-base-core", "go": "golang", "lua": "lua5.4"}


def _abilities() -> dict[str, Support]:
    declared = {"OneShot": FULL}
    declared |= {name: Support("not-implemented", reason) for name, reason in _LATER.items()}
    declared |= {name: Support("impossible", reason) for name, reason in _NEVER.items()}
    return {name: declared[name] for name in ABILITIES if name in declared}


@attrs.frozen(kw_only=True)
class LocalProvider:
    """The machine that the router runs on. `state_dir` and `bwrap` are those of the settings."""

    state_dir: str | None = None
    bwrap: str | None = None
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
        """One offer of exactly the size asked for, or every reason why there is none."""
        declined = [Declined(provider=self.name, rule=rule, reason=reason) for rule, reason in _objections(spec, facts)]
        return declined or [self._offer(spec, facts)]

    def connect(self) -> AbstractAsyncContextManager[Session]:
        """A session with this machine. Raises `ProviderDown` where it has no place for its state."""
        from sandstorm_provider_local._session import open_session

        return open_session(self.state_dir, self.bwrap)

    def _offer(self, spec: SandboxSpec, facts: Facts) -> Offer:
        return Offer(
            provider=self.name,
            cpu=spec.cpu,
            memory=spec.memory,
            disk=spec.disk,
            isolation=facts.data["level"],
            isolation_detail=_detail(facts),
            network=("none",),
            abilities=_abilities(),
            lifetime=_LIFETIME,
            extendable=False,
            workdir="/work",
        )


def _objections(spec: SandboxSpec, facts: Facts) -> Iterator[tuple[str, str]]:
    """Each rule that forbids an offer, with its reason and remedy."""
    data = facts.data
    level = data.get("level")
    if level is None:
        failed = "; ".join(data.get("failed", ())) or "it has not been tried yet"
        yield "isolation-unavailable", f"no sandbox can be made here ({failed}): {data.get('remedy') or 'connect first'}"
    elif isolation_rank(spec.isolation) > isolation_rank(level):
        yield "isolation-floor", f"{spec.isolation} is asked for, and this machine gives {level}; name another provider"
    yield from _environment_objections(spec, data.get("runtimes", {}))
    if spec.network.mode != "none":
        yield "network", f'only no network can be enforced here, not {spec.network.mode!r}; use network="none"'
    if spec.gpu is not None:
        yield "gpu", "devices stay out of the sandbox; use a provider with GPUs"
    if spec.region is not None:
        yield "region", f"this machine is in no region, so not in {spec.region!r}; leave the region out"
    if spec.cpu > data.get("cpu", 0) or spec.memory > data.get("memory", 0):
        has = f"{data.get('cpu', 0)} vCPU and {data.get('memory', 0)} MiB"
        yield "size", f"this machine has {has}; {spec.cpu:g} vCPU and {spec.memory} MiB are asked for"
    if spec.ports:
        yield "ports", "there is no network in the sandbox; leave the ports out"
    if spec.user is not None:
        yield "user", "programs run as an unprivileged user of the sandbox's own; leave the user out"
    if spec.workdir is not None:
        yield "workdir", "the work area is always /work; leave workdir out"


def _environment_objections(spec: SandboxSpec, runtimes: dict[str, str]) -> Iterator[tuple[str, str]]:
    environment = spec.environment
    if environment.image is not None:
        yield "image", "images are not run here; name a language, or use a provider with images"
    if environment.requirements:
        yield "requirements", "packages are not installed here yet; use a provider that prepares environments"
    if environment.language is not None:
        for runtime in recipe_runtimes(environment.language):
            if runtime not in runtimes:
                package = _PACKAGES.get(runtime, runtime)
                place = f"{runtime} below /usr, where sandboxes see it"
                remedy = f"install {package} (for example `apt install {package}`)"
                yield "runtime-missing", f"{environment.language} needs {place}; {remedy}"


def _detail(facts: Facts) -> str:
    data = facts.data
    parts = [f"bwrap {data['bwrap']}", "seccomp" if data["seccomp"] else "NO seccomp on this machine"]
    parts.append(data["groups"] or "no cgroup, so memory is limited for each process only and CPU is not")
    if data["level"] == "namespaces-noproc":
        parts.append("no /proc")
    verified = ", ".join(data["verified"])
    return f"{data['level']} ({', '.join(parts)}); verified: {verified}; shared host kernel: a kernel bug escapes this"
