"""What is removed and when, and that no byte of it stays in the files."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from kontextd_server.store import (
    Claim,
    Failure,
    JobState,
    LogLine,
    NewJob,
    Outcome,
    Policy,
    RetryAnswer,
    Store,
    Success,
    Worker,
    WorkerState,
    open_store,
    retention,
    sqlite_url,
    topics,
)
from kontextd_server.store.tables import metadata

Submit, Take = Callable[..., str], Callable[..., Claim]
POLICY = Policy()


def rows(store: Store) -> dict[str, int]:
    with store.database.read() as connection:
        counted = {
            t.name: connection.exec_driver_sql(f"SELECT count(*) FROM {t}").scalar() for t in metadata.sorted_tables
        }
    return {name: count for name, count in counted.items() if count and name != "hints"}


def test_finished_jobs_go_after_their_time_with_all_that_belongs_to_them(
    store: Store, submit: Submit, claim: Take, clock
) -> None:
    old = submit(idempotency_key="k", webhook_url="https://studio.example")
    lease = claim().lease
    store.leases.finish(lease, Success(b"{}"), logs=[LogLine("done", 0)])
    store.webhooks.delivered(store.webhooks.claim())
    waiting = submit()
    clock.pass_s(POLICY.finished_jobs_s - 1)
    assert store.retention.prune().jobs == 0
    clock.pass_s(1)
    recent = submit()
    store.jobs.request_cancel(recent)
    assert store.retention.prune().jobs == 1
    assert store.views.status(old) is None
    assert [job.request_id for job in store.views.jobs()] == [recent, waiting]
    assert rows(store) == {"jobs": 2, "bodies": 3}


def test_many_old_jobs_go_in_one_pruning(store: Store, submit: Submit, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_BATCH", 10)
    for _ in range(23):
        store.jobs.request_cancel(submit())
    clock.pass_s(POLICY.finished_jobs_s)
    assert store.retention.prune().jobs == 23
    assert rows(store) == {}


def test_a_job_stays_while_its_webhook_is_on_its_way(store: Store, submit: Submit, clock) -> None:
    request_id = submit(webhook_url="https://studio.example", transient=True)
    store.jobs.request_cancel(request_id)
    clock.pass_s(POLICY.finished_jobs_s)
    pruned = store.retention.prune()
    assert (pruned.jobs, pruned.bodies) == (0, 0)
    delivery = store.webhooks.claim()
    assert b"client_cancelled" in delivery.body
    store.webhooks.delivered(delivery)
    assert store.retention.prune().jobs == 1


def test_idempotency_keys_and_lost_workers_go(store: Store, submit: Submit, clock) -> None:
    submit(idempotency_key="k")
    store.workers.beat(Worker("w1", "box", "cpu", 1, WorkerState.READY, "v1"))
    clock.pass_s(POLICY.idempotency_s)
    pruned = store.retention.prune()
    assert (pruned.idempotency_keys, pruned.workers) == (1, 1)
    assert rows(store) == {"jobs": 1, "bodies": 1}


def test_the_input_of_a_transient_job_goes_when_it_completes(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit(transient=True)
    store.leases.renew(claim().lease, preview=b"preview")
    assert store.views.payload(request_id) is not None
    store.jobs.request_cancel(request_id)
    store.leases.sweep(lost_worker="w1")
    assert store.views.payload(request_id) is None
    assert store.views.preview(request_id) is None


def test_the_result_of_a_transient_job_can_be_read_for_ten_minutes(
    store: Store, submit: Submit, claim: Take, clock
) -> None:
    request_id = submit(transient=True)
    store.leases.finish(claim().lease, Success(b"data:"))
    clock.pass_s(599)
    assert store.views.result(request_id).body == b"data:"
    clock.pass_s(1)
    for _ in range(2):
        result = store.views.result(request_id)
        assert (result.body, result.expired, result.job.state) == (None, True, JobState.COMPLETED)
        assert (result.job.outcome, store.views.status(request_id).outcome) == (Outcome.OK, Outcome.OK)
        store.retention.prune()


def test_an_expired_result_still_reaches_its_webhook(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit(transient=True, webhook_url="https://studio.example")
    store.leases.finish(claim().lease, Success(b"data:"))
    clock.pass_s(7200)
    store.retention.prune()
    assert store.views.result(request_id).expired
    delivery = store.webhooks.claim()
    assert delivery.body == b"data:"
    store.webhooks.delivered(delivery)
    assert store.retention.prune().bodies == 1


def test_a_result_that_was_handed_over_can_be_expired_at_once(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.retention.expire(request_id)
    assert claim().payload
    store.leases.sweep(lost_worker="w1")
    store.leases.finish(claim().lease, Success(b"{}"))
    store.retention.expire(request_id)
    assert store.views.result(request_id).expired
    assert store.retention.prune().bodies == 2
    assert store.views.payload(request_id) is None


def test_a_job_whose_payloads_are_about_to_go_does_not_run_again(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.leases.finish(claim().lease, Failure("internal_server_error", 500, b"{}"))
    store.retention.expire(request_id)
    assert store.jobs.retry(request_id) is RetryAnswer.INPUT_ERASED


# No byte stays. On PostgreSQL nothing of the kind can be promised; see Database.forget_erased.

MARK = b"iVBORw0KGgo"


def marks(sqlite_file: Path) -> int:
    return sum(file.read_bytes().count(MARK) for file in sqlite_file.parent.glob("store.db*"))


def busy_hour(store: Store, seed: int) -> None:
    """Transient and lasting jobs side by side, many to a page, so that pages split, merge and are used again."""
    rng = random.Random(seed)

    def body(transient: bool) -> bytes:
        size = int(2 ** rng.uniform(7, 10)) * rng.choice([1, 1, 1, 1, 20])
        return MARK * (size // len(MARK)) if transient else bytes(size)

    def run_one() -> bool:
        if claimed := store.leases.claim("w1"):
            if rng.random() < 0.3:
                store.leases.renew(claimed.lease, preview=body(claimed.transient))
            if rng.random() < 0.1:
                store.jobs.request_cancel(claimed.request_id)
            failure = Failure("internal_server_error", 500, body(claimed.transient))
            store.leases.finish(claimed.lease, failure if rng.random() < 0.2 else Success(body(claimed.transient)))
        return claimed is not None

    for _ in range(60):
        transient = rng.random() < 0.5
        store.jobs.enqueue(NewJob("e", "anna", body(transient), transient=transient))
        if rng.random() < 0.7:
            run_one()
    while run_one():
        pass


@pytest.mark.parametrize("seed", [9, 23])  # seeds with which bytes stay if there is no padding, in SQLite 3.40
def test_no_byte_of_a_transient_payload_stays_in_the_files(sqlite_file: Path, clock, seed: int) -> None:
    store = open_store(sqlite_url(sqlite_file), clock=clock)
    watcher = store.watch()  # it reads all the time, and is not in the way
    with watcher.subscribe(topics.QUEUE):
        busy_hour(store, seed)
        assert marks(sqlite_file) > 0
        clock.pass_s(POLICY.transient_result_s)
        assert store.retention.prune().bytes_gone
        assert marks(sqlite_file) == 0
    watcher.close()
    store.close()


def test_bytes_go_once_a_reader_that_is_in_the_way_has_left(sqlite_file: Path, clock) -> None:
    store = open_store(sqlite_url(sqlite_file), clock=clock)
    reader = sqlite3.connect(sqlite_file, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM jobs").fetchall()
    job = NewJob("e", "anna", MARK, transient=True)
    store.jobs.enqueue(job)
    store.jobs.request_cancel(job.request_id)
    assert not store.retention.prune().bytes_gone
    assert marks(sqlite_file) > 0
    reader.close()
    assert store.retention.prune().bytes_gone
    assert marks(sqlite_file) == 0
    store.close()
