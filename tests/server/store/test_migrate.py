"""Making and upgrading the tables, and refusing those of another version."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from kontextd_server.store import (
    NewJob,
    RetryAnswer,
    SchemaMismatch,
    StoreUnavailable,
    UnsupportedDatabase,
    migrate,
    open_store,
    sqlite_url,
)
from kontextd_server.store.migrate import HEAD, MIGRATIONS
from kontextd_server.store.tables import metadata


@pytest.fixture(scope="module")
def second_postgres_url(postgres_database: Callable[[], str]) -> str:
    return postgres_database()


@pytest.fixture(params=["sqlite", "postgres"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "new.db")
    url: str = request.getfixturevalue("second_postgres_url")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return url


def test_the_migrations_make_the_tables_that_the_code_uses(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_newest_migration_is_the_one_that_the_code_asks_for() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == HEAD


def test_migrating_again_keeps_what_is_there(new_url: str) -> None:
    migrate(new_url)
    store = open_store(new_url)
    store.jobs.enqueue(NewJob("e", "anna", b"{}"))
    migrate(new_url)
    assert len(store.views.jobs()) == 1
    store.close()


def test_a_database_of_the_first_version_is_upgraded_with_what_is_in_it(
    new_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first_version:
        first_version.setattr(sys.modules[migrate.__module__], "HEAD", "0001")
        migrate(new_url)
    engine = sa.create_engine(new_url)
    with engine.begin() as connection:
        told = sa.MetaData()
        told.reflect(connection)
        job = {name: "r1" for name in ("request_id", "endpoint", "owner", "lora_key")}
        job |= {"id": 1, "kind": "queue", "state": "COMPLETED", "outcome": "FAILED", "priority": 0, "created_at": 1.0}
        job |= {"transient": False, "attempt": 1, "runs_allowed": 3, "runs_left": 2, "cancel_requested": False}
        connection.execute(sa.insert(told.tables["jobs"]), job | {"error_type": "internal_error", "http_status": 500})
        body = {"job_id": 1, "kind": "input", "number": 0, "body": b"{}"}
        connection.execute(sa.insert(told.tables["bodies"]), body)
    engine.dispose()
    with pytest.raises(SchemaMismatch, match="has schema 0001"):
        open_store(new_url)
    migrate(new_url)
    store = open_store(new_url)
    report = store.views.report("r1")
    assert (report.job.error_type, report.job.error_message, report.job.key_id) == ("internal_error", None, None)
    assert store.jobs.retry("r1") is RetryAnswer.QUEUED
    claimed = store.leases.claim("w1")
    assert (claimed.payload, claimed.files_expire_s) == (b"{}", None)
    store.close()


def test_processes_that_migrate_at_once_do_not_disturb_one_another(new_url: str) -> None:
    code = (
        "import sys; from kontextd_server.store import *; import alembic.command; print(flush=True); "
        "migrate(sys.argv[1]); open_store(sys.argv[1]).close(); print('done')"
    )
    other = subprocess.Popen([sys.executable, "-c", code, new_url], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    migrate(new_url)
    assert other.communicate(timeout=120)[0] == "done\n"
    open_store(new_url).close()


def test_a_database_without_tables_is_refused(new_url: str) -> None:
    with pytest.raises(SchemaMismatch, match="has schema none"):
        open_store(new_url)


def test_a_database_of_a_newer_version_is_refused(new_url: str) -> None:
    migrate(new_url)
    engine = sa.create_engine(new_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SchemaMismatch, match="upgrade kontextd"):
        open_store(new_url)
    with pytest.raises(SchemaMismatch, match="upgrade kontextd"):
        migrate(new_url)


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://root@127.0.0.1/x", "sqlite://", "sqlite:///:memory:", "postgresql+asyncpg://x/y"]
)
def test_other_databases_are_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(UnsupportedDatabase, match=r"Use sqlite:////path/to/file or postgresql\+psycopg://"):
        migrate(url)


def test_a_password_is_not_repeated_in_the_refusal() -> None:
    with pytest.raises(UnsupportedDatabase) as refusal:
        open_store("mysql://root:secret@127.0.0.1/x")
    assert "secret" not in str(refusal.value)


def test_the_file_is_for_nobody_else_to_read(tmp_path: Path) -> None:
    migrate(sqlite_url(tmp_path / "new.db"))
    store = open_store(sqlite_url(tmp_path / "new.db"))
    store.jobs.enqueue(NewJob("e", "anna", b"{}"))
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["new.db", "new.db-wal", "new.db-shm"], 0o600)
    store.close()


def test_a_plain_postgresql_url_will_do(postgres_url: str) -> None:
    open_store(postgres_url.replace("postgresql+psycopg", "postgresql")).close()


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "postgresql://root@127.0.0.1:1/x?connect_timeout=2"])
def test_a_database_that_cannot_be_reached_is_unavailable(url: str) -> None:
    with pytest.raises(StoreUnavailable):
        migrate(url)
    with pytest.raises(StoreUnavailable):
        open_store(url)
