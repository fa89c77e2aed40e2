"""Values to JSON and back, and what bad input says."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandstorm._constraints import Constraints
from sandstorm._converter import MAX_DEPTH, decode, encode, from_json, to_json
from sandstorm._errors import InvalidInput
from sandstorm._offer import Facts, Offer, RateCard
from sandstorm._plan import Plan, Request
from sandstorm._result import Artifact, Exit, Outcome, RunResult
from sandstorm._spec import Gpu, Network, SandboxSpec
from sandstorm._task import Task

CLASSES = (SandboxSpec, Task, Constraints, Request, Plan, RunResult, Offer, Facts, RateCard, Exit, Artifact)

slow_to_draw = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(strategies.values)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_value_survives_json(value: Any) -> None:
    """Decoding what was encoded gives an equal value, and the text is standard JSON."""
    assert from_json(type(value), to_json(value)) == value


@given(strategies.plans)
@slow_to_draw
def test_a_plan_survives_json(plan: Plan) -> None:
    """A plan can be stored and replayed."""
    assert from_json(Plan, to_json(plan)) == plan


@given(strategies.results)
@slow_to_draw
def test_a_result_survives_json(result: RunResult) -> None:
    """A result is stored with its plan, exact bytes included."""
    assert from_json(RunResult, to_json(result)) == result


def _keys_of(cls: type[Any]) -> st.SearchStrategy[str]:
    return st.sampled_from([field.name for field in attrs.fields(cls)]) | st.text(max_size=5)


@given(
    st.sampled_from(CLASSES).flatmap(
        lambda cls: st.tuples(
            st.just(cls),
            strategies.json_values | st.dictionaries(_keys_of(cls), strategies.json_values, max_size=6),
        )
    )
)
@settings(max_examples=300, deadline=None)
def test_whatever_json_is_fed_only_invalid_input_is_raised(case: tuple[type[Any], Any]) -> None:
    """The decoder answers with a value or one located line, never with another exception."""
    cls, data = case
    try:
        value = from_json(cls, json.dumps(data))
    except InvalidInput as exc:
        assert exc.field
        assert len(str(exc).splitlines()) == 1
    else:
        assert isinstance(value, cls)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_one_wrong_key_in_a_right_request_is_located(draw: st.DataObject) -> None:
    """Replacing one value of a valid request by something else is refused at that key or below it, or accepted."""
    data = encode(draw.draw(strategies.requests))
    key = draw.draw(st.sampled_from(sorted(data)))
    data[key] = draw.draw(strategies.json_values)
    try:
        decode(Request, data, "request")
    except InvalidInput as exc:
        assert exc.field.startswith(f"request.{key}")


@given(st.text(max_size=30) | st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "NaN", "1" * 5000, '"\\ud800"', ""]))
@settings(deadline=None)
def test_text_that_is_no_json_is_invalid_input(text: str) -> None:
    """Broken, endless or hostile JSON text is refused in one line."""
    with pytest.raises(InvalidInput) as caught:
        from_json(Task, text, "task")
    assert caught.value.field.startswith("task")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "data", "line"),
    [
        (SandboxSpec, {"cpuu": 1}, "in.cpuu: expected a key that exists (did you mean 'cpu'?), got 'cpuu'"),
        (SandboxSpec, {"gpu": {"count": 1}}, "in.gpu.model: expected a value, since there is no default, got None"),
        (SandboxSpec, {"cpu": "1"}, "in.cpu: expected a number of vCPU above 0, got '1'"),
        (SandboxSpec, {"memory": True}, "in.memory: expected a whole number of MiB, at least 16, got True"),
        (SandboxSpec, {"memory": 64.0}, "in.memory: expected a whole number of MiB, at least 16, got 64.0"),
        (SandboxSpec, {"network": {"mode": "allow", "hosts": ["a", "b", 3]}}, "in.network.hosts[2]: expected text, got 3"),
        (
            SandboxSpec,
            {"network": {"hosts": ["a"]}},
            "in.network.mode: expected \"allow\" where hosts or address blocks are listed, got 'none'",
        ),
        (SandboxSpec, {"files": {"../x": "y"}}, "in.files: expected a relative path that stays in the work area, got '../x'"),
        (SandboxSpec, {"files": {"a b": 1}}, """in.files['a b']: expected text, or {"base64": "..."}, got 1"""),
        (SandboxSpec, {"env": {"A": 1}}, "in.env.A: expected text, got 1"),
        (Task, {"code": "x", "language": "python", "timeout": -1}, "in.timeout: expected a number of seconds above 0, got -1.0"),
        (Task, {"argv": "ls"}, "in.argv: expected a list of arguments, got 'ls'"),
        (Constraints, {"max_cost": "cheap"}, "in.max_cost: expected an amount in US dollars such as \"0.10\", got 'cheap'"),
        (Exit, {"kind": "gone"}, "in.kind: expected one of exited, signal, deadline, out-of-memory, output-limit,"),
        (Task, [], "in: expected a table of keys and values, got []"),
    ],
)
def test_the_line_names_the_field_what_was_expected_and_what_came(cls: type[Any], data: Any, line: str) -> None:
    """Unknown and missing keys, wrong types and refused values are all located under the path."""
    with pytest.raises(InvalidInput) as caught:
        decode(cls, data, "in")
    assert str(caught.value).startswith(line)


def test_a_whole_value_has_a_name_without_a_path() -> None:
    """Without a path the class names what is wrong as a whole."""
    with pytest.raises(InvalidInput, match=r"^task: expected a table"):
        decode(Task, 3)


@pytest.mark.parametrize("text", ["", "héllo\n", "\ufeffx"])
def test_bytes_that_are_text_travel_as_text(text: str) -> None:
    """People can read stored output; only what is no text is base64."""
    assert encode(Artifact(mime="m", data=text.encode()))["data"] == text


@pytest.mark.parametrize("data", [b"\xff", b"a\0b", b"\xed\xa0\x80"])
def test_bytes_that_are_no_text_travel_as_base64(data: bytes) -> None:
    """Any bytes survive, NUL and broken UTF-8 included."""
    encoded = encode(Artifact(mime="m", data=data))
    assert set(encoded["data"]) == {"base64"}
    assert decode(Artifact, encoded).data == data


@pytest.mark.parametrize("data", [{"base64": "*"}, {"base64": 1}, {"base64": "AA==", "x": 1}, {}, 1, None, "\ud800", ["a"]])
def test_other_notations_of_bytes_are_refused(data: Any) -> None:
    """Bytes have two notations and no third."""
    with pytest.raises(InvalidInput, match=r"^data: "):
        decode(Artifact, {"mime": "m", "data": data})


def test_the_notations_of_money_days_and_outcomes() -> None:
    """Money is text, a day is ISO, an outcome is its value, and a tuple is a list."""
    card = RateCard(source="s", checked_at=date(2025, 1, 31))
    assert encode(card) == {
        "rates": [],
        "rounding": 0.0,
        "minimum": 0.0,
        "source": "s",
        "checked_at": "2025-01-31",
        "confidence": "transcribed",
    }
    assert encode(Constraints(max_cost="0.10"))["max_cost"] == "0.10"
    assert decode(Constraints, {"max_cost": 0.1}).max_cost == Decimal("0.1")
    assert encode(Outcome.NOT_STARTED) == "not-started"


def test_a_network_may_be_named_by_its_mode() -> None:
    """`"open"` is as good as a table, as it is in Python."""
    assert decode(SandboxSpec, {"network": "open"}).network == Network(mode="open")


@attrs.frozen(kw_only=True)
class Table:
    """What a plugin's settings may hold beside what the values of the core do."""

    mode: Literal["fast", "safe"] = "safe"
    root: Path | None = None
    since: date | None = None
    models: frozenset[str] = frozenset()
    pair: tuple[str, int] = ("a", 1)
    gpus: dict[str, Gpu] = attrs.field(factory=dict)


