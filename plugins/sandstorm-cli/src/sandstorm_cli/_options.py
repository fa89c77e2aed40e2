"""The options that say what to run, where it may go and at what cost, and what they ask for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import click

from sandstorm import Constraints, Environment, Gpu, InvalidInput, Network, SandboxSpec, Task
from sandstorm.provider import ISOLATION_LEVELS
from sandstorm_cli._flags import json_option, settings_option

_Command = TypeVar("_Command", bound=Callable[..., Any])

DEFAULT_LANGUAGE = "python"

_UNITS = {"": 0, "b": 0, "kib": 1, "mib": 2, "gib": 3, "tib": 4}

_DURATIONS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

_LANGUAGE = click.option("--language", metavar="NAME", help="The language whose runtime it needs, such as python.")

_PROGRAM = (
    click.argument("program", nargs=-1, metavar="[FILE | -] [-- ARGS]"),
    click.option("-c", "--code", metavar="CODE", help="The program itself, instead of FILE."),
    click.option("--exec", "is_command", is_flag=True, help="What follows is a command with its arguments, and no FILE."),
    click.option("--language", metavar="NAME", help="Language of the program; else told by the file name, else python."),
    click.option("--timeout", type=float, metavar="SECONDS", help="Kill the program after so long (300)."),
    click.option("--output-limit", metavar="SIZE", help="Kill it once it wrote so much (16MiB)."),
    click.option("--stdin", metavar="FILE|-", help="What the program reads; nothing if left out."),
    click.option("--output", "outputs", multiple=True, metavar="PATH", help="A file to bring back; repeatable."),
    click.option("--key", metavar="TEXT", help="Of the runs with one key one is started; the others give its result."),
    click.option("--effects", metavar="KIND", help="Does running it twice matter: unknown, idempotent or none."),
)

_ENVIRONMENT = (
    click.option("--image", metavar="REF", help="An OCI image."),
    click.option("--requirement", "requirements", multiple=True, metavar="PACKAGE", help="Such as numpy==2.1; repeatable."),
)

_MACHINE = (
    click.option("--cpu", type=float, metavar="VCPU", help="vCPU (1)."),
    click.option("--memory", metavar="SIZE", help="Such as 512MiB, 2GiB, or 512 for MiB (512MiB)."),
    click.option("--disk", metavar="SIZE", help="Writable space in the work area (512MiB)."),
    click.option("--gpu", metavar="MODEL[:N]", help="Accelerators, such as H100:2."),
    click.option("--region", metavar="NAME", help="The one region that will do."),
    click.option("--network", type=click.Choice(["none", "open"]), help="What the program may reach (none)."),
    click.option("--allow-host", "hosts", multiple=True, metavar="HOST", help="Only the listed hosts; repeatable."),
    click.option("--allow-cidr", "cidrs", multiple=True, metavar="BLOCK", help="Only the listed blocks; repeatable."),
    click.option("--isolation", type=click.Choice(ISOLATION_LEVELS), metavar="LEVEL", help="The weakest level that will do."),
    click.option("--env", multiple=True, metavar="NAME=VALUE", help="An environment variable; repeatable."),
    click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret as environment variable; repeatable."),
    click.option("--file", "files", multiple=True, metavar="REMOTE=LOCAL", help="A file to put there; repeatable."),
    click.option("--port", "ports", type=int, multiple=True, metavar="N", help="A TCP port it listens on; repeatable."),
    click.option("--user", metavar="NAME", help="The user to run as."),
    click.option("--workdir", metavar="PATH", help="The working directory."),
    *_ENVIRONMENT,
    click.option("--snapshot", metavar="NAME", help="A snapshot whose files are there first, such as local/ss-1a2b."),
    click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="For the ledger and policies; repeatable."),
    click.option("--idle-timeout", type=float, metavar="SECONDS", help="It may end after so long without activity."),
    click.option(
        "--provider-option", "provider_options", multiple=True, metavar="PROVIDER.KEY=JSON", help="Passed through; repeatable."
    ),
)

_LIMITS = (
    click.option("--max-cost", metavar="USD", help="The most that the run may cost, such as 0.10."),
    click.option("--max-latency", type=float, metavar="SECONDS", help="The longest predicted start (p95)."),
    click.option("--only", "--provider", "only", multiple=True, metavar="NAME", help="Use only these providers; repeatable."),
    click.option("--exclude", multiple=True, metavar="NAME", help="Use any but these; repeatable."),
    click.option("--prefer", multiple=True, metavar="NAME", help="Try these first; failover stays on; repeatable."),
    click.option("--pin", metavar="NAME", help="Use this account and no other, without failover."),
    click.option("--regions", multiple=True, metavar="NAME", help="A region that will do; repeatable."),
    click.option("--attestation", "attestations", multiple=True, metavar="NAME", help="One it must have; repeatable."),
    click.option("--strategy", metavar="NAME", help="How candidates are ranked (cheapest)."),
    click.option("--tenant", default="default", metavar="NAME", help="A label for whom this runs."),
)


def request_options(command: _Command) -> _Command:
    """Adds every option that says what to run, on which machine and within which limits."""
    return _with(command, (*_PROGRAM, *_MACHINE, *_LIMITS, settings_option, json_option))


def machine_options(command: _Command) -> _Command:
    """Adds every option that says on which machine and within which limits, without a program."""
    return _with(command, (_LANGUAGE, *_MACHINE, *_LIMITS, settings_option, json_option))


def environment_options(command: _Command) -> _Command:
    """Adds the options that say which environment is wanted, and where."""
    return _with(command, (_LANGUAGE, *_ENVIRONMENT, *_LIMITS, settings_option, json_option))


def _with(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


@attrs.frozen(kw_only=True)
class Asked:
    """What the command line asks for.

    Attributes:
        task: What to run. Its language is the default one while `guess` is set.
        spec: The machine wanted.
        constraints: What it may cost, and where it may go.
        guess: The file name that may tell the language, or None where the language is settled.
        strategy: The name of the strategy, or None for the one of the settings.
        tenant: For whom it runs.
        key: Its idempotency key, or None.
    """

    task: Task
    spec: SandboxSpec
    constraints: Constraints
    guess: str | None
    strategy: str | None
    tenant: str
    key: str | None

    def in_language(self, language: str | None) -> Task:
        """The task in the language that the file name told; the default one for None."""
        return attrs.evolve(self.task, language=language) if language and self.guess else self.task


def asked(given: Mapping[str, Any]) -> Asked:
    """What the options ask for. Raises `InvalidInput`, which names the option's field; reads the files that are named."""
    _refuse_two_readers(given)
    task, guess = _task(given)
    return Asked(
        task=task,
        spec=_spec(given),
        constraints=_constraints(given),
        guess=guess,
        strategy=given["strategy"],
        tenant=given["tenant"],
        key=given["key"],
    )


