"""Leases: which job a worker gets, how long it keeps it, and what happens when it is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from kontextd_server.store import (
    CancelAnswer,
    Claim,
    Failure,
    FinishAnswer,
    JobState,
    LogLine,
    NewJob,
    Outcome,
    Policy,
    Priority,
    Progress,
    RetryAnswer,
    Standing,
    Store,
    Success,
)

Submit, Take = Callable[..., str], Callable[..., Claim]
LEASE_S = Policy().lease_s


# Losing a job.


def test_a_job_goes_back_to_the_queue_when_its_worker_dies(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id, other = submit(), submit()
    store.leases.renew(claim("w1").lease, progress=Progress(3, 30))
    clock.pass_s(LEASE_S - 1)
    assert store.leases.sweep().requeued == ()
    clock.pass_s(1)
    assert store.leases.sweep().requeued == (request_id,)
    job = store.views.status(request_id)
    assert (job.state, job.queue_position, job.steps_done) == (JobState.IN_QUEUE, 0, None)
    assert [line.level for line in store.views.logs(request_id)] == ["WARN"]
    again = claim("w2")
    assert (again.request_id, again.lease.attempt, again.runs_left) == (request_id, 2, 1)
    assert claim("w2").request_id == other


def test_renewing_keeps_the_job(store: Store, submit: Submit, claim: Take, clock) -> None:
    submit()
    lease = claim().lease
    for _ in range(5):
        clock.pass_s(LEASE_S - 1)
        assert store.leases.renew(lease) is Standing.HELD
        assert store.leases.sweep().requeued == ()


def test_the_jobs_of_a_worker_known_to_be_dead_are_taken_at_once(store: Store, submit: Submit, claim: Take) -> None:
    first, second = submit(), submit()
    claim("dead")
    claim("alive")
    assert store.leases.sweep(lost_worker="dead").requeued == (first,)
    assert store.views.status(second).worker == "alive"
    assert store.views.status(second).state is JobState.IN_PROGRESS


def test_leases_are_spared_while_the_clock_says_nothing_of_them(
    store: Store, submit: Submit, claim: Take, clock
) -> None:
    first, second, late = submit(), submit(), submit(start_within_s=1)
    claim("alive")
    claim("dead")
    clock.pass_s(LEASE_S)
    swept = store.leases.sweep(lost_worker="dead", expired_by=-math.inf)
    assert (swept.requeued, swept.overdue) == ((second,), (late,))
    assert store.leases.sweep(expired_by=clock.now).requeued == (first,)


def test_a_fenced_worker_cannot_finish_renew_or_release(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit()
    stale = claim("frozen").lease
    clock.pass_s(LEASE_S)
    store.leases.sweep()
    for holder in ("nobody", "another worker"):
        if holder == "another worker":
            current = claim("w2").lease
        assert store.leases.renew(stale, logs=[LogLine("late", 0)], preview=b"late") is Standing.LOST
        assert store.leases.finish(stale, Success(b"late")) is FinishAnswer.FENCED
        assert store.leases.release(stale) is False
    assert store.leases.finish(current, Success(b"in time")) is FinishAnswer.RECORDED
    assert store.leases.finish(stale, Success(b"late")) is FinishAnswer.FENCED
    assert store.views.result(request_id).body == b"in time"
    assert "late" not in [line.message for line in store.views.logs(request_id)]
    assert store.views.preview(request_id) is None


def test_a_worker_whose_lease_expired_unnoticed_may_still_finish(
    store: Store, submit: Submit, claim: Take, clock
) -> None:
    submit()
    lease = claim().lease
    clock.pass_s(LEASE_S * 2)
    assert store.leases.finish(lease, Success(b"{}")) is FinishAnswer.RECORDED


def test_a_job_that_kills_its_workers_fails_for_good(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit(webhook_url="https://studio.example")
    for run in range(3):
        lease = claim().lease
        clock.pass_s(LEASE_S)
        swept = store.leases.sweep()
        assert (swept.requeued, swept.failed) == (((request_id,), ()) if run < 2 else ((), (request_id,)))
    result = store.views.result(request_id)
    assert (result.job.outcome, result.job.error_type, result.job.http_status) == (
        Outcome.FAILED,
        "runner_disconnected",
        500,
    )
    assert json.loads(result.body)["error_type"] == "runner_disconnected"
    assert store.leases.claim("w1") is None
    assert store.leases.finish(lease, Success(b"{}")) is FinishAnswer.FENCED
    assert store.webhooks.claim().job.request_id == request_id


def test_a_job_that_forbids_retries_fails_at_the_first_loss(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit(no_retry=True)
    claim()
    clock.pass_s(LEASE_S)
    assert store.leases.sweep().failed == (request_id,)
    assert store.jobs.retry(request_id) is RetryAnswer.QUEUED
    claim()
    assert store.leases.sweep(lost_worker="w1").failed == (request_id,)


def test_a_cancelled_job_whose_worker_dies_is_cancelled(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit()
    lease = claim().lease
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ACCEPTED
    clock.pass_s(LEASE_S)
    swept = store.leases.sweep()
    assert (swept.cancelled, swept.requeued, swept.failed) == ((request_id,), (), ())
    assert store.views.status(request_id).outcome is Outcome.CANCELLED
    assert store.leases.finish(lease, Success(b"{}")) is FinishAnswer.CANCELLED


def test_running_again_by_hand_fences_the_earlier_worker(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit(no_retry=True)
    stale = claim().lease
    store.leases.sweep(lost_worker="w1")
    store.jobs.retry(request_id)
    assert store.leases.finish(stale, Success(b"late")) is FinishAnswer.FENCED
    claim()
    assert store.leases.finish(stale, Success(b"late")) is FinishAnswer.FENCED


# Finishing twice, handing back.


@pytest.mark.parametrize("second", [Success(b"two"), Failure("internal_server_error", 500, b"{}")])
def test_finishing_twice_changes_nothing(store: Store, submit: Submit, claim: Take, second: Success | Failure) -> None:
    request_id = submit(webhook_url="https://studio.example")
    lease = claim().lease
    store.leases.finish(lease, Success(b"one"))
    assert store.leases.finish(lease, second) is FinishAnswer.ALREADY_RECORDED
    assert store.views.result(request_id).body == b"one"
    assert store.views.gauges().webhooks_pending == 1


def test_a_job_handed_back_has_lost_no_run(store: Store, submit: Submit, claim: Take) -> None:
    first, second = submit(), submit()
    for _ in range(10):
        claimed = claim()
        assert (claimed.request_id, claimed.runs_left) == (first, 2)
        assert store.leases.release(claimed.lease) is True
        assert store.leases.release(claimed.lease) is False
    assert store.views.status(second).queue_position == 1


def test_a_cancelled_job_handed_back_is_cancelled(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    lease = claim().lease
    store.jobs.request_cancel(request_id)
    assert store.leases.release(lease) is True
    assert store.views.status(request_id).outcome is Outcome.CANCELLED


# Which job is next.


def test_a_job_whose_loras_are_merged_goes_first(store: Store, submit: Submit, claim: Take) -> None:
    submit(lora_key="a")
    warm = submit(lora_key="b")
    assert claim(warm_lora_key="b").request_id == warm


def test_the_base_model_is_warm_too(store: Store, submit: Submit, claim: Take) -> None:
    submit(lora_key="a")
    base = submit(lora_key="")
    assert claim(warm_lora_key="").request_id == base


def test_without_a_preference_age_decides(store: Store, submit: Submit, claim: Take) -> None:
    oldest = submit(lora_key="a")
    submit(lora_key="")
    assert claim(warm_lora_key=None).request_id == oldest


def test_priority_goes_before_warmth(store: Store, submit: Submit, claim: Take) -> None:
    submit(lora_key="warm", priority=Priority.LOW)
    normal = submit(lora_key="cold")
    assert claim(warm_lora_key="warm").request_id == normal


def test_a_runner_hint_attracts_like_a_lora_set(store: Store, submit: Submit, claim: Take) -> None:
    submit()
    hinted = submit(runner_hint="session 5")
    assert claim(runner_hint="session 5").request_id == hinted


@pytest.mark.parametrize("window", [0, 1, 4, 16])
def test_a_cold_job_is_overtaken_by_a_bounded_number_of_warm_ones(
    opened: Callable[[Policy], Store], window: int
) -> None:
    store = opened(Policy(affinity_window=window))

    def submit(lora_key: str) -> str:
        job = NewJob("e", "anna", b"{}", lora_key=lora_key)
        store.jobs.enqueue(job)
        return job.request_id

    cold = submit("cold")
    overtaken = 0
    for _ in range(3 * window + 2):  # warm ones come faster than they are run
        submit("warm"), submit("warm")
        claimed = store.leases.claim("w1", warm_lora_key="warm")
        if claimed.request_id == cold:
            break
        store.leases.finish(claimed.lease, Success(b"{}"))
        overtaken += 1
    assert claimed.request_id == cold
    assert overtaken == max(0, window - 1)


def test_warm_jobs_are_run_in_batches(opened: Callable[[Policy], Store]) -> None:
    store = opened(Policy(affinity_window=8))
    for n in range(32):
        store.jobs.enqueue(NewJob("e", "anna", b"{}", lora_key="ab"[n % 2]))
    warm, switches = "a", 0
    while claimed := store.leases.claim("w1", warm_lora_key=warm):
        switches += claimed.lora_key != warm
        warm = claimed.lora_key
        store.leases.finish(claimed.lease, Success(b"{}"))
    assert switches <= 6  # in order of arrival: 31
