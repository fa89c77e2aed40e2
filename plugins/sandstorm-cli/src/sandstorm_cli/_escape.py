"""Text from programs and vendors, made safe for a terminal."""

from __future__ import annotations

import unicodedata

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that move the cursor, colour, reorder or break lines."""


def one_line(text: str) -> str:
    """`text` on one line: control and formatting characters are shown as escapes."""
    return "".join(_shown(char) for char in text)


def lines(text: str) -> str:
    """`text` with its line ends and tabs kept; every other control and formatting character is shown as an escape."""
    return "".join(char if char in "\n\t" else _shown(char) for char in text)


def _shown(char: str) -> str:
    if (char.isascii() and char.isprintable()) or unicodedata.category(char) not in _UNSAFE:
        return char
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
