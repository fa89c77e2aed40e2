"""Who owns the import name `sandstorm`: another distribution on PyPI takes the same one."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version

CORE = "sandstorm-core"
IMPORT_NAME = "sandstorm"


def core_version() -> str | None:
    """The version of the installed core, or None."""
    try:
        return version(CORE)
    except PackageNotFoundError:
        return None


def foreign_owners() -> list[str]:
    """Distributions other than the core that put something under the import name, with their versions."""
    owners = {_normal(name) for name in packages_distributions().get(IMPORT_NAME, ())} - {CORE}
    return [f"{name} {distribution(name).version}" for name in sorted(owners)]


def is_ours() -> bool:
    """Whether importing the name gives the core and nothing else."""
    try:
        import sandstorm
    except Exception:  # whatever a foreign module raises on import, it is not ours
        return False
    return hasattr(sandstorm, "Sandstorm") and hasattr(sandstorm, "SandboxSpec")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
