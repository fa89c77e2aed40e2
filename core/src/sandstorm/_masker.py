"""Takes the values of secrets out of what is recorded and shown."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

import attrs

MASK = b"***"
"""What stands in the place of a secret."""

SHORTEST = 4
"""Bytes that a secret must have to be masked: shorter ones occur in any output by chance, and masking would destroy it."""

SHORTEST_PART = 8
"""Bytes that a line of a secret, or a secret in base64, must have: what comes of a shorter one occurs by chance too."""

Span = tuple[int, int]


class Masker:
    """Replaces secrets by `***`: as they are, line by line, and in the encodings in which programs print them.

    Bytes that belong to several secrets at once go with all of them, and secrets without anything between them become
    one mask. The encodings are JSON, Python's `repr`, URL quoting, hexadecimal, and base64 at any offset.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._forms = tuple(sorted({form for secret in secrets for form in _forms(secret)}))

    def data(self, data: bytes) -> bytes:
        """The bytes without secrets."""
        if not self._forms:
            return data
        stream = self.stream()
        return stream.feed(data) + stream.end()

    def text(self, text: str) -> str:
        """The text without secrets."""
        if not self._forms:
            return text
        return self.data(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def stream(self) -> MaskedStream:
        """The same for bytes that come in pieces."""
        return MaskedStream(self._forms, max(map(len, self._forms), default=1) - 1)


@attrs.define(repr=False)
class MaskedStream:
    """Masks bytes that come in pieces, wherever they are cut. Made by `Masker.stream`."""

    _forms: tuple[bytes, ...]
    _hold: int
    _held: bytes = b""
    _covered: int = 0  # bytes of `_held`, from its start, that belong to a secret which began before
    _inside: bool = False  # whether the last byte that was given out belonged to a secret

    def feed(self, data: bytes) -> bytes:
        """What is certain by now. At most the length of the longest form of a secret, less one byte, is held back."""
        return self._advance(data, self._hold)

    def end(self) -> bytes:
        """What was held back."""
        return self._advance(b"", 0)

    def _advance(self, more: bytes, hold: int) -> bytes:
        data = self._held + more
        until = len(data) - hold
        if until <= 0:
            self._held = data
            return b""
        given, at, covered = [], 0, 0
        for start, end in _merged([(0, self._covered), *_found(data, self._forms)]):
            if start >= until:  # it is held back whole, and found again
                break
            given.append(data[at:start])
            if start > 0 or not self._inside:
                given.append(MASK)
            at, covered = min(end, until), max(0, end - until)
        self._inside = at == until
        given.append(data[at:until])
        self._held, self._covered = data[until:], covered
        return b"".join(given)


def scrub(error: BaseException, secrets: Iterable[str]) -> None:
    """Takes secrets out of the texts of an error, and of those that led to it: vendors' errors may quote them."""
    mask = Masker(secrets)
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        each.args = tuple(mask.text(value) if isinstance(value, str) else value for value in each.args)
        for name, value in list(vars(each).items()):
            if isinstance(value, str):
                setattr(each, name, mask.text(value))
        pending += [each.__cause__, each.__context__]


def _found(data: bytes, forms: Iterable[bytes]) -> Iterator[Span]:
    """Where the forms stand; occurrences of one form that overlap or touch are one span."""
    for form in forms:
        size = len(form)
        start = data.find(form)
        while start >= 0:
            end = start + size
            while (last := data.rfind(form, end - size + 1, end + size)) >= 0:
                end = last + size
            yield start, end
            start = data.find(form, end)


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Spans that neither overlap nor touch, in order; empty ones are left out."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def _forms(secret: str) -> Iterator[bytes]:
    """The byte strings by which a secret may appear."""
    for value in {secret, secret.strip()}:  # a file's last line end is often cut off on the way
        data = _encoded(value)
        if len(data) >= SHORTEST:
            yield data
            yield from _escaped(value, data)
        if len(data) >= SHORTEST_PART:
            yield from _base64(data)
    for line in secret.splitlines():  # terminals write other line ends, and logs indent
        part = _encoded(line.strip())
        if len(part) >= SHORTEST_PART:
            yield part


def _escaped(value: str, data: bytes) -> Iterator[bytes]:
    for literal in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)):
        yield _encoded(literal[1:-1])
    for quoted in (quote(data), quote(data, safe=""), quote_plus(data), data.hex(), data.hex().upper()):
        yield quoted.encode()


def _base64(data: bytes) -> Iterator[bytes]:
    """Those letters of the base64 of any text with `data` in it that `data` alone decides, for each of its three offsets."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for offset in range(3):
            first = -(-offset * 8 // 6)
            yield encode(bytes(offset) + data)[first : (offset + len(data)) * 8 // 6]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
