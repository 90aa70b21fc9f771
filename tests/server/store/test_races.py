"""What happens when two do the same at the same moment, in threads of one process and in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from kontextd_server.store import (
    CancelAnswer,
    Claim,
    FinishAnswer,
    JobState,
    NewJob,
    Outcome,
    Policy,
    Queued,
    Refusal,
    Store,
    Success,
    open_store,
    topics,
)
from kontextd_server.store.tables import jobs

Submit, Take = Callable[..., str], Callable[..., Claim]
HOOK = "https://studio.example"
RACES = int(os.environ.get("TEST_RACES", "12"))  # of each kind; 200 in the long form
CONTENDER = Path(__file__).parent / "contender.py"


def at_once(*calls: Callable[[], object]) -> list[object]:
    """The answers of calls that begin together, each in its own thread."""
    barrier = threading.Barrier(len(calls))

    def start(call: Callable[[], object]) -> object:
        barrier.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(start, calls))


def test_two_workers_never_claim_the_same_job(store: Store, submit: Submit) -> None:
    expected = {submit() for _ in range(40)}

    def drain(worker: str) -> list[str]:
        claimed = []
        while job := store.leases.claim(worker):
            claimed.append(job.request_id)
        return claimed

    claimed = [job for claims in at_once(*(lambda n=n: drain(f"w{n}") for n in range(4))) for job in claims]
    assert len(claimed) == len(expected)
    assert set(claimed) == expected


def test_one_job_goes_to_one_of_many_workers(store: Store, submit: Submit) -> None:
    for _ in range(10):
        submit()
        claims = at_once(*(lambda n=n: store.leases.claim(f"w{n}") for n in range(4)))
        assert sum(claim is not None for claim in claims) == 1


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_worker_does_not_wait_for_another_that_is_claiming(store: Store, submit: Submit, claim: Take) -> None:
    first, second = submit(), submit()
    with store.database.write() as connection:
        connection.execute(sa.select(jobs.c.id).where(jobs.c.request_id == first).with_for_update())
        assert claim().request_id == second
    assert claim().request_id == first


def test_a_cancel_racing_the_finish_has_one_winner_and_both_are_told(store: Store, submit: Submit, claim: Take) -> None:
    seen = Counter()
    for _ in range(RACES):
        request_id = submit(webhook_url=HOOK)
        lease = claim().lease
        cancel, finish = at_once(
            lambda job=request_id: store.jobs.request_cancel(job),
            lambda lease=lease: store.leases.finish(lease, Success(b"{}")),
        )
        outcome = store.views.status(request_id).outcome
        assert (cancel, finish, outcome) in {
            (CancelAnswer.ACCEPTED, FinishAnswer.CANCELLED, Outcome.CANCELLED),
            (CancelAnswer.ALREADY_COMPLETED, FinishAnswer.RECORDED, Outcome.OK),
        }
        seen[outcome] += 1
    assert store.views.gauges().webhooks_pending == RACES, seen


def test_a_cancel_racing_the_claim_leaves_no_cancelled_job_running(store: Store, submit: Submit) -> None:
    for _ in range(RACES):
        request_id = submit()
        cancel, claimed = at_once(
            lambda job=request_id: store.jobs.request_cancel(job), lambda: store.leases.claim("w1")
        )
        assert cancel is CancelAnswer.ACCEPTED
        if claimed is None:
            assert store.views.status(request_id).outcome is Outcome.CANCELLED
        else:
            assert store.leases.finish(claimed.lease, Success(b"{}")) is FinishAnswer.CANCELLED


def test_a_finish_racing_the_sweep_is_recorded_or_fenced(store: Store, submit: Submit, claim: Take, clock) -> None:
    for _ in range(RACES):
        request_id = submit(no_retry=True, webhook_url=HOOK)
        lease = claim().lease
        clock.pass_s(60)
        finish, swept = at_once(lambda lease=lease: store.leases.finish(lease, Success(b"{}")), store.leases.sweep)
        recorded = finish is FinishAnswer.RECORDED
        assert swept.failed == (() if recorded else (request_id,))
        assert store.views.status(request_id).outcome is (Outcome.OK if recorded else Outcome.FAILED)
    assert store.views.gauges().webhooks_pending == RACES


def test_two_sweeps_take_each_lost_job_once(store: Store, submit: Submit, claim: Take, clock) -> None:
    for _ in range(5):
        submit(no_retry=True, webhook_url=HOOK), submit()
        claim(), claim()
    clock.pass_s(60)
    sweeps = at_once(*[store.leases.sweep] * 3)
    assert sum(len(swept.failed) for swept in sweeps) == 5
    assert sum(len(swept.requeued) for swept in sweeps) == 5
    assert store.views.gauges().webhooks_pending == 5


def test_parallel_submits_with_one_idempotency_key_make_one_job(store: Store) -> None:
    for round_ in range(5):
        submits = [NewJob("e", "anna", b"{}", idempotency_key=f"k{round_}", webhook_url=HOOK) for _ in range(4)]
        answers = at_once(*(lambda job=job: store.jobs.enqueue(job) for job in submits))
        assert len({answer.request_id for answer in answers}) == 1
        assert sorted(answer.existing for answer in answers) == [False, True, True, True]
    assert len(store.views.jobs()) == 5


def test_parallel_submits_never_overfill_the_queue(opened: Callable[[Policy], Store]) -> None:
    store = opened(Policy(max_queue_length=5))
    answers = at_once(*(lambda: store.jobs.enqueue(NewJob("e", "anna", b"{}")) for _ in range(8)))
    assert sum(isinstance(answer, Queued) for answer in answers) == 5
    assert answers.count(Refusal.QUEUE_FULL) == 3


def test_submits_through_two_connections_wait_for_one_another(database_url: str, store: Store) -> None:
    stores = [open_store(database_url) for _ in range(2)]  # apart like two processes: no lock in common

    def submit_many(store: Store, name: str) -> list[str]:
        submits = [NewJob("e", name, b"{}", idempotency_key=str(n // 2)) for n in range(16)]
        return [store.jobs.enqueue(job).request_id for job in submits]

    answers = at_once(*(lambda s=s, n=n: submit_many(s, f"owner {n}") for n, s in enumerate(stores * 2)))
    assert len({request_id for ids in answers for request_id in ids}) == 4 * 8
    assert len(store.views.jobs()) == 4 * 8
    for each in stores:
        each.close()


def test_a_webhook_is_claimed_by_one_deliverer_at_a_time(store: Store, submit: Submit, claim: Take) -> None:
    for _ in range(10):
        store.jobs.request_cancel(submit(webhook_url=HOOK))
        deliveries = at_once(*[store.webhooks.claim] * 3)
        assert sum(delivery is not None for delivery in deliveries) == 1


def test_parallel_prunings_remove_each_job_once(store: Store, submit: Submit, clock) -> None:
    for _ in range(30):
        store.jobs.request_cancel(submit(idempotency_key=submit()))
    clock.pass_s(Policy().finished_jobs_s)
    assert sum(pruned.jobs for pruned in at_once(*[store.retention.prune] * 3)) == 30


# Processes of their own.


@contextmanager
def contenders(url: str, count: int, run_s: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Worker processes that wait for `go`."""
    arguments = [[sys.executable, str(CONTENDER), url, f"w{n}", str(run_s)] for n in range(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(argument, **pipes) for argument in arguments]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def test_worker_processes_share_a_queue_and_one_of_them_is_killed(
    store: Store, submit: Submit, database_url: str
) -> None:
    expected = [submit(webhook_url=HOOK) for _ in range(30)]
    watcher = store.watch()
    with watcher.subscribe(topics.job(expected[-1])) as last_job, contenders(database_url, 2, 0.01) as (victim, other):
        while last_job.wait(0.2):
            pass
        go(victim)
        report = [victim.stdout.readline() for _ in range(7)]  # claimed, recorded, claimed, …, claimed
        go(other)
        victim.send_signal(signal.SIGKILL)
        report += victim.communicate()[0].splitlines()
        store.leases.sweep(lost_worker="w0")
        report += other.communicate(timeout=120)[0].splitlines()
        assert last_job.wait(20)  # a change made by another process has come to our ears
    watcher.close()
    recorded = Counter(line.split()[1] for line in report if line.startswith("recorded"))
    done = [store.views.status(request_id) for request_id in expected]
    assert {(job.state, job.outcome) for job in done} == {(JobState.COMPLETED, Outcome.OK)}
    assert {job.request_id for job in done if job.worker == "w0"} >= {line.split()[1] for line in report[1:6:2]}
    assert sum(job.attempt - 1 for job in done) <= 1  # what the victim ran last was run again, nothing else
    assert max(recorded.values()) == 1
    assert store.views.gauges().webhooks_pending == 30
