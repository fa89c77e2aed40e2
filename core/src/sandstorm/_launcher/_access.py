"""What an adapter brings for the launcher to work with."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from typing import Protocol

import attrs


@attrs.frozen(kw_only=True)
class ExecAnswer:
    """What a short command came to.

    Attributes:
        code: Its exit code, or None where the vendor does not say.
        stdout: What it wrote. Noise before the launcher's answer is passed over, and a cut answer is recognised.
        stderr: Likewise; the launcher writes nothing there, so that vendors may merge the two.
    """

    code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""


class BoundedExec(Protocol):
    """A sandbox that runs short commands with little output, and takes files."""

    async def exec(self, argv: Sequence[str], *, timeout: float) -> ExecAnswer:
        """What the command came to, as long as it takes no more than `timeout` seconds.

        The vendor may run it twice, lose its answer or cut it: each command of the launcher is harmless when repeated.
        Raises `Ambiguous` where the answer is lost, `ProviderDown` where it was not sent, `SandboxLost`, `SandboxGone`.
        """
        ...

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes a file at an absolute path, exact bytes, so that the user of `exec` can change and rename it."""
        ...
