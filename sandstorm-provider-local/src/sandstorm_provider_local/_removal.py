"""How a directory goes of which somebody took the permissions away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def remove_tree(top: Path) -> None:
    """Removes a directory with all that is in it, whatever its modes. Raises `OSError` where the system does not let go of it."""
    try:
        shutil.rmtree(top)
    except PermissionError:
        _take_back(top)
        shutil.rmtree(top)


def _take_back(top: Path) -> None:
    top.chmod(0o700)
    for directory, names, _ in os.walk(top):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                path.chmod(0o700)
