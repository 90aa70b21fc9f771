"""The connection to SQLite or PostgreSQL. Knows where the two differ; knows nothing of jobs."""

from __future__ import annotations

import select
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from kontextd_server.store import tables
from kontextd_server.store.errors import StoreUnavailable, UnsupportedDatabase
from kontextd_server.store.prepared import Statements

# One connection a thread: the API's thread pool, a worker's two threads, sweeps and deliveries.
_POOL = {"pool_size": 8, "max_overflow": 16, "pool_timeout": 10}
_SQLITE_BUSY_S = 15.0  # how long a process waits while others write
_SQLITE_PRAGMAS = (
    "PRAGMA synchronous=NORMAL",  # with WAL: a crash of the process loses nothing, a power cut the last commits
    "PRAGMA temp_store=MEMORY",  # payloads never reach a temporary file
    "PRAGMA secure_delete=ON",  # what is deleted is overwritten
)
_POSTGRES_ARGUMENTS = {
    "connect_timeout": 5,
    "application_name": "kontextd",
    "options": "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s",
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_ENCODING = "UTF8"
_LOCKS = {"enqueue": 1, "sweep": 2, "migrate": 3}
_LOCK_CLASS = 0x6B6F6E74  # "kont": our own among the advisory locks of a database that others use too
_CLOCK_REFRESH_S = 60.0


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return sa.URL.create("sqlite", database=str(path.absolute())).render_as_string()


class Database:
    """Transactions on one database, from any thread. Raises `UnsupportedDatabase` for a URL it cannot use, and at the
    first connection for a database that cannot hold all text."""

    def __init__(self, url: str, *, foreign_keys: bool = True) -> None:
        self.url = _checked(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _sqlite_engine(self.url, foreign_keys) if self.is_sqlite else _postgres_engine(self.url)
        self._reader = self.engine.execution_options(
            **({"reads_only": True} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"})
        )
        self.statements = Statements(self.engine.dialect)
        # Writers of one process take turns here: waiting inside SQLite means sleeping up to 100 ms at a time.
        self._turn: AbstractContextManager[object] = threading.Lock() if self.is_sqlite else nullcontext()
        self.clock = time.time if self.is_sqlite else ServerClock(self)
        # How much later than one process another may notice that the clock was set.
        self.clock_lag_s = 0.0 if self.is_sqlite else _CLOCK_REFRESH_S

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: all of it or nothing. On SQLite no other writes meanwhile."""
        with self._turn, _translated_errors(), self.engine.begin() as connection:
            try:
                yield connection
            except (sa.exc.DatabaseError, psycopg.DatabaseError) as error:
                if _sqlstate(error) == _READS_ONLY:  # a new connection may find the server that takes changes now
                    connection.invalidate(error)
                raise

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Statements that see what is committed, each for itself."""
        with _translated_errors(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def dedicated(self) -> Iterator[Any]:  # Any: two drivers' connections, which share no type
        """A driver connection outside the pool, in autocommit, closed at the end."""
        with _translated_errors():
            connection = self.engine.raw_connection()
            driver: Any = connection.driver_connection
            connection.detach()
            try:
                if not self.is_sqlite:
                    driver.autocommit = True
                yield driver
            finally:
                connection.close()

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that knows ON CONFLICT, which both databases spell alike."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def hint(self, connection: sa.Connection, *topics: str) -> None:
        """Wake whoever watches these topics, once the transaction is committed."""
        if self.is_sqlite:
            self.statements.each(connection, _HINT, [{"topic": topic} for topic in topics])
            return
        for topic in topics:
            connection.execute(_NOTIFY, {"topic": topic})

    def serialise(self, connection: sa.Connection, what: str) -> None:
        """Let one transaction at a time do this, until it ends. On SQLite writers are alone anyway."""
        if not self.is_sqlite:
            connection.execute(_LOCK, {"what": _LOCKS[what]})

    def allow_long_waits(self, connection: sa.Connection) -> None:
        """Until the transaction ends no statement is broken off."""
        if not self.is_sqlite:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")

    def padding(self, transient: bool) -> bytes | None:
        """What stands before a body that must be erased to the last byte.

        `secure_delete` overwrites deleted cells and freed pages, but not what is left in a page when rows move between
        pages. Only the first 4061 bytes of a row can live in such a page; the padding fills them, so the body itself
        lies in overflow pages, which never move and are zeroed when freed.
        """
        return bytes(_SQLITE_PAGE_BYTES) if transient and self.is_sqlite else None

    def forget_erased(self) -> bool:
        """Empty SQLite's write-ahead log, which still holds what was erased from the file; False if others are busy.

        On PostgreSQL erased bytes stay in dead rows and in its own log until the server recycles them: always False.
        """
        if not self.is_sqlite:
            return False
        with self._turn, self.dedicated() as driver:
            driver.execute("PRAGMA busy_timeout=1000")
            busy, _, _ = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy

    def close(self) -> None:
        self.engine.dispose()


class ServerClock:
    """Seconds since the epoch by the database server's clock: boxes that share a queue may disagree on the time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._offset_s = 0.0  # between the server's clock and our monotonic one
        self._measured_s = -_CLOCK_REFRESH_S

    def __call__(self) -> float:
        if time.monotonic() - self._measured_s >= _CLOCK_REFRESH_S:
            self._measure()
        return time.monotonic() + self._offset_s

    def _measure(self) -> None:
        with self._database.read() as connection:
            connection.execute(_SERVER_TIME)  # a new connection takes its time
            before_s = time.monotonic()
            server_s = float(connection.execute(_SERVER_TIME).scalar_one())
            after_s = time.monotonic()
        self._offset_s, self._measured_s = server_s - (before_s + after_s) / 2, after_s


_HINT = sa.insert(tables.hints)
_NOTIFY = sa.text("SELECT pg_notify('kontextd', :topic)")
_LOCK = sa.text(f"SELECT pg_advisory_xact_lock({_LOCK_CLASS}, :what)")
_SERVER_TIME = sa.text("SELECT extract(epoch FROM clock_timestamp())")
_SQLITE_PAGE_BYTES = 4096


def _checked(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise UnsupportedDatabase(f"{url!r} is no database URL. {_REMEDY}") from error
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    on_disk = parsed.database not in (None, "", ":memory:")
    if parsed.drivername == "postgresql+psycopg" or (parsed.get_backend_name() == "sqlite" and on_disk):
        return parsed
    raise UnsupportedDatabase(f"{parsed.render_as_string()} is no database the job store can use. {_REMEDY}")


_REMEDY = "Use sqlite:////path/to/file or postgresql+psycopg://user@host/database."


def _sqlite_engine(url: sa.URL, foreign_keys: bool) -> sa.Engine:
    engine = sa.create_engine(url, connect_args=_unless_in_url(url, {"timeout": _SQLITE_BUSY_S}), **_POOL)
    pragmas = (*_SQLITE_PRAGMAS, f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    def set_up(connection: Any, _record: object) -> None:  # Any: SQLAlchemy hands over the driver's own object
        connection.isolation_level = None  # the driver begins no transactions of its own
        for pragma in pragmas:
            connection.execute(pragma)

    def begin(connection: sa.Connection) -> None:
        # A transaction that reads before it writes would have to take the write lock in its midst, which fails at once
        # when another holds it.
        if not connection.get_execution_options().get("reads_only"):
            connection.connection.cursor().execute("BEGIN IMMEDIATE")

    sa.event.listen(engine, "connect", set_up)
    sa.event.listen(engine, "begin", begin)
    return engine


def _postgres_engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args=_unless_in_url(url, _POSTGRES_ARGUMENTS), **_POOL)

    def refuse_broken(driver: Any, _record: object, _proxy: object) -> None:  # Any: as in `set_up`
        # A connection that a restart of the server has broken has its end to be read; one in order is silent. Asking
        # the server instead (pool_pre_ping) would double the time of a poll.
        silent = select.poll()
        silent.register(driver.fileno(), select.POLLIN)
        if silent.poll(0):
            raise sa.exc.DisconnectionError("the server has closed this connection")  # the pool opens another

    def refuse_encoding(driver: Any, _record: object) -> None:  # Any: as in `set_up`
        encoding = driver.info.parameter_status("server_encoding")  # the server tells it unasked
        if encoding != _ENCODING:
            raise UnsupportedDatabase(
                f"the database {url.database!r} has the encoding {encoding}, which cannot hold every prompt. "
                f"Make one with CREATE DATABASE … ENCODING '{_ENCODING}' TEMPLATE template0."
            )

    # Before SQLAlchemy's own, which reads text that only UTF8 gives as such.
    sa.event.listen(engine, "connect", refuse_encoding, insert=True)
    sa.event.listen(engine, "checkout", refuse_broken)
    return engine


def _unless_in_url(url: sa.URL, arguments: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if name not in url.query}


# SQLAlchemy's, and the drivers' own from connections that are used without it.
_TROUBLE = (
    *(sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError),
    *(sqlite3.OperationalError, psycopg.OperationalError, psycopg.InterfaceError),
)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# SQLSTATEs that psycopg does not count as trouble of the server, which it has with the classes 08, 53, 57 and 58.
_READS_ONLY = "25006"  # a standby that is not promoted yet, or a server whose operator lets nobody write
_BROKEN_OFF = ("25P03", "25P04")  # a transaction that was idle, or open, for too long


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except _TROUBLE as error:
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailable(f"the job store does not answer: {cause}") from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError, psycopg.DatabaseError) as error:
        cause = getattr(error, "orig", None) or error
        if _sqlstate(error) == _READS_ONLY:
            raise StoreUnavailable(f"the job store takes no changes now: {cause}") from error
        if _sqlstate(error) in _BROKEN_OFF:
            raise StoreUnavailable(f"the job store does not answer: {cause}") from error
        if getattr(cause, "sqlite_errorcode", None) not in _DAMAGE:
            raise
        raise StoreUnavailable(
            f"the file of the job store is damaged ({cause}). Stop kontextd and put a backup in its place: "
            "docs/operations.md, Backups."
        ) from error


def _sqlstate(error: Exception) -> str | None:
    """PostgreSQL's code of what happened, whether SQLAlchemy has wrapped it or not; None of all else."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None)
