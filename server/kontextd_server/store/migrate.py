"""Brings a database to the tables of this version. Knows Alembic; knows nothing of what the tables mean."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.errors import SchemaMismatch, StoreUnavailable

HEAD = "0003"  # the newest of migrations/versions
MIGRATIONS = Path(__file__).parent / "migrations"
_WAL_ATTEMPTS, _WAL_PAUSE_S = 200, 0.05


def migrate(url: str) -> None:
    """Make or upgrade the tables. Any number of processes may call it at once; one does the work.

    Raises `SchemaMismatch` when a newer version has been here.
    """
    database = Database(url, foreign_keys=False)  # a table may have to be rebuilt
    try:
        if database.is_sqlite:
            _switch_to_wal(database)
        with database.write() as connection:
            database.allow_long_waits(connection)
            database.serialise(connection, "migrate")
            _upgrade(connection)
    finally:
        database.close()


def check_schema(database: Database) -> None:
    """Raises `SchemaMismatch` unless the tables are those of this version."""
    with database.read() as connection:
        there = sa.inspect(connection).has_table("alembic_version")
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() if there else None
    if found != HEAD:
        raise SchemaMismatch(
            f"the database has schema {found or 'none'}, this version of kontextd needs {HEAD}: "
            "start one `kontextd serve` of this version, which upgrades it, or upgrade kontextd here."
        )


def _upgrade(connection: sa.Connection) -> None:
    # Imported here because only one process in many upgrades anything, and this takes a fifth of a second.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, HEAD)
    except CommandError as error:
        raise SchemaMismatch(
            f"the database was made by a newer version of kontextd ({error}): upgrade kontextd."
        ) from error


def _switch_to_wal(database: Database) -> None:
    """Write-ahead logging is a property of the file. SQLite does not wait for others while switching, so we do."""
    path = Path(database.url.database or "")
    if path.parent.is_dir():
        path.touch(mode=0o600)  # prompts and pictures: for nobody else to read. SQLite's other files take it over
    with database.dedicated() as driver:
        driver.execute("PRAGMA page_size=4096")
        for _ in range(_WAL_ATTEMPTS):
            try:
                (mode,) = driver.execute("PRAGMA journal_mode=WAL").fetchone()
                if mode != "wal":
                    raise StoreUnavailable(f"{path} allows no write-ahead log: put it on a disk of this machine.")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                time.sleep(_WAL_PAUSE_S)
    raise StoreUnavailable("the job store stays locked: another program has the SQLite file open exclusively.")
