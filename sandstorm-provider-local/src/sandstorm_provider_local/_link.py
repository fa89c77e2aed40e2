"""A connection to the supervisor of one box: requests and their answers, and what programs write as it comes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs
import trio

from sandstorm import provider as contract
from sandstorm.provider import ProviderDown, SandboxGone, SandboxLost
from sandstorm_provider_local._inside._wire import close_all, receive, send

_PATIENCE = 30.0
"""Seconds for an answer that needs no work; a supervisor that stays silent so long has hung."""
_ERRORS: dict[str, type[Exception]] = {
    name: getattr(contract, name)
    for name in ("SandboxGone", "NotSupported", "InvalidInput", "CapacityError", "Conflict", "SandboxLost", "ProviderDown")
} | {"FileNotFound": FileNotFoundError}

Event = Mapping[str, Any]
Listener = Callable[[Event | None], None]
"""Takes the events of one program, and None once no more can come."""


@attrs.define
class _Pending:
    """A request without its answer yet."""

    done: trio.Event = attrs.field(factory=trio.Event)
    answer: Event | None = None
    fds: tuple[int, ...] = ()
    dropped: bool = False


class Link:
    """One connection. `run` has to run while it is used.

    `ended` is set once nothing more can come, `finished` once whoever attends to it has cleared up, too; `failure` is what
    the supervisor said. `leash` is whether the box ends with it, `condemned` whether it was told to. Raises `SandboxLost` for what is under way when it ends, and `SandboxGone` afterwards.
    """

    def __init__(self, connection: socket.socket, marker: str, *, leash: bool = False) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._marker = marker
        self._requests: dict[int, _Pending] = {}
        self._made = 0
        self._listeners: dict[str, list[Listener]] = {}
        self._sending = trio.Lock()
        self.ended = trio.Event()
        self.finished = trio.Event()
        self.leash = leash
        self.condemned = False
        self.left = False
        self.failure = ""

    async def run(self) -> None:
        """Hands out what arrives, until the supervisor is gone."""
        try:
            while (message := await self._receive()) is not None:
                self._take(*message)
        except trio.ClosedResourceError:
            pass  # this side ended it
        except (OSError, ValueError) as exc:
            self.failure = self.failure or f"its supervisor sent something else than expected: {exc}"
        finally:
            self.close()

    def close(self) -> None:
        """Ends it: a box that is not kept, and programs that are not detached, end with it."""
        if self.ended.is_set():
            return
        self.ended.set()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        for pending in self._requests.values():
            pending.done.set()
        for listener in [listener for listeners in self._listeners.values() for listener in listeners]:
            listener(None)

    def let_go(self) -> None:
        """Tells the supervisor that this side is done; `run` ends once it has seen to that."""
        self.left = True
        if not self.ended.is_set():
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def listen(self, process: str, listener: Listener) -> None:
        """Sends the events of a program to `listener`; ask with `follow` for them."""
        self._listeners.setdefault(process, []).append(listener)

    def forget(self, process: str, listener: Listener) -> bool:
        """Ends what `listen` began; whether nobody listens to the program any more."""
        listeners = self._listeners.get(process, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(process, None)
        return not listeners

    async def ask(self, op: str, fds: Sequence[int] = (), *, patience: float = _PATIENCE, **fields: Any) -> Event:
        """The answer to a request; descriptors that come with it are closed."""
        answer, received = await self.ask_for_fds(op, fds, patience=patience, **fields)
        close_all(received)
        return answer

    async def ask_for_fds(
        self, op: str, fds: Sequence[int] = (), *, patience: float = _PATIENCE, **fields: Any
    ) -> tuple[Event, tuple[int, ...]]:
        """The answer to a request and the descriptors that come with it, which are the caller's."""
        if self.ended.is_set():
            await trio.lowlevel.checkpoint()
            raise SandboxGone(f"the sandbox {self._marker} is gone")
        self._made += 1
        number, pending = self._made, _Pending()
        self._requests[number] = pending
        try:
            with trio.fail_after(patience):
                await self._send({"op": op, "n": number, **fields}, fds)
                await pending.done.wait()
        except trio.TooSlowError:
            raise SandboxLost(f"the supervisor of {self._marker} has not answered for {patience:g} seconds") from None
        finally:
            if pending.answer is None:
                pending.dropped = True
            if pending.done.is_set():
                del self._requests[number]
        if pending.answer is None:
            raise SandboxLost(f"the sandbox {self._marker} ended meanwhile{self.failure and ': ' + self.failure}")
        return _checked(pending.answer, pending.fds), pending.fds

    async def _send(self, message: Event, fds: Sequence[int]) -> None:
        async with self._sending:
            while not self.ended.is_set():
                try:
                    send(self._socket, dict(message), fds)
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                except (BrokenPipeError, ConnectionResetError):
                    # What was sent before is still to be read: `run` finds the end.
                    await self.ended.wait()

    async def _receive(self) -> tuple[Event, tuple[int, ...]] | None:
        while True:
            try:
                found = receive(self._socket)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            except ConnectionResetError:
                return None
            return None if found is None else (found[0], tuple(found[1]))

    def _take(self, message: Event, fds: tuple[int, ...]) -> None:
        number = message.get("n")
        pending = self._requests.get(number) if isinstance(number, int) else None
        if pending is not None and not pending.done.is_set():
            pending.answer, pending.fds = message, fds
            pending.done.set()
            if pending.dropped:
                del self._requests[number]  # type: ignore[arg-type]
                close_all(fds)
            return
        close_all(fds)
        if message.get("event") == "failed":
            self.failure = str(message.get("error"))
        if "event" in message:
            for listener in list(self._listeners.get(str(message.get("process")), ())):
                listener(message)


def _checked(answer: Event, fds: Sequence[int]) -> Event:
    """The answer, or the error that it carries."""
    name = answer.get("error")
    if name is None:
        return answer
    close_all(fds)
    message = str(answer.get("message", name))
    if name == "InvalidInput":
        raise contract.InvalidInput("request", "what the supervisor takes", message)
    raise _ERRORS.get(str(name), ProviderDown)(message)
