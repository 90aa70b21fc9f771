"""The store against a model of it: whatever callers, workers and the clock do, both tell the same story."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from kontextd_server.store import (
    CANCELLED,
    CancelAnswer,
    Delivery,
    Failure,
    FinishAnswer,
    JobState,
    Lease,
    NewJob,
    Outcome,
    Policy,
    Priority,
    Queued,
    Refusal,
    RetryAnswer,
    Standing,
    Store,
    Success,
)

EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "15"))  # many more in the long form
POLICY = Policy(lease_s=10, runs=2, affinity_window=3, max_queue_length=6, webhook_lease_s=5)
QUEUED, RUNNING, COMPLETED = JobState.IN_QUEUE, JobState.IN_PROGRESS, JobState.COMPLETED
FAILURE = Failure("internal_server_error", 500, b"failed")
WORKERS = st.sampled_from(["w1", "w2"])
LORAS = st.sampled_from(["a", "b"])


@dataclass
class Expected:
    """A job as the model has it."""

    number: int
    job: NewJob
    runs_left: int
    start_by: float | None
    state: JobState = QUEUED
    outcome: Outcome | None = None
    error_type: str | None = None
    body: bytes | None = None
    attempt: int = 0
    worker: str | None = None
    lease_until: float = 0.0
    cancel_requested: bool = False
    webhooks_made: int = 0

    def end(self, outcome: Outcome, error_type: str | None, body: bytes | None) -> None:
        self.state, self.outcome, self.error_type, self.body = COMPLETED, outcome, error_type, body
        self.webhooks_made += self.job.webhook_url is not None

    def cancel(self) -> None:
        self.end(Outcome.CANCELLED, "client_cancelled", CANCELLED.body)

    def holds(self, lease: Lease) -> bool:
        return self.state is RUNNING and self.attempt == lease.attempt


class StoreMachine(RuleBasedStateMachine):
    """`store`, `clock` and `reset` are set by the test."""

    store: Store
    clock: Callable[[], float]
    reset: Callable[[], None]
    jobs = Bundle("jobs")
    leases = Bundle("leases")

    @initialize()
    def begin(self) -> None:
        type(self).reset()
        self.model: dict[str, Expected] = {}
        self.by_id: dict[int, Expected] = {}
        self.delivery: tuple[Delivery, float] | None = None

    # What callers do.

    @rule(
        target=jobs,
        priority=st.sampled_from(Priority),
        lora_key=LORAS,
        no_retry=st.booleans(),
        transient=st.booleans(),
        webhook_url=st.sampled_from([None, "https://studio.example"]),
        start_within_s=st.sampled_from([None, 6.0]),
    )
    def submit(self, start_within_s: float | None, **fields: object) -> str:
        job = NewJob("e", "anna", b"input", start_within_s=start_within_s, **fields)
        answer = self.store.jobs.enqueue(job)
        if len(self.queue()) >= POLICY.max_queue_length:
            assert answer is Refusal.QUEUE_FULL
            return job.request_id
        start_by = None if start_within_s is None else self.clock.now + start_within_s
        self.model[job.request_id] = expected = Expected(
            len(self.model), job, 1 if job.no_retry else POLICY.runs, start_by
        )
        assert answer == Queued(job.request_id, self.queue().index(expected))
        self.by_id[self.store.views.status(job.request_id).id] = expected
        return job.request_id

    @rule(request_id=jobs)
    def cancel(self, request_id: str) -> None:
        answer, expected = self.store.jobs.request_cancel(request_id), self.model.get(request_id)
        if expected is None:
            assert answer is CancelAnswer.NOT_FOUND
        elif expected.state is COMPLETED:
            assert answer is CancelAnswer.ALREADY_COMPLETED
        else:
            assert answer is CancelAnswer.ACCEPTED
            expected.cancel_requested = True
            if expected.state is QUEUED:
                expected.cancel()

    @rule(request_id=jobs)
    def retry(self, request_id: str) -> None:
        answer, expected = self.store.jobs.retry(request_id), self.model.get(request_id)
        if expected is None:
            assert answer is RetryAnswer.NOT_FOUND
        elif expected.outcome in (None, Outcome.OK):
            assert answer is RetryAnswer.NOT_FAILED
        elif expected.job.transient:
            assert answer is RetryAnswer.INPUT_ERASED
        else:
            assert answer is RetryAnswer.QUEUED
            expected.state, expected.outcome, expected.error_type, expected.body = QUEUED, None, None, None
            expected.cancel_requested, expected.start_by = False, None
            expected.runs_left = 1 if expected.job.no_retry else POLICY.runs

    # What workers do, living and dead ones.

    @rule(target=leases, worker=WORKERS, warm=st.none() | LORAS)
    def claim(self, worker: str, warm: str | None) -> Lease:
        claimed, order = self.store.leases.claim(worker, warm_lora_key=warm), self.queue(warm)
        ready = [job for job in order if job.start_by is None or job.start_by > self.clock.now or job.attempt > 0]
        if not ready:
            assert claimed is None
            return Lease(-1, 0)
        expected = ready[0]
        expected.state, expected.worker, expected.lease_until = RUNNING, worker, self.clock.now + POLICY.lease_s
        expected.attempt += 1
        expected.runs_left -= 1
        assert (claimed.request_id, claimed.lease.attempt) == (expected.job.request_id, expected.attempt)
        assert (claimed.runs_left, claimed.payload) == (expected.runs_left, b"input")
        return claimed.lease

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        standing, expected = self.store.leases.renew(lease), self.by_id.get(lease.job_id)
        if expected is None or not expected.holds(lease):
            assert standing is Standing.LOST
            return
        expected.lease_until = self.clock.now + POLICY.lease_s
        assert standing is (Standing.CANCEL_REQUESTED if expected.cancel_requested else Standing.HELD)

    @rule(lease=leases, ending=st.sampled_from([Success(b"result"), FAILURE]))
    def finish(self, lease: Lease, ending: Success | Failure) -> None:
        answer, expected = self.store.leases.finish(lease, ending), self.by_id.get(lease.job_id)
        if expected is None or not expected.holds(lease):
            assert answer is self.earlier_answer(lease, expected)
        elif expected.cancel_requested:
            assert answer is FinishAnswer.CANCELLED
            expected.cancel()
        else:
            assert answer is FinishAnswer.RECORDED
            failed = isinstance(ending, Failure)
            expected.end(Outcome.FAILED if failed else Outcome.OK, ending.error_type if failed else None, ending.body)

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        released, expected = self.store.leases.release(lease), self.by_id.get(lease.job_id)
        assert released is (expected is not None and expected.holds(lease))
        if released and expected.cancel_requested:
            expected.cancel()
        elif released:
            expected.state = QUEUED
            expected.runs_left += 1

    # What time does.

    @rule(seconds=st.sampled_from([1, 4, 11]), lost_worker=st.none() | WORKERS)
    def sweep(self, seconds: int, lost_worker: str | None) -> None:
        self.clock.pass_s(seconds)
        swept = self.store.leases.sweep(lost_worker=lost_worker)
        lost, requeued, overdue = [], [], []
        for job in self.model.values():
            if job.state is RUNNING and (job.lease_until <= self.clock.now or job.worker == lost_worker):
                lost.append(job.job.request_id)
                self.lose(job, requeued)
            elif job.state is QUEUED and job.start_by and job.start_by <= self.clock.now and job.attempt == 0:
                overdue.append(job.job.request_id)
                job.end(Outcome.FAILED, "request_timeout", None)
        assert sorted(swept.overdue) == sorted(overdue)
        # A job that was requeued just now was started once, so it cannot be overdue.
        assert sorted(swept.requeued) == sorted(requeued)
        assert sorted(swept.requeued + swept.failed + swept.cancelled) == sorted(lost)

    def lose(self, job: Expected, requeued: list[str]) -> None:
        if job.cancel_requested:
            job.cancel()
        elif job.runs_left > 0:
            job.state = QUEUED
            requeued.append(job.job.request_id)
        else:
            job.end(Outcome.FAILED, "runner_disconnected", None)

    @rule(delivered=st.booleans())
    def deliver_a_webhook(self, delivered: bool) -> None:
        """The one that was claimed last may be answered late, when it is due again or even claimed anew."""
        if delivered and self.delivery is not None:
            self.store.webhooks.delivered(self.delivery[0])
            self.delivery = None
        elif (delivery := self.store.webhooks.claim()) is not None:
            self.delivery = (delivery, self.clock.now)

    # What must hold after each step.

    @invariant()
    def jobs_are_as_the_model_has_them(self) -> None:
        queue, listed = self.queue(), self.store.views.jobs(limit=1000)
        assert len(listed) == len(self.model)
        for job in listed:
            expected = self.model[job.request_id]
            assert (job.state, job.outcome, job.error_type) == (expected.state, expected.outcome, expected.error_type)
            assert (job.attempt, job.runs_left) == (expected.attempt, expected.runs_left)
            assert job.queue_position == (queue.index(expected) if expected.state is QUEUED else None)

    @invariant()
    def each_completion_made_one_webhook(self) -> None:
        with self.store.database.read() as connection:
            made = connection.exec_driver_sql("SELECT count(*) FROM webhooks").scalar()
        assert made == sum(job.webhooks_made for job in self.model.values())

    def teardown(self) -> None:
        for request_id, expected in self.model.items():
            if expected.body is not None and not expected.job.transient:
                assert self.store.views.result(request_id).body == expected.body
            erased = expected.job.transient and expected.state is COMPLETED
            assert (self.store.views.payload(request_id) is None) is erased

    def queue(self, warm: str | None = None) -> list[Expected]:
        def place(job: Expected) -> tuple[int, int, int]:
            ahead = POLICY.affinity_window if job.job.lora_key == warm else 0
            return job.job.priority, job.number - ahead, job.number

        return sorted((job for job in self.model.values() if job.state is QUEUED), key=place)

    def earlier_answer(self, lease: Lease, expected: Expected | None) -> FinishAnswer:
        if expected is None or expected.state is not COMPLETED or expected.attempt != lease.attempt:
            return FinishAnswer.FENCED
        if expected.error_type == "runner_disconnected":
            return FinishAnswer.FENCED
        return FinishAnswer.CANCELLED if expected.outcome is Outcome.CANCELLED else FinishAnswer.ALREADY_RECORDED


def test_the_store_agrees_with_its_model(opened: Callable[[Policy], Store], database_url: str, clock, emptied) -> None:
    StoreMachine.store, StoreMachine.clock, StoreMachine.reset = opened(POLICY), clock, staticmethod(emptied)
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
