"""The machine wanted."""

from __future__ import annotations

from typing import Any

import attrs

from sandstorm._check import data, number, one_of, table, text, texts, whole
from sandstorm._errors import InvalidInput

ISOLATION_LEVELS = (
    "none",
    "process",
    "namespaces-noproc",
    "namespaces",
    "namespaces+cgroup",
    "container",
    "gvisor",
    "microvm",
)
"""Isolation, weakest first. All up to `container` share the kernel of their host."""


def isolation_rank(level: str) -> int:
    """Where `level` stands on the ladder; a higher rank isolates more."""
    return ISOLATION_LEVELS.index(level)


def _cidrs(field: str) -> Any:
    def convert(value: Any) -> tuple[str, ...]:
        from ipaddress import ip_network

        blocks: tuple[str, ...] = texts(field, "a list of address blocks")(value)
        for block in blocks:
            try:
                ip_network(block)
            except ValueError:
                raise InvalidInput(field, 'address blocks such as "10.0.0.0/8"', block) from None
        return blocks

    return convert


@attrs.frozen(kw_only=True)
class Network:
    """What the program may reach.

    Attributes:
        mode: `none` (the default), `open`, or `allow` for the listed hosts and blocks only.
        hosts: Host names that may be reached, with mode `allow`.
        cidrs: Address blocks that may be reached, with mode `allow`.
    """

    mode: str = attrs.field(default="none", converter=one_of("mode", "none", "open", "allow"))
    hosts: tuple[str, ...] = attrs.field(default=(), converter=texts("hosts", "a list of host names"))
    cidrs: tuple[str, ...] = attrs.field(default=(), converter=_cidrs("cidrs"))

    def __attrs_post_init__(self) -> None:
        listed = bool(self.hosts or self.cidrs)
        if self.mode == "allow" and not listed:
            raise InvalidInput("hosts", 'at least one host or address block with mode "allow"', self.hosts)
        if self.mode != "allow" and listed:
            raise InvalidInput("mode", '"allow" where hosts or address blocks are listed', self.mode)


def _network(value: Any) -> Network:
    if isinstance(value, Network):
        return value
    if isinstance(value, str):
        try:
            return Network(mode=value)
        except InvalidInput as exc:
            raise InvalidInput("network", '"none", "open" or a table with hosts or cidrs', value) from exc
    raise InvalidInput("network", '"none", "open" or a table with hosts or cidrs', value)


@attrs.frozen(kw_only=True)
class Gpu:
    """Accelerators wanted.

    Attributes:
        model: The vendor-neutral name, such as `H100`.
        count: How many of them.
    """

    model: str = attrs.field(converter=text("model", "the name of a GPU, such as H100", filled=True))
    count: int = attrs.field(default=1, converter=whole("count", "a whole number of GPUs, at least 1", low=1))


@attrs.frozen(kw_only=True)
class Environment:
    """What is installed in the sandbox: an image, or a language plus requirements.

    Attributes:
        image: An OCI image reference.
        language: A language whose runtime is needed. Filled in from the task where it is left out.
        requirements: Packages in the language's own notation, such as `numpy==2.1`.
    """

    image: str | None = attrs.field(default=None, converter=text("image", "an image reference", optional=True, filled=True))
    language: str | None = attrs.field(default=None, converter=text("language", "a language", optional=True, filled=True))
    requirements: tuple[str, ...] = attrs.field(default=(), converter=texts("requirements", "a list of packages"))


def _instance(field: str, kind: type, expected: str, *, optional: bool = False) -> Any:
    def convert(value: Any) -> Any:
        if isinstance(value, kind) or (value is None and optional):
            return value
        raise InvalidInput(field, expected, value)

    return convert


def _port(value: Any) -> tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        ports = tuple(value)
        if all(type(port) is int and 1 <= port <= 65535 for port in ports):
            return ports
    raise InvalidInput("ports", "a list of whole numbers from 1 to 65535", value)


def _options(where: str, value: Any) -> dict[str, Any]:
    return table(where)(value)


def _path_of_file(where: str, value: Any) -> bytes:
    contents: bytes = data(where)(value)
    return contents


