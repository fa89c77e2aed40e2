"""Which routers live: each renews a lease in the database, and only the database's clock is read.

A lease that ran out proves nothing while the store could not be written, since its owner could not renew it then. So an
expiry counts only when some router has renewed its own lease in short steps for a whole lease's time up to now: for so
long the store was written, and every router that lives has had the time to renew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

import attrs

from sandstorm_store_postgres._database import Connection, Database

_log = logging.getLogger("sandstorm.postgres")


@attrs.frozen(kw_only=True)
class Terms:
    """How long leases last.

    Attributes:
        lease: Seconds after its last renewal at which a router counts as dead.
        renew: Seconds between two renewals.
        gap: Seconds between two renewals past which the store may not have been writable in between.
    """

    lease: float
    renew: float
    gap: float

    @classmethod
    def lasting(cls, lease: float) -> Terms:
        """Five renewals to a lease, of which one may be missed without a gap."""
        return cls(lease=lease, renew=lease / 5, gap=lease * 0.45)


_ENLIST = """INSERT INTO sandstorm.routers (started_at, steady_since, renewed_at, lease_until)
    VALUES (now(), now(), now(), now() + make_interval(secs => %(lease)s)) RETURNING epoch"""
_RENEW = """WITH former AS (SELECT lease_until FROM sandstorm.routers WHERE epoch = %(epoch)s FOR UPDATE)
    UPDATE sandstorm.routers SET
        steady_since = CASE WHEN renewed_at < now() - make_interval(secs => %(gap)s) THEN now() ELSE steady_since END,
        renewed_at = now(),
        lease_until = now() + make_interval(secs => %(lease)s)
    FROM former WHERE epoch = %(epoch)s
    RETURNING extract(epoch FROM now() - former.lease_until)::float8"""
_LIVING = """SELECT epoch FROM sandstorm.routers WHERE epoch = ANY(%(epochs)s::bigint[]) AND (
    lease_until >= now()
    OR NOT EXISTS (
        SELECT FROM sandstorm.routers
        WHERE renewed_at >= now() - make_interval(secs => %(gap)s) AND steady_since <= now() - make_interval(secs => %(lease)s)
    ))"""


def enlist(connection: Connection, terms: Terms) -> int:
    """An epoch that was never given before, with a lease."""
    ((epoch,),) = connection.execute(_ENLIST, attrs.asdict(terms)).fetchall()
    return int(epoch)


def living(connection: Connection, epochs: Collection[int], terms: Terms) -> frozenset[int]:
    """Those of `epochs` whose router has not left, and whose lease has not run out while the store could be written."""
    rows = connection.execute(_LIVING, {"epochs": list(epochs), **attrs.asdict(terms)})
    return frozenset(epoch for (epoch,) in rows)


class Lease:
    """Renews the lease of an epoch in a thread of its own, so that a busy event loop does not lose it.

    A router that could not renew in time says so in the log and goes on under its epoch: what others took over
    meanwhile it cannot write any more, and the rest is still its own.
    """

    def __init__(self, database: Database, epoch: int, terms: Terms) -> None:
        self._database = database
        self._values = {"epoch": epoch, **attrs.asdict(terms)}
        self._pause = terms.renew
        self._ended = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="sandstorm-postgres-lease", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Lets go of it: the router is dead from now on, or, where the database does not answer, once it has run out."""
        self._ended.set()
        self._thread.join()
        try:
            with self._database.connection(self._pause) as connection:
                connection.execute("DELETE FROM sandstorm.routers WHERE epoch = %(epoch)s", self._values)
        except Exception as exc:
            _log.warning("a lease was not given back, and runs out by itself: %s", self._database.readable(exc, "lease"))

    def _work(self) -> None:
        while not self._ended.wait(self._pause):
            try:
                self._renew()
            except Exception as exc:
                if not self._failing:
                    _log.warning("a lease cannot be renewed: %s", self._database.readable(exc, "lease"))
                self._failing = True
            else:
                self._failing = False

    def _renew(self) -> None:
        with self._database.connection(self._pause) as connection:
            renewed = connection.execute(_RENEW, self._values).fetchone()
        if renewed is None:
            raise RuntimeError(f"the row of router {self._values['epoch']} is gone")
        if renewed[0] > 0:
            _log.warning("a lease was renewed %.1f s too late: other routers may have taken over what was open", renewed[0])
