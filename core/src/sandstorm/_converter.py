"""Values to JSON and back, through the one converter; every input error is located.

Bytes travel as text where they are UTF-8 without NUL, else as `{"base64": "..."}`; money as text; days in ISO notation;
enumerations by value; tuples as lists.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import enum
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import attrs
import cattrs

from sandstorm._errors import InvalidInput
from sandstorm._spec import Network

T = TypeVar("T")
Hook = Callable[[Any, Any], Any]

MAX_DEPTH = 64
"""Levels of lists and tables that free-form data may have."""

_PLAIN_KEY = re.compile(r"[\w-]+\Z", re.ASCII)
_SCALARS = (str, int, bool, type(None))


def decode(cls: type[T], data: Any, at: str = "") -> T:
    """A `cls` from plain JSON data. Raises one `InvalidInput` whose `field` is the full path, below `at`."""
    try:
        value: T = _CONVERTER.structure(data, cls)
    except InvalidInput as exc:
        raise InvalidInput(_joined(at, exc.field) or cls.__name__.lower(), exc.expected, exc.got) from exc.__cause__
    return value


def encode(value: Any) -> Any:
    """Plain JSON data of a value. Raises `InvalidInput` where free-form data in it is no JSON."""
    return _CONVERTER.unstructure(value)


def to_json(value: Any) -> str:
    """A value as JSON text on one line. Raises `InvalidInput` where free-form data in it is no JSON."""
    try:
        return json.dumps(encode(value), allow_nan=False, separators=(",", ":"))
    except ValueError as exc:
        if isinstance(exc, InvalidInput):
            raise
        raise InvalidInput(type(value).__name__.lower(), "finite numbers", str(exc)) from exc


def from_json(cls: type[T], text: str, at: str = "") -> T:
    """A `cls` from JSON text. Raises `InvalidInput`, whatever the text is."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidInput(at or cls.__name__.lower(), "JSON that is not nested so deeply", text[:40]) from None
    except ValueError as exc:
        raise InvalidInput(at or cls.__name__.lower(), "JSON", str(exc)) from exc
    return decode(cls, data, at)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`(did you mean 'x'?)` with a leading space where one of `known` is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# --- where an error stands ----------------------------------------------------------------------------------


def _key(name: str) -> str:
    return name if _PLAIN_KEY.match(name) else f"[{name[:40]!r}]"


def _joined(parent: str, field: str) -> str:
    if not parent or not field or field.startswith("["):
        return parent + field
    return f"{parent}.{field}"


def _below(where: str, hook: Hook, value: Any, cls: Any) -> Any:
    """What `hook` makes of `value`; its error is located below `where`."""
    try:
        return hook(value, cls)
    except InvalidInput as exc:
        raise InvalidInput(_joined(where, exc.field), exc.expected, exc.got) from exc.__cause__
    except Exception as exc:  # a type of a plugin's settings that only cattrs itself knows
        raise InvalidInput(where, f"a value for {getattr(cls, '__name__', cls)}", value) from exc


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


# --- leaves -------------------------------------------------------------------------------------------------


def _exactly(kind: type, expected: str) -> Hook:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is kind:
            return value
        raise InvalidInput("", expected, value)

    return structure


def _float(value: Any, _: Any) -> float:
    if type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise InvalidInput("", "a number", value)


def _decimal(value: Any, _: Any) -> Decimal:
    if type(value) in (str, int, float):
        try:
            number = Decimal(str(value).strip().removeprefix("$"))
        except (InvalidOperation, ValueError):
            pass
        else:
            if number.is_finite():
                return number
    raise InvalidInput("", 'an amount such as "0.10"', value)


