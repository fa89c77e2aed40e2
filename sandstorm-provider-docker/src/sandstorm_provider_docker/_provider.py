"""The containers of one daemon as a provider: what it offers, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
)

IMAGES: Mapping[str, str] = {
    "python": "docker.io/library/python:3.12-slim",
    "javascript": "docker.io/library/node:22-slim",
    "typescript": "docker.io/library/node:22-slim",
    "bash": "docker.io/library/debian:12-slim",
    "c": "docker.io/library/gcc:14",
    "cpp": "docker.io/library/gcc:14",
    "rust": "docker.io/library/rust:1-slim",
    "go": "docker.io/library/golang:1",
    "java": "docker.io/library/eclipse-temurin:21",
    "php": "docker.io/library/php:8-cli",
    "ruby": "docker.io/library/ruby:3-slim",
    "r": "docker.io/library/r-base:latest",
}
"""The image of each language. Source: the list of Docker official images; none was pulled by our tests."""

_LIFETIME = 86400.0
_COMMITTED = "assumed: a daemon on this machine commits a create before it answers, and lists what it committed"

_LATER = {
    "Reconnect": "output is not kept in the container for a second reader",
    "Gate": "a start that was not done cannot be ruled out for later",
    "Prepare": "images are used as they are; none is built",
    "OneShot": "a container is made first, and its program started in it",
    "Interpreter": "no state is kept between programs",
    "Watch": "the API has no file events",
    "Snapshot": "the files live in memory, which a commit of the container leaves out",
    "Fork": "the files live in memory, which a commit of the container leaves out",
    "Extend": "the lifetime is fixed when the container is made",
    "Metered": "use is not measured; nothing is charged for it",
    "NetworkRules": "a rule for single hosts is not enforced",
}
_NEVER = {"LiveRates": "no vendor charges for this machine", "Gpu": "devices stay out of the container"}
_PARTIAL = {
    "Pause": "a paused container outlives its lifetime until it is resumed or swept",
    "Detach": "what a program writes while nobody follows it is lost",
}


@attrs.frozen(kw_only=True)
class DockerProvider:
    """One daemon. `socket`, `images` and `runtime` are those of the settings."""

    name: str = "docker"
    socket: str | None = None
    images: Mapping[str, str] = IMAGES
    runtime: str | None = None
    traits: Traits = attrs.field(
        factory=lambda: Traits(
            marker="name",
            commit_lag=Figure(60.0, "the time after which an unanswered request is given up; the rest is assumed"),
            find_lag=Figure(0.0, _COMMITTED),
            by_invitation=True,
        )
    )
    rates: RateCard | None = attrs.field(
        factory=lambda: RateCard(source="this machine: no vendor charges for it", checked_at=date(2026, 11, 23), confidence="own")
    )

    def offers(self, spec: SandboxSpec, facts: Facts) -> Sequence[Offer | Declined]:
        """One offer of exactly the size asked for, or every reason why there is none."""
        reasons = _objections(spec, facts, self.images)
        declined = [Declined(provider=self.name, rule=rule, reason=reason) for rule, reason in reasons]
        return declined or [self._offer(spec, facts)]

    def connect(self) -> AbstractAsyncContextManager[Session]:
        """A session with the daemon. Raises `ProviderDown` where there is no socket."""
        from sandstorm_provider_docker._session import open_session

        return open_session(name=self.name, socket=self.socket, images=self.images, runtime=self.runtime)

    def _offer(self, spec: SandboxSpec, facts: Facts) -> Offer:
        return Offer(
            provider=self.name,
            cpu=spec.cpu,
            memory=spec.memory,
            disk=spec.disk,
            isolation=facts.data["level"],
            isolation_detail=facts.data["detail"],
            network=("none", "open"),
            abilities=_abilities(),
            lifetime=_LIFETIME,
            workdir="/work",
        )


def _abilities() -> dict[str, Support]:
    declared = dict.fromkeys(("Interactive", "Files", "Ports"), FULL)
    declared |= {name: Support("partial", reason) for name, reason in _PARTIAL.items()}
    declared |= {name: Support("not-implemented", reason) for name, reason in _LATER.items()}
    declared |= {name: Support("impossible", reason) for name, reason in _NEVER.items()}
    return {name: declared[name] for name in ABILITIES if name in declared}


def _objections(spec: SandboxSpec, facts: Facts, images: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each rule that forbids an offer, with its reason and remedy."""
    data = facts.data
    level = data.get("level")
    if level is None:
        yield "isolation-unavailable", data.get("remedy") or "the daemon was not asked yet; connect first"
    elif isolation_rank(spec.isolation) > isolation_rank(level):
        yield "isolation-floor", f"{spec.isolation} is asked for, and the containers give {level}; name another provider"
    yield from _environment_objections(spec, images)
    if spec.network.mode == "allow":
        yield "network", 'a container has all of the network or none; use network="none" or "open"'
    if spec.ports and spec.network.mode == "none":
        yield "ports", 'a port can only be published with a network; use network="open", or leave the ports out'
    if spec.gpu is not None:
        yield "gpu", "devices stay out of the container; use a provider with GPUs"
    if spec.region is not None:
        yield "region", f"the daemon is in no region, so not in {spec.region!r}; leave the region out"
    if spec.cpu > data.get("cpu", 0) or spec.memory > data.get("memory", 0):
        has = f"{data.get('cpu', 0)} vCPU and {data.get('memory', 0)} MiB"
        yield "size", f"the daemon's machine has {has}; {spec.cpu:g} vCPU and {spec.memory} MiB are asked for"
    if spec.user is not None:
        yield "user", "programs run as user 1000; leave the user out"
    if spec.workdir is not None:
        yield "workdir", "the work area is always /work; leave workdir out"
    if spec.idle_timeout is not None:
        yield "idle-timeout", "a container ends with its lifetime only; leave idle_timeout out"
    if spec.snapshot is not None:
        yield "snapshot", "snapshots are not made here; leave the snapshot out"


def _environment_objections(spec: SandboxSpec, images: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    environment = spec.environment
    if environment.requirements:
        yield "requirements", "packages are not installed here; name an image that has them"
    if environment.image is None and environment.language is not None and environment.language not in images:
        remedy = f"name one in [plugins.docker.images] as {environment.language} = ..., or in the environment"
        yield "image-unknown", f"no image is known for {environment.language}; {remedy}"
    if environment.image is None and environment.language is None and "bash" not in images:
        yield "image-unknown", "no image is known for commands; name one in the environment"
