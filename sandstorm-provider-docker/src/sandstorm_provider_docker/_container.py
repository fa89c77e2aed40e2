"""What the daemon is asked to make, and whether it made that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandstorm.provider import Order
from sandstorm_provider_docker._scripts import MAIN_KEPT, MAIN_LEASHED, STATE

MIB = 1024 * 1024
USER = 1000
PIDS_MAX = 192
"""Processes and threads in a container, its own three included."""

_SCRATCH = 64
"""MiB of `/tmp`, of `/dev/shm` and of each volume that the image declares."""
_NO_LIMIT_NEEDED = 16384
"""Processes of a user over all containers: below the hard limit of a usual daemon, which may not be able to raise it."""

LABEL_MARKER = "sandstorm.marker"
LABEL_KEEP = "sandstorm.keep"


def create_body(order: Order, image: str, volumes: Mapping[str, Any], runtime: str | None) -> dict[str, Any]:
    """The body of `POST /containers/create`, as the Docker Engine API v1.41 describes it."""
    spec, offer = order.spec, order.offer
    options = dict(spec.provider_options.get("docker", {}))
    ports: dict[str, Any] = {f"{port}/tcp": {} for port in spec.ports}
    host = {
        "AutoRemove": True,
        "NetworkMode": "none" if spec.network.mode == "none" else "default",
        "PortBindings": {port: [{"HostIp": "127.0.0.1", "HostPort": ""}] for port in ports},
        "Memory": offer.memory * MIB,
        "MemorySwap": offer.memory * MIB,
        "NanoCpus": int(offer.cpu * 1_000_000_000),
        "PidsLimit": PIDS_MAX,
        "CapDrop": ["ALL"],
        "CapAdd": ["KILL"],
        "SecurityOpt": ["no-new-privileges"],
        "ReadonlyRootfs": True,
        "IpcMode": "private",
        "ShmSize": _SCRATCH * MIB,
        "Tmpfs": {
            **{path: _tmpfs(_SCRATCH, "exec") for path in volumes},
            "/tmp": _tmpfs(_SCRATCH, "exec"),  # noqa: S108 - the path in the container
            "/work": _tmpfs(offer.disk, "exec"),
            STATE: _tmpfs(1, "noexec"),
        },
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "nofile", "Soft": 1024, "Hard": 1024},
            {"Name": "nproc", "Soft": _NO_LIMIT_NEEDED, "Hard": _NO_LIMIT_NEEDED},
        ],
        "LogConfig": {"Type": "none"},
        **({"Runtime": runtime} if runtime else {}),
        **options.pop("HostConfig", {}),
    }
    return {
        "Image": image,
        "Entrypoint": ["/bin/sh"],
        "Cmd": ["-c", MAIN_KEPT if order.keep else MAIN_LEASHED, "sandstorm", str(max(1, int(order.lifetime)))],
        "User": "0:0",
        "WorkingDir": "/",
        "Env": [f"{name}={value}" for name, value in {"HOME": "/work", **spec.env}.items()],
        "Labels": {LABEL_MARKER: order.marker, LABEL_KEEP: "yes" if order.keep else "no"},
        "AttachStdin": not order.keep,
        "AttachStdout": not order.keep,
        "AttachStderr": not order.keep,
        "OpenStdin": not order.keep,
        "StdinOnce": not order.keep,
        "ExposedPorts": ports,
        "HostConfig": host,
        **options,
    }


def _tmpfs(size: int, mode: str) -> str:
    return f"rw,{mode},nosuid,nodev,size={size * MIB},mode=1777"


def unheld(order: Order, found: Mapping[str, str], runtime: str | None) -> list[str]:
    """What the container was to have and does not, as its own first process saw it."""
    if runtime == "runsc":
        return [] if "4.4.0" in found["kernel"] else ["it does not run on gVisor's kernel"]
    wrong = []
    if found.get("no_new_privs") != "1":
        wrong.append("programs could gain privileges")
    if found.get("seccomp") != "2":
        wrong.append("there is no system call filter")
    if found.get("memory") != str(order.offer.memory * MIB):
        wrong.append("its memory is not limited")
    if found.get("tasks") != str(PIDS_MAX):
        wrong.append("its processes are not limited")
    if order.spec.network.mode == "none" and found.get("interfaces") != "1":
        wrong.append("it has a network")
    return wrong
