"""Every language, from its source to its exit, through the engine and in a real sandbox; and what is said where its tools are missing."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from sandstorm import AsyncSandstorm, SandboxSpec
from sandstorm._languages import RECIPES, Languages, Recipe
from sandstorm.provider import Declined, Environment, Exit, Facts
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._provider import _NEED_PROC, _PACKAGES
from sandstorm_provider_local._runtimes import KNOWN, find_runtimes, is_public, make_etc, seen_inside

DOCUMENT = Path(__file__).parents[2] / "docs/languages.md"
PROGRAMS = {path.suffix: path.read_text() for path in (Path(__file__).parent / "programs").glob("hello.*")}
MISTAKES = {
    "typescript": "const count: number = 'one';",
    "c": "int main(void) { return missing; }",
    "cpp": "int main() { return missing; }",
    "rust": 'fn main() { let count: i32 = "one"; }',
    "go": "package main\n\nfunc main() { count := 1 }",
    "java": 'public class Main { int count = "one"; }',
    "csharp": 'class Main { static void Main() { int count = "one"; } }',
}
FOUND = find_runtimes(as_other_user=os.geteuid() == 0).programs


def missing(recipe: Recipe) -> list[str]:
    """The tools of a language that this machine lacks."""
    return [runtime for runtime in recipe.runtimes if runtime not in FOUND]


def each(recipes: Iterable[Recipe]) -> list[Any]:
    """The recipes; those without their tools are skipped, and say which tools."""
    return [
        pytest.param(
            recipe,
            id=recipe.language,
            marks=pytest.mark.skipif(bool(missing(recipe)), reason=f"{', '.join(missing(recipe))} is not installed below /usr"),
        )
        for recipe in recipes
    ]


@pytest.fixture(scope="session")
def level() -> str:
    """The isolation that is verified on this machine."""

    async def ask(state: str) -> str:
        async with LocalProvider(state_dir=state, warn=False).connect() as session:
            return str((await session.refresh()).data["level"])

    state = f"/tmp/sandstorm-languages-{os.getpid()}"
    try:
        return trio.run(ask, state)
    finally:
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
def settings(request: pytest.FixtureRequest, level: str) -> Iterator[dict[str, object]]:
    """Settings with a journal in memory, and a place of their own for sandboxes that another user gets through to."""
    recipe: Recipe = request.getfixturevalue("recipe")
    if _NEED_PROC.get(level, frozenset()).intersection(recipe.runtimes):
        pytest.skip(f"{recipe.language} does not run without /proc, and is declined at the level {level}")
    state = f"/tmp/sandstorm-languages-{os.getpid()}"
    yield {"store": "sqlite://", "plugins": {"local": {"state_dir": state}}}
    shutil.rmtree(state, ignore_errors=True)


@pytest.mark.parametrize("recipe", each(RECIPES))
async def test_a_program_gets_input_and_arguments_and_its_exit_code_is_told(recipe: Recipe, settings: dict[str, object]) -> None:
    """A program of each language reads its input, sees its arguments, writes to both streams and exits with its own code."""
    async with AsyncSandstorm(settings=settings) as client:
        ran = await client.run(PROGRAMS[recipe.suffixes[0]], recipe.language, stdin="wörld\n".encode(), args=["a", "-b"])
    assert (ran.stdout, ran.stderr, ran.exit) == ("hello wörld a,-b\n".encode(), b"warned\n", Exit(code=3))


@pytest.mark.parametrize("recipe", each(recipe for recipe in RECIPES if recipe.compile))
async def test_a_mistake_is_a_compile_error(recipe: Recipe, settings: dict[str, object]) -> None:
    """What the compiler refuses is told as a compile error, with what the compiler says, and nothing is run."""
    async with AsyncSandstorm(settings=settings) as client:
        ran = await client.run(MISTAKES[recipe.language], recipe.language)
    assert ran.exit.kind == "compile-error", ran
    assert re.search(rb"error\b|declared", ran.stderr), ran
    assert recipe.file.lower().encode() in ran.stderr.lower()


@pytest.mark.parametrize(
    "code",
    [
        "class Hello {{ {main} }}\nclass Other {{}}",
        "interface Other {{}}\n\nclass Main {{\n  {main}\n}}\n",
        "public final class Other {{}}\n\nclass Hello {{ {main} }}\nclass Last {{}}",
        "package a.b;\n\nimport java.util.*;\n\npublic record Hello(int x) {{ {main} }}",
    ],
    ids=["first", "last", "beside-a-public-one", "package"],
)
@pytest.mark.parametrize("recipe", each([Languages().recipe("java")]))
async def test_a_java_class_may_have_any_name(code: str, recipe: Recipe, settings: dict[str, object]) -> None:
    """The type with `main` is run, whatever its name, its package, and the types before and after it."""
    main = 'public static void main(String... words) { System.out.println("hello"); }'
    async with AsyncSandstorm(settings=settings) as client:
        ran = await client.run(code.format(main=main), "java")
    assert (ran.stdout, ran.exit) == (b"hello\n", Exit(code=0)), ran.stderr


def test_every_compiled_language_has_a_mistake_and_every_language_a_program() -> None:
    """No language is left out of the tests above."""
    assert set(MISTAKES) == {recipe.language for recipe in RECIPES if recipe.compile}
    assert {Languages().of_file(f"hello{suffix}") for suffix in PROGRAMS} == set(RECIPES)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI promises to have the tools (CI=true)")
def test_ci_has_at_least_eight_languages() -> None:
    """Where CI runs, the tests above do not pass by being skipped."""
    lacking = {recipe.language: missing(recipe) for recipe in RECIPES if missing(recipe)}
    assert len(RECIPES) - len(lacking) >= 8, lacking


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.language)
def test_a_missing_tool_is_declined_with_its_package(recipe: Recipe) -> None:
    """Each tool that is looked for and not there is named together with the package that has it, and no other tool is."""
    assert set(recipe.runtimes) <= set(KNOWN)
    assert missing_tools(recipe, recipe.runtimes) == []
    (reason,) = missing_tools(recipe, recipe.runtimes[1:])
    assert reason.startswith(f"{recipe.language} needs {recipe.runtimes[0]} below /usr")
    assert f"`apt install {package(recipe.runtimes[0])}`" in reason
    assert len(missing_tools(recipe, ())) == len(recipe.runtimes)


def missing_tools(recipe: Recipe, there: Sequence[str]) -> list[str]:
    """What a machine with these tools says of those that it lacks for a language."""
    facts = Facts(data={"level": None, "runtimes": dict.fromkeys(there, "/usr/bin/tool")})
    answers = LocalProvider().offers(SandboxSpec(environment=Environment(language=recipe.language)), facts)
    return [answer.reason for answer in answers if isinstance(answer, Declined) and answer.rule == "runtime-missing"]


def package(tool: str) -> str:
    """Debian's package of a tool."""
    return _PACKAGES.get(tool, tool)


