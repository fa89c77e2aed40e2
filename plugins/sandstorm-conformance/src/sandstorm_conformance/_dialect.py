"""How the few programs of the suite are written in a sandbox."""

from __future__ import annotations

import shlex

import attrs


@attrs.frozen
class Program:
    """The words of a program, and the files that it needs."""

    argv: tuple[str, ...]
    files: dict[str, bytes] = attrs.field(factory=dict)


class Dialect:
    """Programs for a POSIX shell. Override each where a sandbox has none."""

    def _sh(self, script: str, **files: bytes) -> Program:
        return Program(("/bin/sh", "-c", script), files)

    def emit(self, stdout: bytes, line: str) -> Program:
        """Writes exactly these bytes to stdout, and a line to stderr."""
        return self._sh(f"cat emitted; echo {shlex.quote(line)} >&2", emitted=stdout)

    def echo(self) -> Program:
        """Copies stdin to stdout until its end."""
        return self._sh("cat")

    def exits(self, code: int) -> Program:
        """Ends with this code."""
        return self._sh(f"exit {code}")

    def dies(self, number: int) -> Program:
        """Ends by this signal."""
        return self._sh(f"kill -{number} $$")

    def floods(self, count: int) -> Program:
        """Writes so many bytes to stdout."""
        return self._sh(f"head -c {count} /dev/zero")

    def swaps(self) -> Program:
        """Prints the file `state`, then makes it say `again`."""
        return self._sh("cat state; printf again > state", state=b"first")

    def leaves_child(self, path: str, seconds: float) -> Program:
        """Waits for a minute, while a child writes a file after so many seconds."""
        return self._sh(f"(sleep {seconds}; echo x > {shlex.quote(path)}) & sleep 60")
