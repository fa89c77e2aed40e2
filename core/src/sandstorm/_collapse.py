"""Errors as the caller raised them, although nurseries group what passes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collapsed() -> Iterator[None]:
    """Raises the only exception of a group instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        saved = error.__cause__, error.__context__, error.__suppress_context__
        try:
            raise error
        finally:
            error.__cause__, error.__context__, error.__suppress_context__ = saved
            del error, group


def same_error(raised: BaseException, error: BaseException) -> bool:
    """Whether `raised` groups the very same exceptions as `error`: nurseries wrap and copy what passes through."""
    return raised is error or list(map(id, _leaves(raised))) == list(map(id, _leaves(error)))


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
