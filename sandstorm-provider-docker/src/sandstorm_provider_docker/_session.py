"""A session with a daemon: what it can do, and the containers that are made by it."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any

import trio

from sandstorm.provider import (
    Facts,
    InvalidInput,
    InvalidSpec,
    Marker,
    Order,
    PreparationFailed,
    ProviderDown,
    ResourceInfo,
    Sandbox,
    SandboxGone,
    SandboxLost,
    check_dispatch,
)
from sandstorm_provider_docker._agent import Agent
from sandstorm_provider_docker._container import LABEL_MARKER, MIB, create_body, unheld
from sandstorm_provider_docker._daemon import Daemon
from sandstorm_provider_docker._sandbox import DockerSandbox, remove_container
from sandstorm_provider_docker._scripts import KEEP_SECRETS
from sandstorm_provider_docker._socket import socket_path

_PULL = 900.0
_CLEANUP = 30.0
_NEEDED = {"MemoryLimit": "memory", "PidsLimit": "processes", "CpuCfsQuota": "CPU"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_CALLERS_FAULT = ("manifest unknown", "not found", "does not exist", "invalid reference", "access to the resource is denied")


@asynccontextmanager
async def open_session(
    *, name: str, socket: str | None, images: Mapping[str, str], runtime: str | None
) -> AsyncIterator[DockerSession]:
    """A session; at its end the containers that were not ordered to be kept are removed."""
    daemon = Daemon(socket_path(socket))
    failed: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            session = DockerSession(name, daemon, images, runtime, nursery)
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
        with trio.CancelScope(shield=True):
            await daemon.close()


class DockerSession:
    """A daemon as a connected account."""

    def __init__(self, name: str, daemon: Daemon, images: Mapping[str, str], runtime: str | None, nursery: trio.Nursery) -> None:
        self._name = name
        self._daemon = daemon
        self._images = images
        self._runtime = runtime
        self._nursery = nursery
        self._live: dict[str, DockerSandbox] = {}
        self._leashed: set[str] = set()
        self._negotiated = False

    # --- what it can do -----------------------------------------------------------------------------------

    async def refresh(self) -> Facts:
        """What offers rest on: the daemon's version, limits, runtimes and size. Every container is verified when it is made."""
        version = await self._negotiate()
        info: dict[str, Any] = await self._daemon.call("GET", "/info")
        missing = [meaning for field, meaning in _NEEDED.items() if not info.get(field)]
        remedy = ""
        if missing:
            remedy = f"the daemon cannot limit {', '.join(missing)}: run it as root, or with delegated control groups (version 2)"
        if self._runtime is not None and self._runtime not in (info.get("Runtimes") or {}):
            known = ", ".join(sorted(info.get("Runtimes") or {}))
            remedy = f"the daemon has no runtime {self._runtime!r}, only {known}: set runtime in [plugins.docker]"
        level = "gvisor" if self._runtime == "runsc" else "container"
        data = {
            "level": None if remedy else level,
            "remedy": remedy,
            "detail": _detail(level, version, info, self._runtime),
            "cpu": info.get("NCPU", 0),
            "memory": int(info.get("MemTotal", 0)) // MIB,
        }
        return Facts(data=data, at=time.time(), ttl=0.0)

    async def check(self) -> None:
        """Raises `ProviderDown`, with the remedy, where no container can be made as it has to be."""
        facts = await self.refresh()
        if facts.data["level"] is None:
            raise ProviderDown(facts.data["remedy"])

    async def _negotiate(self) -> dict[str, Any]:
        self._negotiated = True
        return await self._daemon.negotiate()

    # --- sandboxes ----------------------------------------------------------------------------------------

    async def create(self, order: Order) -> Sandbox:
        """A container that is confined as its offer says, which was looked at from within. Raises `Conflict` for a marker taken."""
        if not self._negotiated:
            await self._negotiate()
        secrets = _exports(order.secrets)
        image = self._image(order)
        volumes = await self._volumes(image)
        body = create_body(order, image, volumes, self._runtime)
        check_dispatch(order, trio.current_time())
        made = await self._daemon.call("POST", "/containers/create", body, name=order.marker)
        try:
            sandbox = await self._begin(made["Id"], order)
            if order.spec.files:
                await sandbox.unpack(order.spec.files)
            if secrets:
                await sandbox.keep(KEEP_SECRETS, secrets)
        except BaseException:
            await self._discard(made["Id"])
            raise
        return sandbox

    async def _begin(self, container: str, order: Order) -> DockerSandbox:
        agent = None
        if not order.keep:
            # Attached before it starts, so that there is no moment in which it could outlive this connection.
            query = {"stream": "1", "stdin": "1", "stdout": "1", "stderr": "1"}
            stream = await self._daemon.upgraded(f"/containers/{container}/attach", None, terminal=False, **query)
            agent = Agent(stream)
        sandbox = DockerSandbox(self._daemon, container, agent, self._nursery, self._forget)
        self._live[container] = sandbox
        if not order.keep:
            self._leashed.add(container)
        await self._daemon.call("POST", f"/containers/{container}/start")
        try:
            found = await sandbox.greet()
        except (SandboxLost, SandboxGone) as exc:
            raise InvalidSpec(f"the image cannot be used, since /bin/sh does not run in it as it should: {exc}") from exc
        wrong = unheld(order, found, self._runtime)
        if wrong:
            raise ProviderDown(f"the container is not confined as it was asked to be: {', '.join(wrong)}")
        return sandbox

    async def _discard(self, container: str) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_CLEANUP):
            sandbox = self._live.get(container)
            if sandbox is not None:
                await sandbox.destroy()
            else:
                await remove_container(self._daemon, container)

    async def attach(self, sandbox_id: str) -> Sandbox:
        """An existing container by its id. Raises `SandboxGone`."""
        known = self._live.get(sandbox_id)
        if known is not None:
            return known
        if not self._negotiated:
            await self._negotiate()
        found = await self._daemon.call("GET", f"/containers/{sandbox_id}/json")
        if LABEL_MARKER not in (found["Config"].get("Labels") or {}):
            raise SandboxGone(f"the container {sandbox_id} is not one of ours")
        sandbox = DockerSandbox(self._daemon, found["Id"], None, self._nursery, self._forget)
        self._live[found["Id"]] = sandbox
        return sandbox

    def find(self, marker: Marker | None = None) -> AbstractAsyncContextManager[AsyncIterator[ResourceInfo]]:
        """Every container of ours that the daemon has, of whichever router, or the one with this marker."""
        return self._find(marker)

    @asynccontextmanager
    async def _find(self, marker: Marker | None) -> AsyncIterator[AsyncIterator[ResourceInfo]]:
        if not self._negotiated:
            await self._negotiate()
        label = LABEL_MARKER if marker is None else f"{LABEL_MARKER}={marker}"
        filters = json.dumps({"label": [label]})
        listed: list[dict[str, Any]] = await self._daemon.call("GET", "/containers/json", None, all="true", filters=filters)

        async def found() -> AsyncIterator[ResourceInfo]:
            for each in listed:
                await trio.lowlevel.checkpoint()
                yield ResourceInfo(
                    id=each["Id"],
                    marker=each["Labels"].get(LABEL_MARKER),
                    state=each["State"],
                    created_at=_seconds(each.get("Created")),
                )

        yield found()

    # --- images -------------------------------------------------------------------------------------------

    def _image(self, order: Order) -> str:
        environment = order.spec.environment
        image = environment.image or self._images.get(environment.language or "bash")
        if image is None:
            raise InvalidSpec(f"no image is known for {environment.language or 'commands'}")
        return image

    async def _volumes(self, image: str) -> Mapping[str, Any]:
        """The volumes that the image declares; it is pulled where it is not there."""
        try:
            found = await self._daemon.call("GET", f"/images/{image}/json")
        except (InvalidSpec, SandboxGone):
            problem = await self._daemon.pull(image, _PULL)
            if problem is not None:
                fault = "caller" if any(words in problem.lower() for words in _CALLERS_FAULT) else "provider"
                raise PreparationFailed(f"{image} could not be pulled: {problem}", fault=fault) from None
            found = await self._daemon.call("GET", f"/images/{image}/json")
        return (found.get("Config") or {}).get("Volumes") or {}

    # --- its end ------------------------------------------------------------------------------------------

    def _forget(self, container: str) -> None:
        self._live.pop(container, None)
        self._leashed.discard(container)

    async def close(self) -> None:
        """Removes the containers of this session that are not to be kept; shielded and bounded."""
        with trio.CancelScope(shield=True):
            for container, sandbox in list(self._live.items()):
                with trio.move_on_after(_CLEANUP):
                    try:
                        if container in self._leashed:
                            await sandbox.destroy()
                    except Exception:  # noqa: S110 - the leash below ends it all the same
                        pass
                    await sandbox.leave()


