"""Cancelling, losing and keeping a job, and a job store that does not answer: in one process, step by step."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import WAIT_S, until
from engines import GatedEngine, SlowFiles, Unwilling
from kontextd_server.files import FolderStore
from kontextd_server.store import (
    CancelAnswer,
    Job,
    JobState,
    LogLine,
    Outcome,
    Policy,
    Store,
    StoreUnavailable,
    Success,
    open_store,
)
from kontextd_server.worker import StageDeadlines
from kontextd_server.worker.null_engine import NullEngine, load_null

Submit, Completed, Start, Look = Callable[..., str], Callable[[str], Job], Callable[..., object], Callable[[str], Job]
AWAY = StoreUnavailable("the job store does not answer")
RACES = int(os.environ.get("TEST_CANCEL_RACES", "30"))


@pytest.fixture
def engine() -> GatedEngine:
    return GatedEngine()


@pytest.fixture
def running(submit: Submit, start: Start, engine: GatedEngine, look_at: Look) -> Callable[..., str]:
    """A job in its second step of four; words go to the worker."""

    def begin(**words: object) -> str:
        # However busy the machine is, or however quick: each step asks, and waits for the answer.
        start(engine.loaded, **{"report_wait_s": WAIT_S, "report_every_s": 0.0, **words})
        request_id = submit()
        engine.let(2)
        until(lambda: look_at(request_id).steps_done == 2)
        return request_id

    return begin


# Cancelling.


def test_a_cancelled_job_stops_within_one_step(
    store: Store, files: FolderStore, engine: GatedEngine, running: Callable[..., str], completed: Completed
) -> None:
    request_id = running()
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ACCEPTED
    engine.let(2)
    job = completed(request_id)
    assert (job.outcome, job.http_status, job.error_type) == (Outcome.CANCELLED, 499, "client_cancelled")
    assert (engine.made, engine.closed) == (3, 1)
    assert files.usage().used_bytes == 0


def test_a_job_cancelled_while_its_result_is_saved_leaves_no_files(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start
) -> None:
    slow = SlowFiles(files)
    start(files=slow)
    request_id = submit()
    assert slow.entered.wait(WAIT_S)
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ACCEPTED
    slow.go_on.set()
    assert completed(request_id).outcome is Outcome.CANCELLED
    until(lambda: files.usage().used_bytes == 0)


def test_a_cancel_racing_the_end_has_one_winner_and_files_only_where_it_lost(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start
) -> None:
    start(lambda: load_null(NullEngine(step_s=0.001)))
    completed(submit())  # the worker is warm
    began = time.monotonic()
    completed(submit(num_inference_steps=2))
    delay_s = time.monotonic() - began
    chance, outcomes = random.Random(5), []
    for _ in range(RACES):
        before = files.usage().used_bytes
        request_id = submit(num_inference_steps=2)
        time.sleep(delay_s * chance.uniform(0.8, 1.2))
        answer = store.jobs.request_cancel(request_id)
        job = completed(request_id)
        accepted = answer is CancelAnswer.ACCEPTED
        delay_s *= 1.3 if accepted else 1 / 1.3  # towards the moment in which the job ends, however busy the machine is
        assert job.outcome is (Outcome.CANCELLED if accepted else Outcome.OK)
        until(lambda before=before, gone=accepted: (files.usage().used_bytes == before) is gone, str(job))
        outcomes.append(job.outcome)
    assert {Outcome.OK, Outcome.CANCELLED} == set(outcomes)


# Losing the lease.


def test_a_job_that_was_lost_stops_within_one_step_and_its_work_is_thrown_away(
    store: Store, files: FolderStore, engine: GatedEngine, running: Callable[..., str], look_at: Look
) -> None:
    request_id = running()
    assert store.leases.sweep(lost_worker="w1").requeued == (request_id,)
    claim = store.leases.claim("another")
    engine.let(2)
    until(lambda: engine.closed == 1)
    assert engine.made == 3
    store.leases.finish(claim.lease, Success(b"{}"))
    job = look_at(request_id)
    assert (job.outcome, job.worker, job.attempt) == (Outcome.OK, "another", 2)
    assert files.usage().used_bytes == 0


def test_a_result_that_comes_after_the_lease_was_lost_is_refused_and_its_files_go(
    store: Store, files: FolderStore, submit: Submit, start: Start, engine: GatedEngine, look_at: Look
) -> None:
    slow = SlowFiles(files)
    start(engine.loaded, files=slow)
    request_id = submit()
    engine.let(4)
    assert slow.entered.wait(WAIT_S)
    busy_with = submit()
    until(lambda: look_at(busy_with).state is JobState.IN_PROGRESS)
    store.leases.sweep(lost_worker="w1")
    claim = store.leases.claim("another")
    assert claim.request_id == request_id
    slow.go_on.set()
    until(lambda: files.usage().used_bytes == 0 and slow.done.is_set())
    store.leases.finish(claim.lease, Success(b"mine"))
    assert store.views.result(request_id).body == b"mine"
    engine.let(20)  # for the other, which was swept too and runs again


def test_a_lease_is_renewed_while_a_stage_is_within_its_time_and_not_after_it(
    database_url: str, submit: Submit, engine: GatedEngine, start: Start, look_at: Look
) -> None:
    short = open_store(database_url, Policy(lease_s=0.6))
    deadlines = StageDeadlines(compile_s=1.0, merge_s=1.0, step_s=2.0)
    worker = start(engine.loaded, store=short, deadlines=deadlines, hung_exit_s=0.1)
    request_id = submit()
    until(lambda: look_at(request_id).state is JobState.IN_PROGRESS)
    began = look_at(request_id).lease_until
    until(lambda: look_at(request_id).lease_until > began + 0.6)  # renewed more than once
    until(lambda: worker.codes, "for the worker to say that it hangs")
    assert worker.codes == [70]
    until(lambda: short.leases.sweep().requeued == (request_id,))
    engine.let(4)
    worker.thread.join(0.0)
    worker.end()
    short.close()


# A job store that does not answer.


@pytest.mark.parametrize("after", [False, True], ids=["not carried out", "carried out, the answer lost"])
def test_a_result_is_recorded_however_often_the_store_does_not_answer(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start, after: bool
) -> None:
    leases = Unwilling(store.leases)
    leases.fail_next("finish", AWAY, 5, after=after)
    start(store=replace(store, leases=leases))
    request_id = submit(webhook_url="https://studio.example")
    assert completed(request_id).outcome is Outcome.OK
    until(lambda: leases.calls["finish"] == 6)
    assert files.usage().used_bytes > 0
    assert store.views.gauges().webhooks_pending == 1
    assert completed(submit()).outcome is Outcome.OK


def test_steps_go_on_while_the_store_does_not_answer_and_are_told_afterwards(
    store: Store, submit: Submit, engine: GatedEngine, completed: Completed, start: Start
) -> None:
    leases = Unwilling(store.leases)
    start(engine.loaded, store=replace(store, leases=leases), report_every_s=0.0)
    leases.fail_next("renew", AWAY, 3)
    request_id = submit()
    engine.let(4)
    assert completed(request_id).outcome is Outcome.OK
    lines = [line.message.split("|")[2].split()[0] for line in store.views.logs(request_id)]
    assert lines == ["1/4", "2/4", "3/4", "4/4"]


def test_news_that_the_store_cannot_take_do_not_cost_the_lease(
    store: Store, submit: Submit, completed: Completed, start: Start
) -> None:
    leases = Unwilling(store.leases)
    leases.fail_next("renew", ValueError("a text with NUL"), 1)
    # The first step waits for an answer, which only the second renewal brings.
    patient = {"report_wait_s": WAIT_S, "report_every_s": 0.0}
    start(lambda: load_null(NullEngine(step_s=0.05)), store=replace(store, leases=leases), **patient)
    assert completed(submit()).outcome is Outcome.OK
    assert leases.calls["renew"] >= 2


def test_a_worker_that_has_lost_a_thread_ends(store: Store, start: Start) -> None:
    register = Unwilling(store.workers)
    register.fail_next("beat", ValueError("a bug"), 1)
    worker = start(store=replace(store, workers=register))
    worker.thread.join(WAIT_S)
    assert worker.codes == [1]


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_an_error_that_quotes_what_cannot_be_stored_is_told_all_the_same(
    store: Store, submit: Submit, completed: Completed, start: Start
) -> None:
    start()
    job = completed(request_id := submit(image_url="nobody/knows\0"))
    assert (job.http_status, job.error_type, job.attempt) == (422, "file_download_error", 1)
    assert "\N{REPLACEMENT CHARACTER}" in store.views.logs(request_id)[-1].message


def test_a_slow_store_costs_a_job_one_wait_and_not_one_a_step(
    store: Store, submit: Submit, engine: GatedEngine, completed: Completed, start: Start
) -> None:
    leases = _Slow(store.leases)
    start(engine.loaded, store=replace(store, leases=leases), report_wait_s=1.0, report_every_s=0.0)
    request_id = submit(num_inference_steps=50)
    engine.let(50)
    assert leases.is_asked.wait(WAIT_S)
    began = time.monotonic()
    until(lambda: engine.made == 50)
    assert time.monotonic() - began < 30  # fifty waits are fifty seconds
    leases.go_on.set()
    assert completed(request_id).outcome is Outcome.OK


class _Slow:
    """Leases whose renewals wait for the test."""

    def __init__(self, leases: object) -> None:
        self._leases = leases
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def renew(self, *arguments: object, logs: tuple[LogLine, ...] = (), **words: object) -> object:
        self.is_asked.set()
        assert self.go_on.wait(WAIT_S)
        return self._leases.renew(*arguments, logs=logs, **words)

    def __getattr__(self, name: str) -> object:
        return getattr(self._leases, name)


def test_a_worker_waits_for_a_store_that_cannot_be_claimed_from(
    store: Store, submit: Submit, completed: Completed, start: Start
) -> None:
    leases = Unwilling(store.leases)
    leases.fail_next("claim", AWAY, 4)
    start(store=replace(store, leases=leases))
    assert completed(submit()).outcome is Outcome.OK
    assert leases.calls["claim"] >= 5
