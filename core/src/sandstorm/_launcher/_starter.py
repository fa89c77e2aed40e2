"""Starts programs at most once in a sandbox that knows nothing but a short exec."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

import trio

from sandstorm._errors import Ambiguous, CapacityError, Conflict, InvalidInput, NotSupported, ProviderDown, StreamLost
from sandstorm._launcher._access import BoundedExec
from sandstorm._launcher._answer import Answer, CutAnswerError, ImageTools, StartState, body, read_answer, read_image
from sandstorm._launcher._payload import digest, payload
from sandstorm._launcher._process import LaunchedProcess

if TYPE_CHECKING:
    from sandstorm.provider import Command

_PAUSES = (0.0, 0.1, 0.4, 1.0, 2.0)
"""Seconds before each try of one question, whose answers may get lost."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_CHUNK = 256 * 1024


class Launcher:
    """Start-once, tree kill, exact split output from an offset, and detachment, for one sandbox.

    `root` is a directory on the sandbox's own disk (never a volume, which a second sandbox could share); the user's id is
    added to its name. `workdir` is the work area. `answer_limit` is how many bytes of output one exec returns for sure, and
    `exec_timeout` how many seconds one may take.
    """

    def __init__(
        self,
        access: BoundedExec,
        *,
        root: str = "/tmp/.sandstorm",  # noqa: S108 - it is made 0700 and checked for its owner
        workdir: str = "/work",
        answer_limit: int = 1024 * 1024,
        exec_timeout: float = 30.0,
    ) -> None:
        self._access = access
        self._root = root
        self._workdir = workdir
        self._answer_limit = answer_limit
        self._timeout = exec_timeout
        self._image: ImageTools | None = None

    async def probe(self) -> ImageTools:
        """What the image lets the launcher do; `missing` names what it lacks. One exec, once. Raises `Ambiguous`."""
        if self._image is None:
            script = files("sandstorm._launcher").joinpath("launcher.sh").read_text()
            install = 'script=$1 verb=install; set -- install "$2" "$1"; eval "$script"'
            self._image = read_image(await self._ask("sh", "-c", install, "launcher", script, self._root))
        return self._image

    async def start(self, command: Command) -> LaunchedProcess:
        """The program, started by this call or by an earlier one with the same `start_id`.

        Raises `Conflict` where that id was burned or started something else, `CapacityError` where it certainly did not
        start, `Ambiguous` where it may have, `NotSupported` for a terminal or an image that lacks the tools.
        """
        if command.terminal is not None:
            raise NotSupported("the launcher gives no terminal")
        image = await self.probe()
        if image.missing:
            raise NotSupported(f"the image lacks what the launcher needs: {image.missing.strip()}")
        start_id = _checked(command.start_id or f"start-{secrets.token_hex(8)}")
        wanted = payload(command, self._workdir)
        expected = digest(wanted.data, image.hash)
        seconds = f"{command.timeout:.3f}" if image.naps == "short" else str(math.ceil(command.timeout))
        limits = (str(wanted.head), seconds, str(command.output_limit), wanted.input)
        for _ in range(3):
            file = await self.place(wanted.data)
            state = (await self.ask("start", start_id, file, expected, *limits)).state
            if state.state != "unstaged":
                break
        if state.state in {"absent", "unstaged", "locked"}:
            name = secrets.token_hex(8)
            state = await self.burn(start_id, name)
            if state.state == "burned" and state.digest == name:
                raise CapacityError(f"the launcher could not start {start_id}, and never will: is the sandbox's disk full?")
        return self._started(start_id, state, expected)

    async def process(self, process_id: str, offsets: Mapping[str, int]) -> LaunchedProcess:
        """A program by its start id, whose events begin at these offsets. Raises `Conflict` where it never started."""
        state = await self.state(process_id)
        if state.state in {"absent", "burned"}:
            raise Conflict(f"{process_id} has not started here")
        return LaunchedProcess(self, process_id, offsets, next_input=state.next_input)

    async def state(self, start_id: str) -> StartState:
        """How far a start has come."""
        return (await self.ask("poll", _checked(start_id), "0", "0", "0")).state

    async def burn(self, start_id: str, name: str = "") -> StartState:
        """Sees to it that a start which has not happened never will, and says which of the two it is.

        `name` stands as the digest of what is burned, so that whoever burned it first can tell.

        `burned`: it has not and will not. `started`, `done`, `lost`: it has. Anything else is undecided: ask again.
        """
        return (await self.ask("burn", _checked(start_id), name or secrets.token_hex(8))).state

    async def place(self, data: bytes) -> str:
        """The path of a new file in the sandbox with these bytes, which only its user can read."""

        async def chunks() -> AsyncIterator[bytes]:
            for begin in range(0, max(len(data), 1), _CHUNK):
                yield data[begin : begin + _CHUNK]

        image = await self.probe()
        file = f"{image.file.rpartition('/')[0]}/up.{secrets.token_hex(8)}"
        await self._access.upload(file, chunks())
        return file

    async def hashed(self, data: bytes) -> str:
        """The digest of these bytes, by the tool that the image has."""
        return digest(data, (await self.probe()).hash)

    async def ask(self, verb: str, *words: str, once: bool = False) -> Answer:
        """The script's answer, asked for again where it was lost, unless `once`. Raises `Ambiguous`."""
        image = await self.probe()
        return read_answer(await self._ask("sh", image.file, verb, *words, once=once), image.encoding)

    async def blocks(self) -> int:
        """How many blocks of 4096 bytes of each stream fit into one answer."""
        # An encoded byte takes 3 1/16 characters of `od` and 1.36 of base64; the state and the noise of a login shell take the rest.
        width = 3.1 if (await self.probe()).encoding == "od" else 1.37
        return max(1, int((self._answer_limit - 4096) / 2 / width) // 4096)

    async def _ask(self, *argv: str, once: bool = False) -> list[str]:
        last: Exception | None = None
        for pause in _PAUSES[: 1 if once else None]:
            await trio.sleep(pause)
            with trio.move_on_after(self._timeout):
                try:
                    return body((await self._access.exec(argv, timeout=self._timeout)).stdout)
                except (CutAnswerError, Ambiguous, ProviderDown, StreamLost) as error:
                    last = error
        raise Ambiguous(f"the launcher was asked {len(_PAUSES)} times, and no whole answer came back") from last

    def _started(self, start_id: str, state: StartState, expected: str) -> LaunchedProcess:
        if state.state == "burned":
            raise Conflict(f"{start_id} was burned: it never starts")
        if state.state not in {"started", "done", "lost"}:
            raise Ambiguous(f"{start_id} may have started: its gate is {state.state}")
        if state.digest != expected:
            raise Conflict(f"{start_id} has started something else")
        return LaunchedProcess(self, start_id, {}, next_input=state.next_input)


def _checked(start_id: str) -> str:
    if not _NAME.fullmatch(start_id):
        raise InvalidInput("start_id", "up to 100 letters, digits, dots, dashes and underscores", start_id)
    return start_id
