"""Every value to JSON and back, without loading the converter before it is used."""

from __future__ import annotations

from typing import Any, TypeVar

Value = TypeVar("Value")


def encode(value: object) -> Any:
    """A value as plain JSON data."""
    from sandstorm._converter import encode as encoded

    return encoded(value)


def decode(kind: type[Value], data: object, at: str = "") -> Value:
    """The value that plain JSON data stands for. Raises `InvalidInput`, located below `at`."""
    from sandstorm._converter import decode as decoded

    return decoded(kind, data, at)
