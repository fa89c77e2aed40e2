"""The machine is worth its name: it finds every damage that is done to the core on purpose."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("fault_mutants", Path(__file__).with_name("mutants.py"))
assert _SPEC is not None and _SPEC.loader is not None
mutants = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_damage_is_found(name: str, tmp_path: Path) -> None:
    """By the invariant that it breaks."""
    assert f"'{mutants.FOUND_BY[name]}':" in mutants.found(name, tmp_path)
