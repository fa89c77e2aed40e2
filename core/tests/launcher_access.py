"""A bounded exec over real processes of this machine, which can be made to lose, cut, repeat and delay."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterable, Sequence
from pathlib import Path

import trio

from sandstorm._launcher import BoundedExec, ExecAnswer
from sandstorm.provider import Ambiguous


class LocalExec:
    """Runs the script under a chosen `sh`: with `chance`, an exec suffers a fault drawn from `random`.

    With `only`, the programs beside `shell` are all that there are.
    """

    def __init__(self, shell: Path, *, chance: float = 0.0, random: random.Random | None = None, only: bool = False) -> None:
        self._path = str(shell.parent) if only else f"{shell.parent}:{os.environ['PATH']}"
        self._chance = chance
        self._random = random

    async def exec(self, argv: Sequence[str], *, timeout: float) -> ExecAnswer:
        fault = self._fault()
        if fault == "unsent":
            raise Ambiguous("not even sent")
        if fault == "concurrent":
            answers: list[ExecAnswer] = []
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(self._into, answers, argv)
            return answers[0]
        if fault == "twice":
            await self._run(argv)
        answer = await self._run(argv)
        if fault == "lost":
            raise Ambiguous("the answer is lost")
        if fault == "cut":
            return ExecAnswer(code=0, stdout=answer.stdout[: len(answer.stdout) // 2])
        if fault == "late":
            await trio.sleep(0.1)
        return answer

    async def upload(self, path: str, chunks: AsyncIterable[bytes]) -> None:
        await trio.Path(path).write_bytes(b"".join([chunk async for chunk in chunks]))

    def _fault(self) -> str | None:
        if self._random is None or self._random.random() >= self._chance:
            return None
        return self._random.choice(["unsent", "concurrent", "twice", "lost", "cut", "late"])

    async def _into(self, answers: list[ExecAnswer], argv: Sequence[str]) -> None:
        answers.append(await self._run(argv))

    async def _run(self, argv: Sequence[str]) -> ExecAnswer:
        found = shutil.which(argv[0], path=self._path)
        environment = {**os.environ, "PATH": self._path}
        done = await trio.run_process(
            [argv[0], *argv[1:]],
            executable=found,
            env=environment,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return ExecAnswer(code=done.returncode, stdout=b"motd of a login shell\n" + done.stdout, stderr=done.stderr)


def conforms(access: LocalExec) -> BoundedExec:
    """The same object, for the type checker."""
    return access
