"""Files of a sandbox, as they are listed and watched."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class FileInfo:
    """An entry of the work area.

    Attributes:
        path: Relative to the work area.
        kind: `file`, `directory`, `link` or `other`.
        size: Bytes; 0 for what is not a file.
        mode: Permission bits.
        modified: Wall-clock seconds since 1970.
    """

    path: str
    kind: str = "file"
    size: int = 0
    mode: int = 0o644
    modified: float = 0.0


@attrs.frozen
class FileChange:
    """A change in a directory that is watched: `kind` is `created`, `changed` or `removed`."""

    path: str
    kind: str