def machine(given: Mapping[str, Any]) -> SandboxSpec:
    """The machine that `machine_options` ask for. Raises `InvalidInput`; reads the files that are named."""
    spec = _spec(given)
    return attrs.evolve(spec, environment=attrs.evolve(spec.environment, language=_language(given)))


def environment(given: Mapping[str, Any]) -> Environment:
    """The environment that `environment_options` ask for. Raises `InvalidInput`."""
    return Environment(image=given["image"], requirements=given["requirements"], language=_language(given))


def _language(given: Mapping[str, Any]) -> str | None:
    """The language of the environment: requirements are those of the default one where no other is named."""
    language: str | None = given["language"]
    return language or (DEFAULT_LANGUAGE if given["requirements"] else None)


def where(given: Mapping[str, Any]) -> dict[str, Any]:
    """Where it may go and for whom, as arguments of the client. Raises `InvalidInput`."""
    return {"constraints": _constraints(given), "strategy": given["strategy"], "tenant": given["tenant"]}


def _constraints(given: Mapping[str, Any]) -> Constraints:
    return Constraints(**_present(given, [field.name for field in attrs.fields(Constraints)]))


def _refuse_two_readers(given: Mapping[str, Any]) -> None:
    if given["stdin"] == "-" and given["code"] is None and not given["is_command"] and given["program"][:1] == ("-",):
        raise InvalidInput("stdin", "a file, since the program itself is read from standard input", "-")


