"""What the store makes of a database in trouble, and how it reads: by index, by one clock."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from kontextd_server.store import (
    Claim,
    FinishAnswer,
    JobState,
    NewJob,
    Store,
    StoreUnavailable,
    Success,
    migrate,
    open_store,
    sqlite_url,
)
from kontextd_server.store.database import Database
from kontextd_server.store.errors import UnsupportedDatabase
from kontextd_server.store.tables import jobs

Submit, Take = Callable[..., str], Callable[..., Claim]


def test_a_file_that_another_program_keeps_locked_is_unavailable(sqlite_file: Path) -> None:
    store = open_store(sqlite_url(sqlite_file) + "?timeout=0.1")
    other = sqlite3.connect(sqlite_file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.leases.claim("w1")
    assert store.views.jobs() == ()  # readers do not mind
    other.close()
    assert store.leases.claim("w1") is None
    store.close()


@pytest.mark.parametrize("damage", ["all pages but the first", "the header"])
def test_a_damaged_file_is_told_with_the_remedy(sqlite_file: Path, damage: str) -> None:
    store = open_store(sqlite_url(sqlite_file))
    for _ in range(200):
        store.jobs.enqueue(NewJob("e", "anna", bytes(2000)))
    store.close()
    whole = sqlite_file.read_bytes()
    broken = b"x" * 100 + whole[100:] if damage == "the header" else whole[:4096] + b"\xff" * (len(whole) - 4096)
    sqlite_file.write_bytes(broken)
    database = Database(sqlite_url(sqlite_file))
    with pytest.raises(StoreUnavailable, match=r"damaged.*put a backup in its place"), database.read() as connection:
        connection.execute(sa.text("SELECT count(*) FROM jobs")).scalar_one()
    database.close()


def test_a_full_disk_leaves_a_job_as_it_was(sqlite_file: Path) -> None:
    store = open_store(sqlite_url(sqlite_file))
    job = NewJob("e", "anna", b"{}", webhook_url="https://studio.example")
    store.jobs.enqueue(job)
    claimed = store.leases.claim("w1")
    limit_pages = store.database.engine.connect()  # the pool's only connection so far: the next call uses it
    limit_pages.exec_driver_sql("PRAGMA max_page_count=1")  # it cannot be less than there are
    limit_pages.close()
    with pytest.raises(StoreUnavailable, match="full"):
        store.leases.finish(claimed.lease, Success(bytes(2**20)))
    assert store.views.status(job.request_id).state is JobState.IN_PROGRESS
    assert store.webhooks.next_due_at() is None
    assert store.leases.finish(claimed.lease, Success(b"{}")) is FinishAnswer.RECORDED
    store.close()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_call_that_the_server_broke_off_says_so(store: Store) -> None:
    with pytest.raises(StoreUnavailable, match="terminat"), store.database.write() as connection:
        connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert store.views.jobs() == ()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("state", ["25006", "25P03", "25P04", "08006", "40001", "53100", "55P03", "57P01", "58030"])
def test_trouble_of_the_server_is_unavailable_whoever_tells_it(store: Store, state: str) -> None:
    """SQLAlchemy wraps what psycopg raises; a connection that is used without it raises the same bare."""
    trouble = f"DO $$ BEGIN RAISE EXCEPTION 'in trouble' USING ERRCODE = '{state}'; END $$"
    for connect in (store.database.read, store.database.write):
        with pytest.raises(StoreUnavailable, match="in trouble"), connect() as connection:
            connection.exec_driver_sql(trouble)
    with pytest.raises(StoreUnavailable, match="in trouble"), store.database.dedicated() as driver:
        driver.execute(trouble)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("state", ["23505", "25001", "42P01", "XX000"])
def test_a_mistake_of_ours_is_not_taken_for_trouble(store: Store, state: str) -> None:
    mistake = f"DO $$ BEGIN RAISE EXCEPTION 'a mistake' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(sa.exc.DBAPIError, match="a mistake"), store.database.write() as connection:
        connection.exec_driver_sql(mistake)
    with pytest.raises(psycopg.DatabaseError, match="a mistake"), store.database.dedicated() as driver:
        driver.execute(mistake)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_connection_that_only_reads_is_not_used_again(store: Store, submit: Submit, prepared: bool) -> None:
    """After a failover it may lead to the server that was the first, and a new one to the one that is."""
    readers: list[int] = []

    def write_where_nothing_can_be_written() -> None:
        with store.database.write() as connection:
            readers.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
            connection.exec_driver_sql("COMMIT")
            if prepared:
                store.database.statements.rows(connection, sa.delete(jobs), {})
            connection.execute(sa.delete(jobs))

    with pytest.raises(StoreUnavailable, match="takes no changes"):
        write_where_nothing_can_be_written()
    submit()
    with store.database.read() as connection:
        assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() not in readers


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
@pytest.mark.parametrize("opens", [migrate, open_store])
def test_a_database_of_another_encoding_is_refused_with_the_remedy(
    postgres_database: Callable[..., str], opens: Callable[[str], object], encoding: str
) -> None:
    url = postgres_database(f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(UnsupportedDatabase, match=f"{encoding}.*ENCODING 'UTF8' TEMPLATE template0") as caught:
        opens(url)
    assert str(sa.make_url(url).database) in str(caught.value)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_restart_of_the_server_between_calls_goes_unnoticed(
    store: Store, submit: Submit, break_connections_off: Callable[[], None]
) -> None:
    request_id = submit()
    with store.database.read(), store.database.read(), store.database.read():
        pass  # now there are three connections to lose
    break_connections_off()
    for _ in range(4):
        assert store.views.status(request_id) is not None
    submit()


def test_a_transaction_that_fails_changes_nothing(store: Store, submit: Submit) -> None:
    request_id = submit()

    def fail_midway() -> None:
        with store.database.write() as connection:
            connection.execute(sa.text("DELETE FROM jobs"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert store.views.status(request_id) is not None


def test_polls_claims_and_sweeps_scan_no_table(sqlite_file: Path) -> None:
    store = open_store(sqlite_url(sqlite_file))
    statements: list[str] = []  # with their values, as SQLite runs them
    sa.event.listen(store.database.engine, "checkout", lambda driver, *_: driver.set_trace_callback(statements.append))
    job = NewJob("e", "anna", b"{}", idempotency_key="k", webhook_url="https://studio.example")
    store.jobs.enqueue(job)
    store.views.status(job.request_id)
    claimed = store.leases.claim("w1", warm_lora_key="a")
    store.leases.renew(claimed.lease)
    store.leases.finish(claimed.lease, Success(b"{}"))
    store.views.logs(job.request_id)
    store.views.result(job.request_id)
    store.views.report(job.request_id)
    store.webhooks.claim()
    store.leases.sweep(lost_worker="w2")
    store.jobs.retry(job.request_id)
    store.jobs.request_cancel(job.request_id)
    store.keys.find("key")
    store.keys.by_id("id")
    store.retention.prune()
    store.close()
    reader = sqlite3.connect(sqlite_file)
    plans = {
        (sql, step[3])
        for sql in statements
        if sql.split()[0] in ("SELECT", "UPDATE", "DELETE")
        for step in reader.execute(f"EXPLAIN QUERY PLAN {sql}")
    }
    reader.close()
    small = {"workers", "hints", "CONSTANT ROW"}  # a few rows each
    scans = {(sql, step) for sql, step in plans if step.startswith("SCAN") and not any(name in step for name in small)}
    assert len(plans) > 20
    assert scans == set()


def test_the_clock_is_the_servers(database_url: str) -> None:
    database = Database(database_url)
    before = time.time()
    first = database.clock()
    assert before - 1 < first < time.time() + 1
    time.sleep(0.05)
    assert 0.04 < database.clock() - first < time.time() - before + 1
    database.close()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_boxes_that_disagree_about_the_time_agree_about_leases(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(database_url)
    store.jobs.enqueue(NewJob("e", "anna", b"{}"))
    assert store.leases.claim("w1") is not None
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: real() + 7)
    ahead = open_store(database_url)
    assert ahead.leases.sweep().requeued == ()
    ahead.close()
    store.close()
