"""Language recipes: how code becomes a program. One table, open to plugins."""

from __future__ import annotations

from pathlib import PurePath

import attrs

from sandstorm._check import texts
from sandstorm._errors import InvalidInput


@attrs.frozen(kw_only=True)
class Recipe:
    """How the code of one language is run.

    Attributes:
        language: Its name.
        aliases: Other names of it.
        suffixes: File name endings that tell it, such as `.py`.
        file: The name under which the code is stored in the work area.
        runtimes: Programs that a provider must have, such as `python3`.
        compile: A command that must succeed first, in the work area; empty for none.
        run: The command that runs it, in the work area; the task's arguments follow.
    """

    language: str
    aliases: tuple[str, ...] = attrs.field(default=(), converter=texts("aliases"))
    suffixes: tuple[str, ...] = attrs.field(default=(), converter=texts("suffixes"))
    file: str
    runtimes: tuple[str, ...] = attrs.field(default=(), converter=texts("runtimes"))
    compile: tuple[str, ...] = attrs.field(default=(), converter=texts("compile"))
    run: tuple[str, ...] = attrs.field(default=(), converter=texts("run"))


RECIPES = (
    Recipe(
        language="python",
        aliases=("py", "python3"),
        suffixes=(".py",),
        file="main.py",
        runtimes=("python3",),
        run=("python3", "main.py"),
    ),
    Recipe(
        language="javascript",
        aliases=("js", "node"),
        suffixes=(".js", ".mjs", ".cjs"),
        file="main.js",
        runtimes=("node",),
        run=("node", "main.js"),
    ),
    Recipe(
        language="bash",
        aliases=("sh", "shell"),
        suffixes=(".sh", ".bash"),
        file="main.sh",
        runtimes=("bash",),
        run=("bash", "main.sh"),
    ),
)


def recipe_runtimes(language: str) -> tuple[str, ...]:
    """The programs that a provider must have for a built-in language; the language itself where it is not built in."""
    return next((recipe.runtimes for recipe in RECIPES if recipe.language == language), (language,))


@attrs.frozen
class Languages:
    """The recipes that are known, the built-in ones first."""

    recipes: tuple[Recipe, ...] = RECIPES

    def recipe(self, name: str) -> Recipe:
        """The recipe with this name or alias. Raises `InvalidInput`."""
        wanted = name.lower()
        for recipe in self.recipes:
            if wanted == recipe.language or wanted in recipe.aliases:
                return recipe
        raise InvalidInput("language", "one of " + ", ".join(sorted(recipe.language for recipe in self.recipes)), name)

    def of_file(self, path: str) -> Recipe | None:
        """The recipe that the file's name tells, or None."""
        suffix = PurePath(path).suffix.lower()
        return next((recipe for recipe in self.recipes if suffix in recipe.suffixes), None)
