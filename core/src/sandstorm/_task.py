"""What to run in a sandbox."""

from __future__ import annotations

import attrs

from sandstorm._check import data, number, one_of, text, texts, whole
from sandstorm._errors import InvalidInput
from sandstorm._spec import refuse_escape

EFFECTS = ("unknown", "idempotent", "none")


@attrs.frozen(kw_only=True)
class Task:
    """What to run: code in a language, or a command.

    Attributes:
        code: Source text; needs `language`.
        language: The name of a language recipe, such as `python`.
        argv: A command instead of code.
        args: Arguments for the program, after the code's file name.
        stdin: What the program reads; it ends after these bytes.
        timeout: Seconds from the program's start (compile steps included) after which it is killed.
        output_limit: Bytes of stdout and stderr together, after which the program is killed.
        outputs: Relative paths of files to bring back after the program ended.
        effects: Whether running twice matters: `unknown` (the default), `idempotent` or `none`.
    """

    code: str | None = attrs.field(default=None, converter=text("code", "source text", optional=True))
    language: str | None = attrs.field(default=None, converter=text("language", "a language", optional=True, filled=True))
    argv: tuple[str, ...] = attrs.field(default=(), converter=texts("argv", "a list of arguments"))
    args: tuple[str, ...] = attrs.field(default=(), converter=texts("args", "a list of arguments"))
    stdin: bytes = attrs.field(default=b"", converter=data("stdin"))
    timeout: float = attrs.field(default=300.0, converter=number("timeout", "a number of seconds above 0", above=True))
    output_limit: int = attrs.field(
        default=16 * 1024 * 1024, converter=whole("output_limit", "a whole number of bytes, at least 1", low=1)
    )
    outputs: tuple[str, ...] = attrs.field(default=(), converter=texts("outputs", "a list of paths"))
    effects: str = attrs.field(default="unknown", converter=one_of("effects", *EFFECTS))

    def __attrs_post_init__(self) -> None:
        if (self.code is None) == (not self.argv):
            raise InvalidInput("code", "either code or argv, and not both", self.code)
        if self.code is not None and self.language is None:
            raise InvalidInput("language", "a language, since there is code", None)
        if self.argv and not self.argv[0]:
            raise InvalidInput("argv", "a program to run first", self.argv)
        if self.argv and self.language is not None:
            raise InvalidInput("language", "no language beside argv", self.language)
        for path in self.outputs:
            refuse_escape("outputs", path)
