"""The options become the values of the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sandstorm import Constraints, Gpu, InvalidInput, Network, SandboxSpec, Task
from sandstorm_cli._options import Asked, asked, environment, request_options, size


def ask(*args: str, stdin: bytes = b"") -> Asked:
    """What the options of `run` ask for."""
    found: list[Asked] = []

    @click.command()
    @request_options
    def command(as_json: bool, settings: str | None, **options: Any) -> None:
        found.append(asked(options))

    answer = CliRunner().invoke(command, list(args), input=stdin, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return found[0]


def test_defaults_are_those_of_the_core() -> None:
    """Without options every value has the default that the core gives it."""
    request = ask("-c", "1")
    assert request.task == Task(code="1", language="python")
    assert request.spec == SandboxSpec()
    assert request.constraints == Constraints()
    assert (request.strategy, request.tenant) == (None, "default")


def test_every_option(tmp_path: Path) -> None:
    """Each option lands in its field."""
    (tmp_path / "data").write_bytes(b"\0data")
    (tmp_path / "input").write_bytes(b"input")
    words = f"""
        --language bash --timeout 5 --output-limit 1KiB --stdin {tmp_path}/input --output a --output b --effects none
        --cpu 2 --memory 2GiB --disk 1.5GiB --gpu H100:2 --region eu --allow-host example.org --allow-cidr 10.0.0.0/8
        --isolation gvisor --env A=1=2 --secret KEY --file in={tmp_path}/data --port 80 --user me --workdir w --image i
        --requirement numpy --label team=x --idle-timeout 9 --provider-option e2b.a={{"b":1}} --provider-option e2b.c=null
        --max-cost 0.10 --max-latency 3 --only e2b --provider modal --exclude k8s --prefer e2b --regions eu --regions us
        --attestation SOC --strategy fastest --tenant acme -c CODE -- x --json
    """.split()
    request = ask(*words)
    assert request.task == Task(
        code="CODE", language="bash", args=("x", "--json"), timeout=5, output_limit=1024, stdin=b"input",
        outputs=("a", "b"), effects="none",
    )  # fmt: skip
    spec = request.spec
    assert (spec.cpu, spec.memory, spec.disk, spec.gpu, spec.region) == (2, 2048, 1536, Gpu(model="H100", count=2), "eu")
    assert spec.network == Network(mode="allow", hosts=("example.org",), cidrs=("10.0.0.0/8",))
    assert (spec.isolation, spec.env, spec.secrets, spec.files) == ("gvisor", {"A": "1=2"}, ("KEY",), {"in": b"\0data"})
    assert (spec.ports, spec.user, spec.workdir, spec.labels, spec.idle_timeout) == ((80,), "me", "w", {"team": "x"}, 9)
    assert (spec.environment.image, spec.environment.requirements) == ("i", ("numpy",))
    assert spec.provider_options == {"e2b": {"a": {"b": 1}, "c": None}}
    assert request.constraints == Constraints(
        max_cost="0.10", max_latency=3, only=("e2b", "modal"), exclude=("k8s",), prefer=("e2b",), regions=("eu", "us"),
        attestations=("SOC",),
    )  # fmt: skip
    assert (request.strategy, request.tenant) == ("fastest", "acme")


def test_every_field_has_an_option() -> None:
    """A field that the core adds to its values is noticed here."""

    @click.command()
    @request_options
    def command(**_: Any) -> None: ...

    options = {param.name for param in command.params}
    renamed = {"argv": "is_command", "args": "program", "environment": "image"}
    for cls in (Task, SandboxSpec, Constraints):
        for field in attrs.fields(cls):
            assert renamed.get(field.name, field.name) in options, field.name


@pytest.mark.parametrize(
    ("text", "count"), [("512", 512 << 20), ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5gib", 3 << 29), ("64 KiB", 64 << 10)]
)
def test_sizes(text: str, count: int) -> None:
    """Units are binary, and a bare number means MiB."""
    assert size("memory", text) == count


@given(st.text())
def test_any_size_is_a_number_or_bad_input(text: str) -> None:
    """Whatever the text is, it is a size or refused by name."""
    try:
        assert size("memory", text) >= 0
    except InvalidInput as exc:
        assert exc.field == "memory"


def test_requirements_are_those_of_python_unless_a_language_is_named() -> None:
    """`prepare` and `sandbox create` need no language for the packages of the default one."""
    options = {"image": None, "requirements": ("six",), "language": None}
    assert environment(options).language == "python"
    assert environment({**options, "language": "javascript"}).language == "javascript"
    assert environment({**options, "requirements": (), "image": "debian:12"}).language is None
