"""What the core promises from outside: its names, what they load, and how little must be installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest

NAMESPACES = ("sandstorm", "sandstorm.provider", "sandstorm.policy", "sandstorm.testing")
HEAVY = ("trio", "asyncio", "cattrs", "pluggy", "sqlite3")


def loaded_after(statement: str) -> list[str]:
    """The heavy modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    names: list[str] = json.loads(done.stdout)
    return names


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_exported_names(namespace: str) -> None:
    """Every exported name exists, is exported once, in order, and nothing else public is left over."""
    module = importlib.import_module(namespace)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)
    if namespace != "sandstorm":
        assert module.__all__ == [
            *sorted(name for name in module.__all__ if name.isupper()),
            *sorted(name for name in module.__all__ if not name.isupper() and name[0].isupper()),
            *sorted(name for name in module.__all__ if name[0].islower()),
        ]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_docstrings(namespace: str) -> None:
    """Every exported class and function says what one gets."""
    module = importlib.import_module(namespace)
    exported = [getattr(module, name) for name in module.__all__]
    ours = [value for value in exported if getattr(value, "__module__", "").startswith("sandstorm")]
    bare = [value.__name__ for value in ours if callable(value) and not _says(value)]
    assert module.__doc__
    assert bare == []


def _says(value: object) -> bool:
    """Whether it has a docstring of its own; attrs and enum write none that end a sentence."""
    doc = value.__doc__ or ""
    return doc.split("\n\n")[0].rstrip().endswith((".", ":", "::"))


@pytest.mark.parametrize("name", ["Sandstorm", "AsyncSandstorm"])
def test_methods_have_docstrings(name: str) -> None:
    """Every public method of a client says what one gets."""
    client = getattr(importlib.import_module("sandstorm"), name)
    public = {key: value for key, value in vars(client).items() if not key.startswith("_")}
    assert [key for key, value in public.items() if not value.__doc__] == []
    assert {"run", "plan", "map", "sandbox", "runs"} <= public.keys()


@pytest.mark.parametrize("statement", ["import sandstorm", "from sandstorm import Sandstorm, Constraints, SandboxSpec"])
def test_import_is_light(statement: str) -> None:
    """Importing the user namespace loads none of the heavy modules."""
    assert loaded_after(statement) == []


def test_values_are_light() -> None:
    """Values and an unopened client need none of the heavy modules either."""
    statement = (
        "from sandstorm import *\n"
        "Sandstorm(settings={}); AsyncSandstorm(settings={})\n"
        "SandboxSpec(cpu=2), Constraints(max_cost='0.10'), Task(code='1', language='python')"
    )
    assert loaded_after(statement) == []


def test_errors_have_one_root() -> None:
    """Every exported error is a `SandstormError`, of exactly one of the two families where it is of any."""
    module = importlib.import_module("sandstorm")
    exported = [getattr(module, name) for name in module.__all__]
    errors = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, BaseException)]
    assert len(errors) > 20
    assert [kind for kind in errors if not issubclass(kind, module.SandstormError)] == []
    assert [kind for kind in errors if issubclass(kind, module.CallerError) and issubclass(kind, module.ProviderError)] == []


def test_few_distributions() -> None:
    """The core with everything that it needs is at most ten distributions."""
    pending, closure = ["sandstorm-core"], set[str]()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in closure:
            continue
        closure.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            wanted, _, marker = requirement.partition(";")
            # Extras are optional, and the markers of other systems and older Pythons do not apply here.
            if not re.search(r"extra\s*==|os_name\s*==\s*.nt|win32|python_version\s*<|implementation_name\s*[!=]=", marker):
                pending.append(re.split(r"[\s<>=!~\[(;]", wanted.strip(), maxsplit=1)[0])
    assert "trio" in closure
    assert len(closure) <= 10, sorted(closure)