def _task(given: Mapping[str, Any]) -> tuple[Task, str | None]:
    rest: tuple[str, ...] = given["program"]
    settled = _present(given, ["timeout", "outputs", "effects"])
    if given["output_limit"] is not None:
        settled["output_limit"] = size("output_limit", given["output_limit"], plain="b")
    if given["stdin"] is not None:
        settled["stdin"] = _read("stdin", given["stdin"])
    if given["is_command"]:
        if given["code"] is not None or given["language"] is not None:
            raise InvalidInput("exec", "neither --code nor --language beside it", list(rest))
        if not rest:
            raise InvalidInput("exec", "a command after --exec", None)
        return Task(argv=rest, **settled), None
    language = given["language"]
    if given["code"] is not None:
        return Task(code=given["code"], language=language or DEFAULT_LANGUAGE, args=rest, **settled), None
    if not rest:
        raise InvalidInput("FILE", "a file, - for standard input, or -c CODE", None)
    path, *args = rest
    code = _text("FILE", path)
    task = Task(code=code, language=language or DEFAULT_LANGUAGE, args=args, **settled)
    return task, None if language or path == "-" else path


def _spec(given: Mapping[str, Any]) -> SandboxSpec:
    settled = _present(
        given, ["cpu", "region", "network", "isolation", "secrets", "ports", "user", "workdir", "idle_timeout", "snapshot"]
    )
    settled |= {name: size(name, given[name]) // 2**20 for name in ("memory", "disk") if given[name] is not None}
    if given["gpu"] is not None:
        settled["gpu"] = _gpu(given["gpu"])
    if given["hosts"] or given["cidrs"]:
        if given["network"] is not None:
            raise InvalidInput("network", "no --network beside --allow-host or --allow-cidr", given["network"])
        settled["network"] = Network(mode="allow", hosts=given["hosts"], cidrs=given["cidrs"])
    settled |= {name: dict(pairs(name, given[name])) for name in ("env", "labels") if given[name]}
    if given["files"]:
        settled["files"] = {
            remote: _read(f"files.{remote}", local) for remote, local in pairs("files", given["files"], "REMOTE=LOCAL")
        }
    if given["image"] or given["requirements"]:
        settled["environment"] = Environment(image=given["image"], requirements=given["requirements"])
    if given["provider_options"]:
        settled["provider_options"] = _provider_options(given["provider_options"])
    return SandboxSpec(**settled)


def _present(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, so that the values keep the defaults of the core."""
    return {name: given[name] for name in names if given[name] not in (None, ())}


def size(field: str, text: str, *, plain: str = "mib") -> int:
    """Bytes for `512`, `512MiB` or `1.5GiB`; a bare number counts in the unit `plain`. Raises `InvalidInput`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    unit = (match[2] or plain) if match else None
    if match is None or unit not in _UNITS:
        raise InvalidInput(field, "a size such as 512MiB or 2GiB", text)
    return int(float(match[1]) * 1024 ** _UNITS[unit])


def duration(field: str, text: str) -> float:
    """Seconds for `30s`, `10m`, `2h`, `1d` or a bare number of seconds. Raises `InvalidInput`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    seconds = float(match[1]) * _DURATIONS.get(match[2], 0) if match else 0.0
    if not seconds:
        raise InvalidInput(field, "a duration above 0, such as 30s, 10m, 2h or 1d", text)
    return seconds


def _gpu(text: str) -> Gpu:
    model, colon, count = text.partition(":")
    if colon and not (count.isascii() and count.isdigit() and len(count) < 5):
        raise InvalidInput("gpu", "MODEL or MODEL:N, such as H100:2", text)
    try:
        return Gpu(model=model, count=int(count) if colon else 1)
    except InvalidInput as exc:
        raise exc.below("gpu") from exc


def pairs(field: str, texts: Iterable[str], shape: str = "NAME=VALUE") -> Iterable[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(field, shape, text)
        yield name, value


def _provider_options(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, value in pairs("provider_options", texts, "PROVIDER.KEY=JSON"):
        provider, dot, key = name.partition(".")
        if not (provider and dot and key):
            raise InvalidInput("provider_options", "PROVIDER.KEY=JSON", name)
        try:
            found.setdefault(provider, {})[key] = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidInput(f"provider_options.{name}", "a JSON value (a text needs its double quotes)", value) from None
    return found


def _read(field: str, path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise InvalidInput(field, f"a file that can be read ({reason})", path) from exc


def _text(field: str, path: str) -> str:
    try:
        return _read(field, path).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InvalidInput(field, "source text in UTF-8", path) from exc
