"""What came of a run."""

from __future__ import annotations

import enum
from decimal import Decimal

import attrs

from sandstorm._check import one_of
from sandstorm._plan import Plan


class Outcome(enum.Enum):
    """How far a run got."""

    NOT_STARTED = "not-started"
    MAYBE_STARTED = "maybe-started"
    FINISHED = "finished"


@attrs.frozen(kw_only=True)
class Exit:
    """How the program ended.

    Attributes:
        kind: `exited`, `signal`, `deadline`, `out-of-memory`, `output-limit`, `disk-limit` or `compile-error`.
        code: The program's own exit code, or None where it did not get to give one.
        signal: The number of the signal that ended it, or None.
    """

    kind: str = attrs.field(
        default="exited",
        converter=one_of("kind", "exited", "signal", "deadline", "out-of-memory", "output-limit", "disk-limit", "compile-error"),
    )
    code: int | None = None
    signal: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with code 0."""
        return self.kind == "exited" and self.code == 0

    @property
    def status(self) -> int:
        """The exit status in the shell's convention: 124 for a deadline, 128 + n for a signal, 137 for a kill."""
        if self.kind == "deadline":
            return 124
        if self.code is not None:
            return self.code
        return 128 + (self.signal or 9)


@attrs.frozen(kw_only=True)
class Artifact:
    """A rich result of an interpreter: a picture, a table, a MIME bundle."""

    mime: str
    data: bytes
    name: str = ""


@attrs.frozen(kw_only=True)
class Attempt:
    """One try at one candidate.

    Attributes:
        provider: The account.
        offer: The offer's id.
        marker: The unique marker that was sent with the create.
        sandbox: The vendor's id of the sandbox, or None if there was none.
        outcome: How far it got.
        error: What went wrong, or None.
        error_class: The class of the error, or None.
        create_seconds: From the call of create to the sandbox, or None.
        start_seconds: From the call of create to the program running, or None.
        open: Whether something of it may still exist at the vendor.
        exposure: The most in US dollars that it can cost, or None where the price is unknown.
        cost: US dollars that it has cost so far, or None where the price is unknown.
    """

    provider: str
    offer: str
    marker: str
    sandbox: str | None = None
    outcome: Outcome = Outcome.NOT_STARTED
    error: str | None = None
    error_class: str | None = None
    create_seconds: float | None = None
    start_seconds: float | None = None
    open: bool = False
    exposure: Decimal | None = None
    cost: Decimal | None = None


@attrs.frozen(kw_only=True)
class RunResult:
    """What came of a run.

    Attributes:
        id: The id of the run.
        stdout: Exact bytes.
        stderr: Exact bytes.
        exit: How the program ended.
        outputs: The contents of the files that were asked for and exist, by path.
        artifacts: Rich results of an interpreter.
        outcome: How far it got.
        provider: The account that ran it.
        isolation: The level that was verified there.
        isolation_detail: One sentence about it.
        total_seconds: From the call to the result.
        run_seconds: From the program's start to its end.
        cost: US dollars so far for every attempt, or None where a price is unknown.
        cost_open: The most that may still be added, or None where unknown.
        cost_basis: `estimated`, `metered` or `billed`.
        attempts: Every try, in order.
        plan: The decision.
    """

    id: str
    stdout: bytes
    stderr: bytes
    exit: Exit
    outputs: dict[str, bytes] = attrs.field(factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    outcome: Outcome
    provider: str
    isolation: str
    isolation_detail: str = ""
    total_seconds: float
    run_seconds: float
    cost: Decimal | None
    cost_open: Decimal | None
    cost_basis: str = "estimated"
    attempts: tuple[Attempt, ...]
    plan: Plan

    @property
    def text(self) -> str:
        """Stdout as text, with undecodable bytes replaced."""
        return self.stdout.decode(errors="replace")