def test_the_settings_of_a_plugin_may_have_richer_types() -> None:
    """Literals, paths, days as TOML gives them, sets and tables of values decode as they are declared."""
    data = {"mode": "fast", "root": "/srv", "since": date(2025, 1, 31), "models": ["a"], "gpus": {"x": {"model": "H100"}}}
    assert decode(Table, data) == Table(
        mode="fast", root=Path("/srv"), since=date(2025, 1, 31), models=frozenset("a"), gpus={"x": Gpu(model="H100")}
    )


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"mode": "slow"}, "in.mode"),
        ({"root": 3}, "in.root"),
        ({"root": ""}, "in.root"),
        ({"since": "tomorrow"}, "in.since"),
        ({"since": datetime(2025, 1, 31, 12)}, "in.since"),
        ({"models": "abc"}, "in.models"),
        ({"pair": 3}, "in.pair"),
        ({"pair": ["a", "b"]}, "in.pair"),
        ({"gpus": {"x": {"model": ""}}}, "in.gpus.x.model"),
    ],
)
def test_richer_types_are_as_strict_and_as_located(data: dict[str, Any], field: str) -> None:
    """A wrong value of any of them is one line at its key."""
    with pytest.raises(InvalidInput) as caught:
        decode(Table, data, "in")
    assert caught.value.field == field


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), {1: 2}, b"x", _nested(MAX_DEPTH + 5)])
def test_free_form_data_that_is_no_json_is_not_encoded(value: Any) -> None:
    """What a caller passes through untouched must still be data that can be stored."""
    with pytest.raises(InvalidInput):
        to_json(SandboxSpec(provider_options={"e2b": {"x": value}}))


def test_free_form_data_is_accepted_as_deep_as_it_can_be_stored() -> None:
    """What is decoded can be encoded; what is nested more deeply is refused where it stands."""
    fits = decode(SandboxSpec, {"provider_options": {"e2b": {"x": _nested(MAX_DEPTH)}}})
    assert from_json(SandboxSpec, to_json(fits)) == fits
    with pytest.raises(InvalidInput, match=r"^provider_options\.e2b\.x: expected at most 64 levels"):
        decode(SandboxSpec, {"provider_options": {"e2b": {"x": _nested(MAX_DEPTH + 1)}}})


def test_a_figure_that_is_not_finite_is_not_encoded() -> None:
    """JSON has no infinity, and a price or a time that is none is a bug worth a line."""
    with pytest.raises(InvalidInput, match="finite"):
        to_json(attrs.evolve(strategies.sample_request(), lifetime=float("inf")))
