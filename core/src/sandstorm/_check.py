"""Converters and validators of the values: each failure is an `InvalidInput` that names the field."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from sandstorm._errors import InvalidInput


def money(field: str) -> Callable[[Any], Decimal | None]:
    """A converter to US dollars: takes a Decimal, an int or a string; a float goes through its shortest repr."""

    def convert(value: Any) -> Decimal | None:
        if value is None or (type(value) is Decimal and value.is_finite() and value >= 0):
            return value
        if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
            try:
                amount = Decimal(str(value).strip().removeprefix("$"))
            except InvalidOperation:
                pass
            else:
                if amount.is_finite() and amount >= 0:
                    return amount
        raise InvalidInput(field, 'an amount in US dollars such as "0.10"', value)

    return convert


MOST = 1e12
"""No figure of ours is larger: beyond, sums and prices would overflow."""


def number(field: str, expected: str, *, low: float = 0.0, above: bool = False, optional: bool = False) -> Callable[[Any], Any]:
    """A converter to a float of at least `low` (or above it) and at most `MOST`."""

    def convert(value: Any) -> float | None:
        if value is None and optional:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                result = float(value)
            except OverflowError:
                result = math.inf
            if result <= MOST and (result > low if above else result >= low):
                return result
        raise InvalidInput(field, expected, value)

    return convert


def whole(field: str, expected: str, *, low: int = 0) -> Callable[[Any], Any]:
    """A converter that lets whole numbers of at least `low` through."""

    def convert(value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= low:
            return value
        raise InvalidInput(field, expected, value)

    return convert


def text(field: str, expected: str = "text", *, optional: bool = False, filled: bool = False) -> Callable[[Any], Any]:
    """A converter that lets strings through, without NUL since no vendor takes one."""

    def convert(value: Any) -> str | None:
        if value is None and optional:
            return None
        if isinstance(value, str) and "\0" not in value and (value or not filled):
            return value
        raise InvalidInput(field, expected, value)

    return convert


def data(field: str) -> Callable[[Any], bytes]:
    """A converter to bytes: text is encoded as UTF-8."""

    def convert(value: Any) -> bytes:
        if isinstance(value, str):
            try:
                return value.encode()
            except UnicodeEncodeError as exc:
                raise InvalidInput(field, "bytes, or text that is valid Unicode", value) from exc
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        raise InvalidInput(field, "bytes or text", value)

    return convert


def texts(field: str, expected: str = "a list of texts") -> Callable[[Any], tuple[str, ...]]:
    """A converter to a tuple of strings; a single string is refused, since it would fall apart into letters."""

    def convert(value: Any) -> tuple[str, ...]:
        if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
            items = tuple(value)
            if all(isinstance(item, str) and "\0" not in item for item in items):
                return items
        raise InvalidInput(field, expected, value)

    return convert


def table(field: str, value_of: Callable[[str, Any], Any] | None = None) -> Callable[[Any], dict[str, Any]]:
    """A converter to a new dict with string keys; `value_of(where, value)` converts each value."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise InvalidInput(field, "a table of names and values", value)
        result = {}
        for key, item in value.items():
            if not isinstance(key, str) or not key or "\0" in key:
                raise InvalidInput(field, "names that are non-empty text", key)
            result[key] = value_of(f"{field}.{key}", item) if value_of else item
        return result

    return convert


def one_of(field: str, *choices: str) -> Callable[[Any], str]:
    """A converter that lets one of `choices` through."""

    def convert(value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise InvalidInput(field, "one of " + ", ".join(choices), value)

    return convert
