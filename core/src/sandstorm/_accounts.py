"""The connected accounts: sessions on first use, and the facts that offers rest on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import trio

from sandstorm._collapse import collapsed
from sandstorm._errors import ProviderDown
from sandstorm._offer import Facts
from sandstorm._store import Store
from sandstorm.provider import Provider, Session

_log = logging.getLogger("sandstorm")

CONNECT_SECONDS = 30.0
"""An account that has not connected and answered by then is left out of the decision."""


class Accounts:
    """Connects each account once, in the engine's nursery, and keeps its facts."""

    def __init__(
        self, providers: Sequence[Provider], nursery: trio.Nursery, store: Store, wall: Callable[[], float] = time.time
    ) -> None:
        self.providers: Mapping[str, Provider] = {provider.name: provider for provider in providers}
        self._nursery = nursery
        self._store = store
        self._wall = wall
        self._sessions: dict[str, Session] = {}
        self._facts: dict[str, Facts] = {}
        self._refreshed: set[str] = set()
        self._locks: dict[str, trio.Lock] = {name: trio.Lock() for name in self.providers}

    def restore(self, facts: Mapping[str, Facts]) -> None:
        """Takes up the facts that the store kept."""
        self._facts.update({name: known for name, known in facts.items() if name in self.providers})

    async def facts(self, names: Sequence[str]) -> dict[str, Facts | Exception]:
        """The facts of each account, refreshed where they expired, or how getting them failed."""
        known: dict[str, Facts | Exception] = {}
        stale = []
        for name in names:
            if self._fresh(name):
                known[name] = self._facts[name]
            else:
                stale.append(name)
        if stale:
            async with trio.open_nursery() as nursery:
                for name in stale:
                    nursery.start_soon(self._learn, name, known)
        return known

    async def session(self, name: str) -> Session:
        """The account's session, connected if it was not. Raises the provider's error."""
        session = self._sessions.get(name)
        if session is not None:
            return session
        async with self._locks[name]:
            if name not in self._sessions:
                with trio.move_on_after(CONNECT_SECONDS):
                    self._sessions[name] = await self._nursery.start(self._hold, self.providers[name])
            if name not in self._sessions:
                raise ProviderDown(f"{name} did not connect within {CONNECT_SECONDS:g} s")
            return self._sessions[name]

    def _fresh(self, name: str) -> bool:
        facts = self._facts.get(name)
        if facts is None:
            return False
        return name in self._refreshed if facts.ttl == 0 else self._wall() < facts.at + facts.ttl

    async def _learn(self, name: str, known: dict[str, Facts | Exception]) -> None:
        try:
            with trio.fail_after(CONNECT_SECONDS):
                session = await self.session(name)
                async with self._locks[name]:
                    if not self._fresh(name):
                        self._facts[name] = await session.refresh()
                        self._refreshed.add(name)
                        self._store.keep_facts_nowait(name, self._facts[name])
                known[name] = self._facts[name]
        except trio.TooSlowError:
            known[name] = ProviderDown(f"{name} did not answer within {CONNECT_SECONDS:g} s")
        except Exception as exc:
            known[name] = exc

    async def _hold(self, provider: Provider, task_status: trio.TaskStatus[Session]) -> None:
        """Keeps the session's context open until the engine ends; what breaks in it later only ends the session."""
        try:
            with collapsed():
                async with provider.connect() as session:
                    task_status.started(session)
                    await trio.sleep_forever()
        except Exception:
            if self._sessions.pop(provider.name, None) is None:
                raise
            _log.exception("the session of %s broke; it is connected anew on its next use", provider.name)