def _bytes(value: Any, _: Any) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, dict) and value.keys() == {"base64"} and isinstance(value["base64"], str):
            return base64.b64decode(value["base64"], validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        pass
    raise InvalidInput("", 'text, or {"base64": "..."}', value)


def _date(value: Any, _: Any) -> date:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass
    raise InvalidInput("", "a day such as 2025-01-31", value)


def _enum(value: Any, cls: Any) -> Any:
    for member in cls:
        if type(member.value) is type(value) and member.value == value:
            return member
    raise InvalidInput("", "one of " + ", ".join(str(member.value) for member in cls), value)


def _literal(value: Any, cls: Any) -> Any:
    for choice in get_args(cls):
        if type(choice) is type(value) and choice == value:
            return choice
    raise InvalidInput("", "one of " + ", ".join(str(choice) for choice in get_args(cls)), value)


def _path(value: Any, _: Any) -> Path:
    if isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise InvalidInput("", "a path", value)


def _free(value: Any, _: Any, depth: int = 0) -> Any:
    """Free-form data as it is; its depth is bounded here, so that what was accepted can also be stored."""
    if isinstance(value, (list, dict)):
        if depth >= MAX_DEPTH:
            raise InvalidInput("", f"at most {MAX_DEPTH} levels of lists and tables", type(value).__name__)
        for item in value.values() if isinstance(value, dict) else value:
            _free(item, _, depth + 1)
    return value


def _encode_bytes(value: bytes) -> str | dict[str, str]:
    if b"\0" not in value:
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return {"base64": base64.b64encode(value).decode("ascii")}


def _encode_free(value: Any, depth: int = 0) -> Any:
    """Free-form data, checked to be JSON: what a store or a log gets is plain."""
    if isinstance(value, _SCALARS) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth < MAX_DEPTH:
        if isinstance(value, (list, tuple)):
            return [_encode_free(item, depth + 1) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: _encode_free(item, depth + 1) for key, item in value.items()}
    raise InvalidInput("data", f"JSON values, at most {MAX_DEPTH} levels deep", type(value).__name__)


# --- classes, lists and tables ------------------------------------------------------------------------------


@attrs.frozen
class _Field:
    name: str
    cls: Any
    hook: Hook
    required: bool
    converter: Any


def _class_hook(cls: type[Any], converter: cattrs.Converter) -> Hook:
    fields = tuple(
        _Field(
            attribute.alias,
            attribute.type or Any,
            converter.get_structure_hook(attribute.type or Any),
            attribute.default is attrs.NOTHING,
            attribute.converter,
        )
        for attribute in attrs.fields(attrs.resolve_types(cls))
        if attribute.init
    )
    names = frozenset(field.name for field in fields)

    def structure(data: Any, _: Any) -> Any:
        if not isinstance(data, Mapping):
            raise InvalidInput("", "a table of keys and values", data)
        for key in data:
            if not isinstance(key, str) or key not in names:
                _refuse_key(str(key), sorted(names))
        return _made(cls, {field.name: _field_value(field, data[field.name]) for field in fields if _given(field, data)})

    return structure


def _refuse_key(key: str, known: list[str]) -> NoReturn:
    hint = suggestion(key, known)
    expected = f"a key that exists{hint}" if hint else "one of " + ", ".join(known) if known else "no keys here"
    raise InvalidInput(_key(key), expected, key)


def _given(field: _Field, data: Mapping[str, Any]) -> bool:
    if field.name in data:
        return True
    if field.required:
        raise InvalidInput(field.name, "a value, since there is no default", None)
    return False


def _field_value(field: _Field, value: Any) -> Any:
    try:
        return _below(field.name, field.hook, value, field.cls)
    except InvalidInput as exc:
        if exc.field == field.name and callable(field.converter):
            _say_better(field, value)
        raise


def _say_better(field: _Field, value: Any) -> None:
    """The class's own converter knows what a field means: where it refuses the value too, its words are shown."""
    try:
        field.converter(value)
    except InvalidInput as exc:
        raise exc from None
    except Exception:  # a foreign converter that cannot be asked has nothing better to say
        return


def _made(cls: type[Any], arguments: dict[str, Any]) -> Any:
    try:
        return cls(**arguments)
    except InvalidInput:
        raise
    except Exception as exc:  # what the validators of a plugin's settings raise is input, wherever it comes from
        said = " ".join(str(exc.args[0]).split())[:200] if exc.args else type(exc).__name__
        field = next((name for name in arguments if f"'{name}'" in said), "")
        raise InvalidInput(field, f"values that are accepted ({said})", arguments.get(field, list(arguments))) from exc


def _sequence_hook(cls: Any, converter: cattrs.Converter) -> Hook:
    kind = get_origin(cls) or cls
    arguments = get_args(cls) or (Any,)
    make = kind if kind in (tuple, set, frozenset) else list
    item = arguments[0]
    hook = converter.get_structure_hook(item)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise InvalidInput("", "a list", value)
        return make(_below(f"[{index}]", hook, part, item) for index, part in enumerate(value))

    return structure


def _table_hook(cls: Any, converter: cattrs.Converter) -> Hook:
    item = (get_args(cls) or (str, Any))[1]
    hook = converter.get_structure_hook(item)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise InvalidInput("", "a table of names and values", value)
        for key in value:
            if not isinstance(key, str):
                raise InvalidInput("", "names that are text", key)
        return {key: _below(_key(key), hook, part, item) for key, part in value.items()}

    return structure


def _network_hook(converter: cattrs.Converter) -> Hook:
    table = _class_hook(Network, converter)

    def structure(value: Any, cls: Any) -> Network:
        if isinstance(value, Mapping):
            network: Network = table(value, cls)
            return network
        if isinstance(value, str):
            try:
                return Network(mode=value)
            except InvalidInput:
                pass
        raise InvalidInput("", '"none", "open" or a table with hosts or cidrs', value)

    return structure


def _is_sequence(cls: Any) -> bool:
    origin = get_origin(cls) or cls
    return origin in (tuple, list, set, frozenset) and (origin is not tuple or get_args(cls)[1:] == (...,))


def _is_table(cls: Any) -> bool:
    return (get_origin(cls) or cls) in (dict, Mapping)


def _is_enum(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, enum.Enum)


def _is_literal(cls: Any) -> bool:
    return get_origin(cls) is Literal


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False, unstruct_collection_overrides={tuple: list})
    for kind, expected in ((str, "text"), (int, "a whole number"), (bool, "true or false")):
        converter.register_structure_hook(kind, _exactly(kind, expected))
    converter.register_structure_hook(float, _float)
    converter.register_structure_hook(Decimal, _decimal)
    converter.register_structure_hook(bytes, _bytes)
    converter.register_structure_hook(date, _date)
    converter.register_structure_hook(Path, _path)
    converter.register_unstructure_hook(Decimal, lambda value: f"{value:f}")  # never 4.4E-8: people read it
    converter.register_unstructure_hook(bytes, _encode_bytes)
    converter.register_unstructure_hook(date, date.isoformat)
    converter.register_structure_hook_func(_is_enum, _enum)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_func(lambda cls: cls is Any, _free)
    converter.register_unstructure_hook_func(lambda cls: cls is Any, _encode_free)
    converter.register_structure_hook_factory(attrs.has, _class_hook)
    converter.register_structure_hook_factory(_is_sequence, _sequence_hook)
    converter.register_structure_hook_factory(_is_table, _table_hook)
    converter.register_structure_hook(Network, _network_hook(converter))
    return converter


_CONVERTER = _converter()
