"""The house keeps its rooms apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(
    path.parent for path in (*ROOT.glob("sandstorm-provider-*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml"))
)
PUBLIC = {"sandstorm", "sandstorm.provider", "sandstorm.policy", "sandstorm.testing"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugins_import_public_namespaces_only(plugin):
    """Of the core, a plugin uses what the four public namespaces show, and nothing private."""
    used = {name for path in plugin.glob("src/**/*.py") for name in imported(path) if name.split(".")[0] == "sandstorm"}
    assert used <= PUBLIC


@pytest.mark.parametrize("part", [ROOT / "core", *PLUGINS], ids=lambda path: path.name)
def test_every_distribution_has_its_parts(part):
    """Each distribution has a README, sources under the name that it is imported by, and tests."""
    name = "sandstorm" if part.name == "core" else part.name.replace("-", "_")
    assert (part / "README.md").read_text().startswith(f"# {'sandstorm-core' if part.name == 'core' else part.name}")
    assert (part / "src" / name / "py.typed").exists()
    assert list((part / "tests").glob("test_*.py"))
