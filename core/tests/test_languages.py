"""The table of languages: every name means one recipe, and every recipe makes commands that can be run."""

from __future__ import annotations

import subprocess
from collections import Counter

import pytest

from sandstorm import InvalidInput, Task
from sandstorm._languages import RECIPES, Languages, Recipe
from sandstorm._program import program
from sandstorm.provider import recipe_runtimes

PROMISED = "python javascript typescript bash c cpp rust go java csharp php ruby r"


def test_the_promised_languages_are_there() -> None:
    """All thirteen languages have a recipe, in the order in which they are documented."""
    assert " ".join(recipe.language for recipe in RECIPES) == PROMISED


def test_no_name_and_no_suffix_means_two_languages() -> None:
    """Names, other names and suffixes are unique and lower-case, so that a lookup has one answer."""
    names = [name for recipe in RECIPES for name in (recipe.language, *recipe.aliases)]
    suffixes = [suffix for recipe in RECIPES for suffix in recipe.suffixes]
    assert [name for name, count in Counter((*names, *suffixes)).items() if count > 1] == []
    assert all(name == name.lower() for name in (*names, *suffixes))


@pytest.mark.parametrize(
    ("name", "language"), [("TS", "typescript"), ("c++", "cpp"), ("C#", "csharp"), ("golang", "go"), ("R", "r"), ("rb", "ruby")]
)
def test_a_language_is_found_by_any_of_its_names(name: str, language: str) -> None:
    """Other names count, in any case of letters."""
    assert Languages().recipe(name).language == language


@pytest.mark.parametrize(
    ("path", "language"), [("a/plot.R", "r"), ("x.CC", "cpp"), ("Main.java", "java"), ("lib.rs", "rust"), ("notes.txt", None)]
)
def test_a_file_tells_its_language(path: str, language: str | None) -> None:
    """The suffix decides, and one that no language has tells nothing."""
    found = Languages().of_file(path)
    assert (found and found.language) == language


def test_an_unknown_language_is_refused_with_those_that_are_known() -> None:
    """The error lists every language."""
    with pytest.raises(InvalidInput) as caught:
        Languages().recipe("cobol")
    assert all(name in str(caught.value) for name in PROMISED.split())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.language)
def test_a_recipe_needs_what_its_commands_call(recipe: Recipe) -> None:
    """Each command begins with a tool that the recipe declares, with what it has built, or with what every system has."""
    programs = [recipe.run[0], *recipe.compile[:1]]
    assert {*programs} <= {*recipe.runtimes, "./main", "sh", "env"}
    assert all(any(tool in word for word in (*recipe.compile, *recipe.run)) for tool in recipe.runtimes)
    assert any(recipe.file in word for word in (*recipe.compile, *recipe.run))
    assert recipe_runtimes(recipe.language) == recipe.runtimes


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.compile], ids=lambda recipe: recipe.language)
def test_a_compiled_language_is_compiled_first_and_without_the_programs_input(recipe: Recipe) -> None:
    """The compiler gets neither input nor arguments; the program gets both, and each start has an id of its own."""
    task = Task(code="code", language=recipe.language, stdin="input", args=["first", "second"])
    made = program(task, Languages(), "start")
    compiling, running = made.commands
    assert made.files == {recipe.file: b"code"}
    assert (compiling.argv, compiling.stdin) == (recipe.compile, b"")
    assert (running.argv, running.stdin) == ((*recipe.run, "first", "second"), b"input")
    assert compiling.start_id != running.start_id


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.compile[:1] == ("sh",)], ids=lambda recipe: recipe.language
)
def test_scripts_are_plain_shell(recipe: Recipe) -> None:
    """A compile step that is a script parses in the system's `sh`."""
    checked = subprocess.run(["sh", "-n", "-c", recipe.compile[2]], capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