def _exports(secrets: Mapping[str, str]) -> bytes:
    """The secrets as a shell script that exports them."""
    for name in secrets:
        if not _NAME.match(name):
            raise InvalidInput("secrets", "names of letters, digits and underscores", name)
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items()).encode()


def _seconds(created: Any) -> float | None:
    """Docker says seconds; podman has said RFC 3339 in some versions."""
    if isinstance(created, (int, float)):
        return float(created)
    return datetime.fromisoformat(created).timestamp() if isinstance(created, str) else None


def _detail(level: str, version: Mapping[str, Any], info: Mapping[str, Any], runtime: str | None) -> str:
    components = [part.get("Name", "") for part in version.get("Components") or ()]
    engine = "podman" if any("podman" in name.lower() for name in components) else "docker"
    rootless = any("rootless" in option for option in info.get("SecurityOptions") or ())
    parts = [
        f"{engine} {version.get('Version', '?')}",
        f"{runtime or info.get('DefaultRuntime', '?')} runtime",
        "rootless" if rootless else "the daemon is root",
        f"cgroup v{info.get('CgroupVersion', '?')}",
    ]
    kernel = "gVisor's kernel" if level == "gvisor" else "shared host kernel: a kernel bug escapes this"
    return f"{level} ({', '.join(parts)}); limits and privileges are looked at from within each container; {kernel}"
