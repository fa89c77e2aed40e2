"""The journal's first tables. Ids sort by their bytes (`COLLATE "C"`), whatever the database's language."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

_STATEMENTS = (
    """CREATE TABLE sandstorm.runs (
        id text COLLATE "C" PRIMARY KEY,
        tenant text COLLATE "C" NOT NULL,
        created_at double precision NOT NULL,
        state text NOT NULL,
        title text NOT NULL,
        provider text,
        exit bigint,
        seconds double precision,
        cost bigint,
        request text NOT NULL,
        plan text,
        result text
    )""",
    "CREATE INDEX runs_tenant ON sandstorm.runs (tenant, id)",
    """CREATE TABLE sandstorm.attempts (
        id text COLLATE "C" PRIMARY KEY,
        run text COLLATE "C" NOT NULL REFERENCES sandstorm.runs (id) DEFERRABLE INITIALLY DEFERRED,
        number bigint NOT NULL,
        provider text NOT NULL,
        offer text NOT NULL,
        region text NOT NULL,
        kind text NOT NULL,
        epoch bigint NOT NULL,
        created_at double precision NOT NULL,
        state text NOT NULL,
        sandbox text,
        dispatch_by double precision NOT NULL,
        expires_at double precision NOT NULL,
        exposure bigint,
        outcome text NOT NULL,
        error text,
        error_class text,
        create_seconds double precision,
        start_seconds double precision,
        kept boolean NOT NULL,
        process text
    )""",
    "CREATE INDEX attempts_run ON sandstorm.attempts (run, number)",
    """CREATE INDEX attempts_open ON sandstorm.attempts (created_at)
        WHERE state IN ('intent', 'bound', 'started', 'releasing', 'ambiguous')""",
    """CREATE TABLE sandstorm.ledger (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        attempt text COLLATE "C" NOT NULL REFERENCES sandstorm.attempts (id),
        run text COLLATE "C" NOT NULL REFERENCES sandstorm.runs (id),
        tenant text COLLATE "C" NOT NULL,
        provider text NOT NULL,
        kind text NOT NULL,
        amount bigint NOT NULL CHECK (amount >= 0),
        basis text NOT NULL,
        at double precision NOT NULL
    )""",
    "CREATE INDEX ledger_run ON sandstorm.ledger (run, number)",
    'CREATE TABLE sandstorm.observations (key text COLLATE "C" PRIMARY KEY, data text NOT NULL)',
    """CREATE TABLE sandstorm.facts (
        provider text COLLATE "C" PRIMARY KEY,
        at double precision NOT NULL,
        ttl double precision NOT NULL,
        data text NOT NULL
    )""",
    """CREATE TABLE sandstorm.keys (
        tenant text COLLATE "C" NOT NULL,
        key text COLLATE "C" NOT NULL,
        run text COLLATE "C" NOT NULL,
        fingerprint text NOT NULL,
        PRIMARY KEY (tenant, key)
    )""",
    """CREATE TABLE sandstorm.windows (
        key text COLLATE "C" NOT NULL,
        seconds double precision NOT NULL,
        number bigint NOT NULL,
        used bigint NOT NULL,
        PRIMARY KEY (key, seconds, number)
    )""",
    """CREATE TABLE sandstorm.holds (
        attempt text COLLATE "C" NOT NULL REFERENCES sandstorm.attempts (id),
        key text COLLATE "C" NOT NULL,
        seconds double precision NOT NULL,
        number bigint NOT NULL,
        usd bigint NOT NULL,
        PRIMARY KEY (attempt, key, seconds)
    )""",
    """CREATE TABLE sandstorm.routers (
        epoch bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        started_at timestamptz NOT NULL,
        steady_since timestamptz NOT NULL,
        renewed_at timestamptz NOT NULL,
        lease_until timestamptz NOT NULL
    )""",
    "CREATE INDEX routers_renewed ON sandstorm.routers (renewed_at)",
)


def upgrade() -> None:
    """Creates every table."""
    for statement in _STATEMENTS:
        op.execute(statement)
