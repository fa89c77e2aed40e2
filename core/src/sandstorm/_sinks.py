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
        self._queues = [(sink, *trio.open_memory_channel[Event](QUEUE)) for sink in sinks]
        self.dropped: dict[str, int] = {}

    def put_nowait(self, event: Event) -> None:
        """Queues an event for every sink; one whose queue is full loses it, loudly."""
        for sink, send, _ in self._queues:
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                if sink.name not in self.dropped:
                    _log.warning("sink %s does not keep up: events are dropped", sink.name)
                self.dropped[sink.name] = self.dropped.get(sink.name, 0) + 1

    async def deliver(self) -> None:
        """Hands events on until it is cancelled. A sink that raises loses that batch, loudly."""
        async with trio.open_nursery() as nursery:
            for sink, _, receive in self._queues:
                nursery.start_soon(self._deliver, sink, receive)

    async def close(self) -> None:
        """Hands on what is queued and lets every sink flush, within a deadline."""
        for sink, _, receive in self._queues:
            with trio.move_on_after(FLUSH_SECONDS, shield=True) as scope:
                try:
                    await self._drain(sink, receive)
                    await sink.flush()
                except Exception:
                    _log.exception("sink %s failed", sink.name)
            if scope.cancelled_caught:
                _log.warning("sink %s did not flush within %g s", sink.name, FLUSH_SECONDS)

    async def _deliver(self, sink: Sink, receive: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in receive:
            try:
                await sink.receive([event])
                await self._drain(sink, receive)
            except Exception:
                _log.exception("sink %s failed", sink.name)

    async def _drain(self, sink: Sink, receive: trio.MemoryReceiveChannel[Event]) -> None:
        batch = []
        while True:
            try:
                batch.append(receive.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        if batch:
            await sink.receive(batch)