@attrs.frozen(kw_only=True)
class SandboxSpec:
    """The machine wanted. Everything has a default; an offer may be larger, never smaller.

    Attributes:
        cpu: vCPU (a hyperthread; a physical core is 2).
        memory: MiB.
        disk: MiB of writable space in the work area.
        gpu: Accelerators, or None.
        region: The provider's name of a region, or None for any.
        network: `"none"` (the default), `"open"`, or a `Network` with hosts and address blocks.
        isolation: The weakest level of `ISOLATION_LEVELS` that will do.
        env: Environment variables of every program.
        secrets: Names of secrets that become environment variables; never their values.
        files: Relative paths in the work area and their contents, put there before the program starts.
        ports: TCP ports that the program will listen on.
        user: The user to run as, where a provider lets one choose.
        workdir: The working directory, where a provider lets one choose.
        idle_timeout: Seconds without activity after which the sandbox may end; None for the provider's own.
        labels: Labels for the ledger and for policies.
        environment: What is installed.
        snapshot: The snapshot whose files are in the work area first, as `account/id`; only that account can do it.
        provider_options: Per provider name, options that are passed to its create call untouched.
    """

    cpu: float = attrs.field(default=1.0, converter=number("cpu", "a number of vCPU above 0", above=True))
    memory: int = attrs.field(default=512, converter=whole("memory", "a whole number of MiB, at least 16", low=16))
    disk: int = attrs.field(default=512, converter=whole("disk", "a whole number of MiB, at least 1", low=1))
    gpu: Gpu | None = attrs.field(default=None, converter=_instance("gpu", Gpu, "a Gpu", optional=True))
    region: str | None = attrs.field(default=None, converter=text("region", "the name of a region", optional=True, filled=True))
    network: Network = attrs.field(factory=Network, converter=_network)
    isolation: str = attrs.field(default="namespaces-noproc", converter=one_of("isolation", *ISOLATION_LEVELS))
    env: dict[str, str] = attrs.field(factory=dict, converter=table("env", lambda where, value: text(where)(value)))
    secrets: tuple[str, ...] = attrs.field(default=(), converter=texts("secrets", "a list of names of secrets"))
    files: dict[str, bytes] = attrs.field(factory=dict, converter=table("files", _path_of_file))
    ports: tuple[int, ...] = attrs.field(default=(), converter=_port)
    user: str | None = attrs.field(default=None, converter=text("user", "a user name", optional=True, filled=True))
    workdir: str | None = attrs.field(default=None, converter=text("workdir", "a path", optional=True, filled=True))
    idle_timeout: float | None = attrs.field(
        default=None, converter=number("idle_timeout", "a number of seconds above 0", above=True, optional=True)
    )
    labels: dict[str, str] = attrs.field(factory=dict, converter=table("labels", lambda where, value: text(where)(value)))
    environment: Environment = attrs.field(factory=Environment, converter=_instance("environment", Environment, "an Environment"))
    snapshot: str | None = attrs.field(
        default=None, converter=text("snapshot", "the name of a snapshot", optional=True, filled=True)
    )
    provider_options: dict[str, dict[str, Any]] = attrs.field(factory=dict, converter=table("provider_options", _options))

    def __attrs_post_init__(self) -> None:
        for name in self.env:
            if "=" in name:
                raise InvalidInput("env", "names without '='", name)
        for path in self.files:
            refuse_escape("files", path)


def snapshot_account(snapshot: str) -> str:
    """The account that made a snapshot, which is named `account/id`."""
    return snapshot.partition("/")[0]


def own_snapshot(spec: SandboxSpec) -> SandboxSpec:
    """The spec as its account's adapter sees it: the snapshot by the vendor's id alone."""
    return spec if spec.snapshot is None else attrs.evolve(spec, snapshot=spec.snapshot.partition("/")[2])


def refuse_escape(field: str, path: str) -> None:
    """Raises `InvalidInput` unless `path` is relative and stays inside the work area."""
    parts = path.split("/")
    if not path or path.startswith("/") or ".." in parts or "\0" in path or not any(part not in ("", ".") for part in parts):
        raise InvalidInput(field, "a relative path that stays in the work area", path)