def test_the_document_has_every_language() -> None:
    """The table of `docs/languages.md` is exactly what the recipes and the provider say."""
    table = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert table == [row(recipe) for recipe in RECIPES]


def row(recipe: Recipe) -> str:
    """The line of the table for one language."""
    names = ", ".join(f"`{name}`" for name in recipe.aliases)
    suffixes = ", ".join(f"`{suffix}`" for suffix in recipe.suffixes)
    packages = ", ".join(dict.fromkeys(f"`{package(tool)}`" for tool in recipe.runtimes))
    compiled = "yes" if recipe.compile else "no"
    return f"| `{recipe.language}` | {names} | {suffixes} | `{recipe.file}` | {packages} | {compiled} |"


def test_a_tool_that_no_sandbox_sees_is_not_found(tmp_path: Path) -> None:
    """A link out of `/usr` leads to nothing inside, so that what it names counts as missing."""
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o755)
    (tmp_path / "linked").symlink_to("/usr/bin/env")
    assert seen_inside(str(tmp_path / "linked"))
    assert not seen_inside(str(tmp_path / "tool"))
    assert all(Path(path).resolve().is_relative_to("/usr") for path in FOUND.values() if path.startswith("/usr"))


def test_settings_of_runtimes_are_copied_and_nothing_else(tmp_path: Path) -> None:
    """The stand-in for `/etc` holds files that everybody may read anyway, and none of the host's accounts or secrets."""
    etc = Path(make_etc(tmp_path))
    copied = {str(path.relative_to(etc)) for path in etc.rglob("*") if path.is_file()}
    ours = {"passwd", "group", "hosts", "nsswitch.conf", "ld.so.cache", "localtime", "fonts/fonts.conf"}
    assert {path.split("/")[0] for path in copied - ours} <= {"mono", "php", "R"} | {p.name for p in Path("/etc").glob("java-*")}
    assert all(Path("/etc", path).stat().st_mode & stat.S_IROTH for path in copied - ours)
    assert not any(path.is_symlink() for path in etc.rglob("*"))
    private = tmp_path / "private"
    private.write_text("password")
    private.chmod(0o640)
    assert not is_public(private)
    assert not is_public(tmp_path / "absent")
