"""Delivers events to sinks, each through a bounded queue of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from sandstorm._events import Event, Sink

QUEUE = 1000
"""Events that may wait for one sink; what comes beyond is dropped and counted."""

FLUSH_SECONDS = 5.0
"""How long a sink may take to write out what it holds at the end."""

_log = logging.getLogger("sandstorm")


class Sinks:
    """The sinks of one engine."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._queues = [(sink, *trio.open_memory_channel[Event](QUEUE), trio.Event()) for sink in sinks]
        self.dropped: dict[str, int] = {}

    def put_nowait(self, event: Event) -> None:
        """Queues an event for every sink; one whose queue is full loses it, loudly."""
        for sink, send, _, _ in self._queues:
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                if sink.name not in self.dropped:
                    _log.warning("sink %s does not keep up: events are dropped", sink.name)
                self.dropped[sink.name] = self.dropped.get(sink.name, 0) + 1

    async def deliver(self) -> None:
        """Hands events on until it is cancelled. A sink that raises loses that batch, loudly."""
        async with trio.open_nursery() as nursery:
            for sink, _, receive, drained in self._queues:
                nursery.start_soon(self._deliver, sink, receive, drained)

    async def close(self) -> None:
        """Waits until what is queued was handed on, and lets every sink flush, within a deadline."""
        async with trio.open_nursery() as nursery:
            for sink, send, _, drained in self._queues:
                send.close()
                nursery.start_soon(self._flush, sink, drained)

    async def _flush(self, sink: Sink, drained: trio.Event) -> None:
        with trio.move_on_after(FLUSH_SECONDS) as scope:
            await drained.wait()
            try:
                await sink.flush()
            except Exception:
                _log.exception("sink %s failed", sink.name)
        if scope.cancelled_caught:
            _log.warning("sink %s did not flush within %g s", sink.name, FLUSH_SECONDS)

    async def _deliver(self, sink: Sink, receive: trio.MemoryReceiveChannel[Event], drained: trio.Event) -> None:
        async for event in receive:
            try:
                await sink.receive([event])
                await self._drain(sink, receive)
            except Exception:
                _log.exception("sink %s failed", sink.name)
        drained.set()

    async def _drain(self, sink: Sink, receive: trio.MemoryReceiveChannel[Event]) -> None:
        batch = []
        while True:
            try:
                batch.append(receive.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        if batch:
            await sink.receive(batch)
