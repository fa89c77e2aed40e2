"""What a persistent sandbox costs on this machine: making it, a program and a cell in it, its end, and what it keeps in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count as numbers
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import trio
from _bare import Bare, bare
from _local import PAUSE_SECONDS, client, open_up
from _measure import Figure, Pairs, in_turns, interleaved, process_seconds, timed
from _residents import Resident, residents

from sandstorm import SandboxSpec
from sandstorm.provider import Command, Exit, Offer, Order
from sandstorm_provider_local import LocalProvider
from sandstorm_provider_local._session import LocalSession

CREATE_X, EXEC_FACTOR, EXEC_MS, CELL_MS, DESTROY_MS, SUPERVISOR_MIB = 2.5, 1.1, 3.0, 5.0, 15.0, 12.0
PROGRAMS = {
    "python3 -I -S -c pass": ("/usr/bin/python3", "-I", "-S", "-c", "pass"),
    "/bin/true": ("/bin/true",),
}
LIVE, QUICK_LIVE = 100, 5
WARM_UP = 5
_PATIENCE = 30.0


@attrs.frozen
class Bench:
    """A session with its baseline, where both keep their state, and how many repetitions there are to be of 100."""

    session: LocalSession
    bare: Bare
    folder: str
    state: str
    share: float
    made: Iterator[int] = attrs.field(factory=lambda: numbers(1))

    def times(self, full: int) -> int:
        """How often to measure what is measured `full` times where there is time."""
        return max(4, int(full * self.share))

    async def create(self) -> Any:
        """A box for the default spec, through the public contract."""
        spec = SandboxSpec()
        assert self.session._facts is not None
        offer = LocalProvider().offers(spec, self.session._facts)[0]
        assert isinstance(offer, Offer), offer
        marker = f"bench-{next(self.made)}"
        soon = trio.current_time() + _PATIENCE
        return await self.session.create(Order(spec=spec, offer=offer, marker=marker, dispatch_by=soon, lifetime=600.0))


def measure(quick: bool) -> Iterable[Figure]:
    """Ratios to the spawn of bubblewrap and to a plain subprocess, milliseconds, and MiB of 100 boxes at once."""
    with tempfile.TemporaryDirectory(prefix="sandstorm-bench-") as folder:
        open_up(folder)
        for part in (_lives, _programs, _through_client, _memory):
            yield from trio.run(with_bench, part, folder, 0.05 if quick else 1.0)


async def with_bench(part: Any, folder: str, share: float) -> list[Figure]:
    """What `part` measures with a session whose state is in this folder."""
    state = f"{folder}/state"
    async with bare(state) as (session, baseline):
        figures: list[Figure] = await part(Bench(session, baseline, folder, state, share))
        return figures


# --- beginning and end ------------------------------------------------------------------------------------------------


async def _lives(bench: Bench) -> list[Figure]:
    figures, ends = [], []

    async def created(pause: float) -> float:
        time.sleep(pause)  # noqa: ASYNC251 - nothing else is to run meanwhile
        began = time.perf_counter()
        box = await bench.create()
        seconds = time.perf_counter() - began
        await _run(box, PROGRAMS["/bin/true"])
        ends.append(await _destroyed(box))
        return seconds

    for name, pause, count in (("", 0.0, 100), (", each after a pause", PAUSE_SECONDS, 60)):
        for _ in range(WARM_UP):
            await created(0.0)
            bench.bare.run()
        pairs = await in_turns(partial(created, pause), partial(_after_pause, bench.bare, pause), bench.times(count))
        figures.append(
            Figure(
                name=f"create of a box{name}",
                value=pairs.ratio,
                unit="x",
                target=CREATE_X,
                baseline=f"bubblewrap with python3 -I -S, the same seccomp, user and cgroup: {_ms(pairs.baseline)}",
                detail=f"{_ms(pairs.subject)} until its agent has answered; {pairs.spread}; {bench.bare.level}",
            )
        )
    figures.append(
        Figure(
            name="destroy of a box",
            value=median(ends) * 1000,
            unit="ms",
            target=DESTROY_MS,
            detail=f"until no process, cgroup or file of it is left; {_spread(ends)}",
        )
    )
    return figures


async def _destroyed(box: Any) -> float:
    places = Path(box.native.directory), Path("/proc") / str(box.native.agent_pid)
    assert _which_exist(*places) == list(places)
    began = time.perf_counter()
    await box.destroy()
    seconds = time.perf_counter() - began
    assert _which_exist(*places) == []
    return seconds


def _which_exist(*places: Path) -> list[Path]:
    return [place for place in places if place.exists()]


def _after_pause(baseline: Bare, pause: float) -> float:
    time.sleep(pause)
    return timed(baseline.run)


# --- programs ---------------------------------------------------------------------------------------------------------


async def _programs(bench: Bench) -> list[Figure]:
    box = await bench.create()
    figures = []
    for name, argv in PROGRAMS.items():
        for _ in range(WARM_UP):
            await _run(box, argv)
        pairs = await in_turns(partial(_run, box, argv), partial(process_seconds, argv), bench.times(300))
        figures.append(_exec_figure(f"exec of {name} in a box, beyond {EXEC_FACTOR} x a plain one", pairs))
    cells = [await _cell(box) for _ in range(WARM_UP + bench.times(300))][WARM_UP:]
    figures.append(_cell_figure("warm cell `1+1` in a box", cells))
    await box.destroy()
    return figures


def _exec_figure(name: str, pairs: Pairs) -> Figure:
    return Figure(
        name=name,
        value=pairs.beyond(EXEC_FACTOR) * 1000,
        unit="ms",
        target=EXEC_MS,
        baseline=f"subprocess.run of the same program: {_ms(pairs.baseline)}",
        detail=f"{_ms(pairs.subject)} in the box; {pairs.spread}",
    )


def _cell_figure(name: str, seconds: Sequence[float]) -> Figure:
    return Figure(name=name, value=median(seconds) * 1000, unit="ms", target=CELL_MS, detail=_spread(seconds))


async def _run(box: Any, argv: Sequence[str]) -> float:
    """Seconds from the request until all output and the exit are there."""
    began = time.perf_counter()
    exit_, _ = await _outcome(await box.start(Command(argv=tuple(argv), timeout=_PATIENCE)))
    seconds = time.perf_counter() - began
    assert exit_.ok, exit_
    return seconds


async def _cell(box: Any) -> float:
    began = time.perf_counter()
    exit_, said = await _outcome(await box.run_cell("1+1", "python", Command(argv=(), timeout=_PATIENCE)))
    seconds = time.perf_counter() - began
    assert exit_.ok, exit_
    assert b"2" in said, said
    return seconds


async def _outcome(process: Any) -> tuple[Exit, bytes]:
    said = b""
    async with process.events() as events:
        async for event in events:
            if isinstance(event, Exit):
                return event, said
            said += event.data
    raise AssertionError("no exit")


# --- through the client -----------------------------------------------------------------------------------------------


async def _through_client(bench: Bench) -> list[Figure]:
    """What a user of the blocking client waits for: the journal, and the way to its thread and back, come on top."""
    argv = PROGRAMS["python3 -I -S -c pass"]
    with client(bench.folder, bench.state) as sandstorm:

        def made() -> float:
            with ExitStack() as stack:
                began = time.perf_counter()
                stack.enter_context(sandstorm.sandbox())
                return time.perf_counter() - began

        for _ in range(WARM_UP):
            made()
        creates = interleaved(made, lambda: timed(bench.bare.run), bench.times(60))
        with sandstorm.sandbox() as box:

            def executed() -> None:
                assert box.run(argv=argv).exit.ok

            def celled() -> None:
                assert b"2" in box.run("1+1", "python", keep_state=True).stdout

            for _ in range(WARM_UP):
                executed()
                celled()
            execs = interleaved(lambda: timed(executed), lambda: process_seconds(argv), bench.times(100))
            cells = [timed(celled) for _ in range(bench.times(100))]
    return [
        Figure(
            name="create of a box through the client",
            value=creates.ratio,
            unit="x",
            target=CREATE_X,
            baseline=f"bubblewrap, as above: {_ms(creates.baseline)}",
            detail=f"{_ms(creates.subject)}; {creates.spread}; synced SQLite file",
        ),
        _exec_figure("exec of python3 -I -S -c pass through the client, likewise", execs),
        _cell_figure("warm cell `1+1` through the client", cells),
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


async def _memory(bench: Bench) -> list[Figure]:
    """Each of 100 boxes at once has run a program."""
    wanted = LIVE if bench.share >= 1.0 else QUICK_LIVE
    boxes = []
    for _ in range(wanted):
        boxes.append(await bench.create())
        await _run(boxes[-1], PROGRAMS["/bin/true"])
    found = [residents(Path(box.native.directory)) for box in boxes]
    for box in boxes:
        await box.destroy()

    return [
        _memory_figure("supervisor of a box", [each.supervisor for each in found], SUPERVISOR_MIB),
        _memory_figure("bubblewrap, agent and spare keeper of a box", [each.inside for each in found], None),
    ]


def _memory_figure(name: str, found: Sequence[Resident], target: float | None) -> Figure:
    rss, pss = [each.rss for each in found], [each.pss for each in found]
    return Figure(
        name=name,
        value=max(rss),
        unit="MiB",
        target=target,
        detail=f"the largest RSS of {len(found)} live boxes, each of which has run a program; "
        f"median RSS {median(rss):.1f} MiB, PSS {median(pss):.1f} MiB",
    )


def _ms(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1000:.1f} ms"


def _spread(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return f"{len(ordered)} times, half of them within {ordered[quarter] * 1000:.1f}..{ordered[-1 - quarter] * 1000:.1f} ms"
