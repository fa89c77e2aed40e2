"""The one line on stderr that says what a sandbox on this machine is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sandstorm.provider import isolation_rank

_CALM = "namespaces"
"""From this level on the shared kernel is all there is to say."""
_REST = 'Settings `[plugins.local] warn = false` turn this line off; isolation="microvm" goes to another provider.'
_told: set[str] = set()


def notice(level: str, not_enforced: Sequence[str]) -> str | None:
    """The line for sandboxes of this level; None for one with a kernel of its own."""
    if level in ("gvisor", "microvm"):
        return None
    if level == "none":
        start = "WARNING: NO ISOLATION: programs run on this machine as plain processes"
    elif isolation_rank(level) < isolation_rank(_CALM):
        start = f"WARNING: weak isolation ({level}): SHARED HOST KERNEL, a kernel bug escapes it"
    else:
        start = f"isolation {level}: shared host kernel, a kernel bug escapes it"
    missing = f"; NOT enforced: {', '.join(not_enforced)}" if not_enforced else ""
    return f"sandstorm: local: {start}{missing}. {_REST}"


def tell_once(level: str, not_enforced: Sequence[str]) -> None:
    """Writes the line to stderr, the first time in this process that a sandbox of this level is made."""
    line = notice(level, not_enforced)
    if line is not None and level not in _told:
        _told.add(level)
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - that is what it is for
