"""What a provider is held against: every clause has an id that does not change, a sentence, a source and a purpose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs

_CONTRACT = "design: Provider contract"
_LIFECYCLE = "design: Lifecycle"
_PROTOCOL = "sandstorm.provider"


@attrs.frozen
class Clause:
    """One promise: its stable id, one sentence, where it comes from, and what it protects."""

    id: str
    sentence: str
    source: str
    protects: str


CLAUSES = (
    Clause("offer:size:at-least-as-asked", "An offer is at least as large as the spec.", _PROTOCOL, "the program's memory"),
    Clause("find:after-create:within-declared-lag", "A sandbox is listed once the find lag is over.", _LIFECYCLE, "no leaks"),
    Clause("find:marker:sees-own-only", "A look-up by marker shows what carries it alone.", _PROTOCOL, "others' sandboxes"),
    Clause("find:destroyed:gone", "A destroyed sandbox is not listed any more.", _LIFECYCLE, "no double clean-up"),
    Clause("create:dispatch-by:refused", "Past `dispatch_by` a create is refused unsent.", _LIFECYCLE, "proofs of absence"),
    Clause("lifecycle:start-twice:runs-once", "The same start id starts one program.", _LIFECYCLE, "nothing runs twice"),
    Clause("limits:lifetime:enforced", "A sandbox ends after its lifetime by itself.", _LIFECYCLE, "the budget"),
    Clause("destroy:twice:ok", "Destroying again succeeds.", _PROTOCOL, "clean-up that was cut off"),
    Clause("attach:by-id:same-sandbox", "An attached sandbox has the files of the one with this id.", _PROTOCOL, "take-over"),
    Clause("attach:unknown:gone", "Attaching to an unknown id raises `SandboxGone`.", _PROTOCOL, "take-over"),
    Clause("exec:output:binary-exact", "Every byte of stdout arrives, with true offsets.", _CONTRACT, "results"),
    Clause("exec:output:split", "stdout and stderr arrive apart.", _CONTRACT, "results"),
    Clause("exec:stream:ends-with-exit", "A stream has one exit, and it is last.", _CONTRACT, "a cut is not success"),
    Clause("exec:stdin:eof", "A program reads its stdin to the last byte, and then its end.", _PROTOCOL, "programs that hang"),
    Clause("exit:code:exact", "The program's own exit code is told.", _PROTOCOL, "failures that look like success"),
    Clause("exit:signal:named", "A program that dies by a signal is told to have done so.", _PROTOCOL, "diagnosis"),
    Clause("limits:deadline:kills-the-tree", "At the timeout, children end too.", _PROTOCOL, "work nobody pays for"),
    Clause("limits:output:cut", "Output past its limit is cut there, and the exit says so.", _PROTOCOL, "the router's memory"),
    Clause("kill:running:ends", "A killed program ends by a signal; killing again succeeds.", _PROTOCOL, "cancellation"),
    Clause("files:round-trip:exact", "Empty, binary and 5 MiB files come back as they were.", _PROTOCOL, "data"),
    Clause("files:names:metacharacters", "A file name with shell metacharacters is a name.", _PROTOCOL, "injection"),
    Clause("files:path:refuses-escape", "A path that leaves the work area is refused.", _PROTOCOL, "the host"),
    Clause("files:missing:named", "Downloading what is not there raises `FileNotFoundError`.", _PROTOCOL, "diagnosis"),
    Clause("abilities:reconnect:at-offset", "Output taken up again begins at its offset.", _PROTOCOL, "cut streams"),
    Clause("abilities:declared:present", "A declared ability has its protocol.", _CONTRACT, "routing by ability"),
)

Test = Callable[[Any, Any], Awaitable[None]]


def clause(clause_id: str) -> Callable[[Test], Callable[[Any, Any], None]]:
    """Makes an async check of one clause a test, which runs it with an account of the fixture's provider."""
    known = {each.id: each for each in CLAUSES}[clause_id]

    def decorate(check: Test) -> Callable[[Any, Any], None]:
        def test(self: Any, provider: Any) -> None:
            self.run_check(check, provider)

        test.__name__ = check.__name__
        test.__qualname__ = check.__qualname__
        test.__doc__ = known.sentence
        test.clause = known  # type: ignore[attr-defined] # where tests and reports find it
        return test

    return decorate


def document() -> str:
    """The page of the clauses."""
    rows = [f"| `{each.id}` | {each.sentence} | {each.source} | {each.protects} |" for each in CLAUSES]
    head = ["# The clauses of the conformance suite", "", "Generated from the suite; a test checks that it is current.", ""]
    return "\n".join([*head, "| clause | what it says | source | protects |", "|---|---|---|---|", *rows, ""])
