"""What people see of results and of text that is not ours."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandstorm import Exit
from sandstorm.policy import Latency, Quote, Usage
from sandstorm.provider import ISOLATION_LEVELS
from sandstorm_cli._escape import lines, one_line
from sandstorm_cli._show import ending, isolation, predicted, quoted, usd


@given(st.text())
def test_one_line_is_one_printable_line(text: str) -> None:
    """Whatever the text is, nothing in it moves the cursor, reorders or breaks the line, and it can be encoded."""
    shown = one_line(text)
    assert len(shown.splitlines()) <= 1
    assert not any(char < " " or "\x7f" <= char < "\xa0" for char in shown)
    shown.encode()


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_ordinary_text_is_left_alone(text: str) -> None:
    """Letters, digits, marks and spaces of every script are shown as they are."""
    assert one_line(text) == text


def test_lines_keep_their_ends() -> None:
    """Line ends and tabs stay; an escape sequence does not."""
    assert lines("a\tb\n\x1b[31mc\r") == "a\tb\n\\x1b[31mc\\r"


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (None, "unknown"),
        (Decimal(0), "$0"),
        (Decimal("4.4E-8"), "$0.000000044"),
        (Decimal("1E+2"), "$100"),
        (Decimal("0.10"), "$0.1"),
    ],
)
def test_money(amount: Decimal | None, text: str) -> None:
    """Money is shown in plain digits, and unknown is never shown as free."""
    assert usd(amount) == text


def test_quote_and_latency() -> None:
    """An unknown price or start is called unknown; the most that a run can cost stands beside what is expected."""
    usage = Usage(seconds=1, limit=10)
    unknown = Quote(low=None, expected=None, high=None, usage=usage, source="unknown", checked_at=None)
    known = Quote(low=Decimal(1), expected=Decimal(1), high=Decimal(9), usage=usage, source="x", checked_at=None)
    assert (quoted(unknown), quoted(known)) == ("unknown", "$1 (at most $9)")
    assert predicted(Latency(p50=None, p95=None)) == "unknown"


@pytest.mark.parametrize("level", ISOLATION_LEVELS)
def test_shared_kernel_is_said_plainly(level: str) -> None:
    """Every level but gvisor and microvm says that the host's kernel is shared."""
    assert ("SHARED HOST KERNEL" in isolation(level)) == (level not in ("gvisor", "microvm"))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (Exit(code=3), "exit code 3"),
        (Exit(kind="signal", signal=9), "signal 9"),
        (Exit(kind="out-of-memory"), "out of memory"),
        (Exit(kind="deadline"), "deadline"),
    ],
)
def test_endings(how: Exit, text: str) -> None:
    """How a program ended is said in words."""
    assert ending(how) == text
