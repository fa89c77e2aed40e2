"""Writes operations in order, those that wait at the same time in one transaction, and wakes the tasks that wait for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import attrs
import trio

from sandstorm_store_postgres._database import Connection

_T = TypeVar("_T")
_log = logging.getLogger("sandstorm.postgres")

LINGER_SECONDS = 0.05
"""How long what nobody waits for may stay unwritten, in the hope of sharing the next commit."""


@attrs.define(eq=False)
class Operation:
    """Something to write, and the task that waits for it, if one does."""

    action: Callable[[Connection], Any]
    task: trio.lowlevel.Task | None = None
    result: Any = None
    error: Exception | None = None


class Writer:
    """Hands operations to `commit`: in a thread of its own where there is a loop to wake, else when called.

    `commit` fills in the result or the error of each, and raises nothing.
    """

    def __init__(self, commit: Callable[[Sequence[Operation]], None], token: trio.lowlevel.TrioToken | None) -> None:
        self._commit = commit
        self._token = token
        self._queue: deque[Operation] = deque()
        self._wake = threading.Event()
        self._asleep = False
        self._writing = False
        self._closing = False
        self._thread: threading.Thread | None = None
        if token is not None:
            # A daemon, so that a loop that died without closing the store does not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="sandstorm-postgres", daemon=True)
            self._thread.start()

    @property
    def behind(self) -> bool:
        """Whether something that was handed over may not be committed yet."""
        return self._writing or bool(self._queue)

    @trio.lowlevel.enable_ki_protection  # a task that is queued has to be waiting when it is woken
    async def write(self, action: Callable[[Connection], Any]) -> Any:
        """Queues `action` and waits for its commit. Cancelling ends the wait, not the write."""
        operation = Operation(action, trio.lowlevel.current_task())
        self._queue.append(operation)
        self._wake.set()

        def forget(_: object) -> trio.lowlevel.Abort:
            operation.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(forget)
        if operation.error is not None:
            raise operation.error
        return operation.result

    def write_soon(self, action: Callable[[Connection], Any]) -> None:
        """Queues `action` for the next commit; a failure is logged."""
        operation = Operation(action)
        if self._thread is None:
            self._commit([operation])
            _log_failure(operation)
            return
        self._queue.append(operation)
        if self._asleep:
            self._wake.set()

    def write_now(self, action: Callable[[Connection], _T]) -> _T:
        """Commits `action` on the calling thread."""
        operation = Operation(action)
        self._commit([operation])
        if operation.error is not None:
            raise operation.error
        result: _T = operation.result
        return result

    def close(self) -> None:
        """Writes what is queued and ends the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while self._queue or not self._closing:
            self._wake.wait(LINGER_SECONDS)
            if not self._queue:
                self._sleep()
            self._wake.clear()
            # Said before the queue is emptied, so that `behind` never misses what is between the two.
            self._writing = True
            batch = [self._queue.popleft() for _ in range(len(self._queue))]
            if batch:
                self._commit(batch)
            self._writing = False
            self._wake_waiters(batch)

    def _sleep(self) -> None:
        """Waits for something to do. `_asleep` tells `write_soon` that it has to wake us."""
        self._asleep = True
        if not self._queue and not self._closing:
            self._wake.wait()
        self._asleep = False

    def _wake_waiters(self, batch: Sequence[Operation]) -> None:
        for operation in batch:
            if operation.task is None:
                _log_failure(operation)
        assert self._token is not None
        if any(operation.task is not None for operation in batch):
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(_reschedule, batch)


def _reschedule(batch: Sequence[Operation]) -> None:
    for operation in batch:
        if operation.task is not None:
            task, operation.task = operation.task, None
            trio.lowlevel.reschedule(task)


def _log_failure(operation: Operation) -> None:
    if operation.error is not None:
        _log.error("not written, and nobody waited for it: %s", operation.error)
