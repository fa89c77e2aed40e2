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


# Debian's compiler knows no types of Node's interfaces, and there is no network to fetch them: so they are `any`, and errors
# that only come from types missing there (2503, 2694, 2709, 2749) do not count. All else of the program is checked.
# Modules are CommonJS, which every Node takes from a `.js` file. No such file, and the compiler itself was ended.
_TYPESCRIPT = """\
cat > .node.d.ts <<'END'
declare module "*";
declare var process: any, require: any, module: any, exports: any, global: any, __dirname: string, __filename: string;
declare var Buffer: any, setImmediate: any, clearImmediate: any;
declare type Buffer = any;
declare namespace NodeJS { type Timeout = any; type ErrnoException = any; type ProcessEnv = any }
END
rm -f main.js
tsc --target es2022 --module commonjs --moduleResolution node --esModuleInterop --skipLibCheck --pretty false \
  main.ts .node.d.ts > .errors || ! grep -vE 'error TS(2503|2694|2709|2749):' .errors | grep 'error TS' >&2 && [ -f main.js ]
"""

# A public type must be in a file of its name, and `java` must be told the type whose `main` it calls: so both are read from
# the source, where top-level types begin at the left margin. Where that finds nothing, Java says what it expects.
_JAVA = """\
type='((final|abstract|sealed|non-sealed|strictfp) +)*(class|record|enum|interface) +([A-Za-z0-9_$]+).*'
file=$(sed -nE "s/^public +$type/\\4/p" Main.java | head -n 1)
name="s/^(public +)?$type/\\5/p"
main=$(sed -nE "/static +void +main *[(]/ { $name; q; }; $name" Main.java | tail -n 1)
package=$(sed -nE 's/^package +([A-Za-z0-9_.$]+) *;.*/\\1./p' Main.java | head -n 1)
mkdir -p .classes && echo "$package${main:-Main}" > .classes/main
[ "${file:=Main}" = Main ] || mv Main.java "$file.java"
exec javac -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -J-XX:-UsePerfData -proc:none -encoding UTF-8 -d .classes "$file.java"
"""

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
        language="typescript",
        aliases=("ts",),
        suffixes=(".ts",),
        file="main.ts",
        runtimes=("tsc", "node"),
        compile=("sh", "-c", _TYPESCRIPT),
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
    Recipe(
        language="c",
        suffixes=(".c",),
        file="main.c",
        runtimes=("gcc",),
        compile=("gcc", "-O2", "-pipe", "-o", "main", "main.c", "-lm"),
        run=("./main",),
    ),
    Recipe(
        language="cpp",
        aliases=("c++", "cxx"),
        suffixes=(".cpp", ".cc", ".cxx"),
        file="main.cpp",
        runtimes=("g++",),
        compile=("g++", "-std=c++20", "-O2", "-pipe", "-o", "main", "main.cpp"),
        run=("./main",),
    ),
    Recipe(
        language="rust",
        aliases=("rs",),
        suffixes=(".rs",),
        file="main.rs",
        runtimes=("rustc", "gcc"),
        compile=("rustc", "--edition", "2021", "-O", "-C", "linker=gcc", "-o", "main", "main.rs"),
        run=("./main",),
    ),
    Recipe(
        language="go",
        aliases=("golang",),
        suffixes=(".go",),
        file="main.go",
        runtimes=("go",),
        # The work area, since what is built of the standard library may be larger than /tmp.
        compile=("env", "GOTMPDIR=.", "CGO_ENABLED=0", "go", "build", "-o", "main", "main.go"),
        run=("./main",),
    ),
    Recipe(
        language="java",
        suffixes=(".java",),
        file="Main.java",
        runtimes=("javac", "java"),
        compile=("sh", "-c", _JAVA),
        run=("java", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-cp", ".classes", "@.classes/main"),
    ),
    Recipe(
        language="csharp",
        aliases=("c#", "cs"),
        suffixes=(".cs",),
        file="main.cs",
        runtimes=("mcs", "mono"),
        compile=("mcs", "-nologo", "-langversion:latest", "-optimize", "-r:System.Numerics.dll", "-out:main.exe", "main.cs"),
        run=("mono", "main.exe"),
    ),
    Recipe(
        language="php",
        suffixes=(".php",),
        file="main.php",
        runtimes=("php",),
        # Without a php.ini, and there may be none, errors would go to stdout and be told twice.
        run=("php", "-d", "display_errors=stderr", "-d", "log_errors=0", "main.php"),
    ),
    Recipe(
        language="ruby",
        aliases=("rb",),
        suffixes=(".rb",),
        file="main.rb",
        runtimes=("ruby",),
        run=("ruby", "main.rb"),
    ),
    Recipe(
        language="r",
        aliases=("rscript",),
        suffixes=(".r",),
        file="main.R",
        runtimes=("Rscript",),
        run=("Rscript", "main.R"),
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
