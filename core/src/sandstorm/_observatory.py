"""Learns from events what the next decision may use."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterable

import attrs

from sandstorm._breaker import CLOSED, Breaker, closed, opened
from sandstorm._errors import CallerError
from sandstorm._events import AttemptClosed, AttemptOpened, Event, ProgramStarted
from sandstorm._knowledge import Knowledge, Observed
from sandstorm._store import Observation

WINDOW = 64
"""Observations kept for each key: recent enough to follow a vendor's day, enough for a 95th percentile."""

NOT_ITS_FAULT = frozenset(kind.__name__ for kind in CallerError.__subclasses__()) | {"GivenUp"}
"""Classes of errors that say nothing about the provider that they met."""

Key = tuple[str, str, str]


class Observatory:
    """Keeps the last observations of each offer, and hands out immutable knowledge."""

    def __init__(self) -> None:
        self._starts: dict[Key, deque[float]] = {}
        self._failures: dict[Key, deque[int]] = {}
        self._durations: dict[str, deque[float]] = {}
        self._breakers: dict[tuple[str, str], Breaker] = {}
        self._knowledge: Knowledge | None = Knowledge()

    @property
    def knowledge(self) -> Knowledge:
        """What was observed so far."""
        if self._knowledge is None:
            keys = {*self._starts, *self._failures}
            durations = {language: _quantile(sorted(seen), 0.5) for language, seen in self._durations.items()}
            observed = {key: self._observed(key) for key in keys}
            self._knowledge = Knowledge(observed=observed, durations=durations, breakers=dict(self._breakers))
        return self._knowledge

    def learn(self, event: Event) -> list[Observation]:
        """Takes an event in; the aggregates that changed by it, for the store."""
        return [changed for changed in (self._learn_figures(event), self._learn_breaker(event)) if changed is not None]

    def _learn_breaker(self, event: Event) -> Observation | None:
        if not isinstance(event, AttemptOpened | AttemptClosed):
            return None
        key = (event.provider, event.region)
        before = self._breakers.get(key, CLOSED)
        if isinstance(event, AttemptOpened):
            after = opened(before, event.at)
        else:
            jitter = random.uniform(1.0, 1.3)  # noqa: S311 - spreads, protects nothing
            after = closed(before, event.error, event.at, retry_after=event.retry_after, jitter=jitter)
        if after == before:
            return None
        self._breakers[key] = after
        self._knowledge = None
        return Observation(key=json.dumps(("breaker", *key)), data=json.dumps(attrs.asdict(after)))

    def _learn_figures(self, event: Event) -> Observation | None:
        if isinstance(event, ProgramStarted):
            key = (event.provider, event.offer, event.region or "")
            seen = self._starts.setdefault(key, deque(maxlen=WINDOW))
            seen.append(event.seconds)
            return self._changed(("start", *key), seen)
        if isinstance(event, AttemptClosed) and event.error not in NOT_ITS_FAULT:
            key = (event.provider, event.offer, "")
            failed = self._failures.setdefault(key, deque(maxlen=WINDOW))
            failed.append(int(event.error is not None))
            return self._changed(("failure", *key), failed)
        return None

    def learn_duration(self, language: str, seconds: float) -> Observation:
        """Takes in how long a program of a language ran."""
        seen = self._durations.setdefault(language, deque(maxlen=WINDOW))
        seen.append(seconds)
        return self._changed(("duration", language), seen)

    def restore(self, observations: Iterable[Observation]) -> None:
        """Takes up the aggregates that a store kept; what it cannot read is left out."""
        for observation in observations:
            kind, *key = json.loads(observation.key)
            values = json.loads(observation.data)
            if kind == "start":
                self._starts[tuple(key)] = deque(values, maxlen=WINDOW)
            elif kind == "failure":
                self._failures[tuple(key)] = deque(values, maxlen=WINDOW)
            elif kind == "duration":
                self._durations[key[0]] = deque(values, maxlen=WINDOW)
            elif kind == "breaker":
                breaker = Breaker(**values)
                # Whoever probed it then may not be there any more, and a key may have been corrected since.
                if not breaker.reason.startswith("AuthError"):
                    self._breakers[key[0], key[1]] = attrs.evolve(breaker, probing=False)
        self._knowledge = None

    def _changed(self, key: tuple[str, ...], values: Iterable[float]) -> Observation:
        self._knowledge = None
        return Observation(key=json.dumps(key), data=json.dumps([round(value, 6) for value in values]))

    def _observed(self, key: Key) -> Observed:
        starts = sorted(self._starts.get(key, ()))
        failures = self._failures.get((key[0], key[1], ""), ())
        return Observed(
            start_p50=_quantile(starts, 0.5) if starts else None,
            start_p95=_quantile(starts, 0.95) if starts else None,
            starts=float(len(starts)),
            failure_rate=sum(failures) / len(failures) if failures else 0.0,
            attempts=float(len(failures)),
        )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
