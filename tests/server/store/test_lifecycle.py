"""A job's way through the store, told by its caller and its worker."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from kontextd_server.store import (
    CANCELLED,
    CancelAnswer,
    Claim,
    Failure,
    FinishAnswer,
    JobFilter,
    JobKind,
    JobState,
    LogLine,
    NewJob,
    Outcome,
    Policy,
    Priority,
    Progress,
    Queued,
    Refusal,
    RetryAnswer,
    Standing,
    Store,
    Success,
    WebhookState,
    Work,
)

FAILURE = Failure("image_load_error", 422, b'{"detail": []}', "it is no image")
Submit, Take = Callable[..., str], Callable[..., Claim]


def test_a_job_is_queued_run_and_read_back(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit(
        payload=b'{"prompt": "x"}',
        kind=JobKind.RUN,
        priority=Priority.LOW,
        lora_key="abc",
        tags='{"a": 1}',
        webhook_url="https://studio.example/hook",
        base_url="https://box.example",
    )
    queued = store.views.status(request_id)
    assert (queued.state, queued.queue_position, queued.outcome, queued.owner) == (JobState.IN_QUEUE, 0, None, "anna")
    assert (queued.kind, queued.priority, queued.tags) == (JobKind.RUN, Priority.LOW, '{"a": 1}')
    clock.pass_s(2)

    claimed = claim("w7")
    assert (claimed.request_id, claimed.payload, claimed.lora_key) == (request_id, b'{"prompt": "x"}', "abc")
    assert (claimed.base_url, claimed.kind) == ("https://box.example", JobKind.RUN)
    running = store.views.status(request_id)
    assert (running.state, running.queue_position, running.worker) == (JobState.IN_PROGRESS, None, "w7")
    assert running.started_at - running.created_at == 2
    assert store.views.result(request_id).body is None

    clock.pass_s(3)
    assert store.leases.finish(claimed.lease, Success(b'{"images": []}', inference_s=1.5)) is FinishAnswer.RECORDED
    result = store.views.result(request_id)
    assert (result.body, result.expired, result.job.outcome) == (b'{"images": []}', False, Outcome.OK)
    assert (result.job.inference_s, result.job.finished_at - result.job.started_at) == (1.5, 3)
    assert store.views.payload(request_id) == b'{"prompt": "x"}'


def test_a_failure_keeps_its_code_and_body(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.leases.finish(claim().lease, FAILURE)
    result = store.views.result(request_id)
    assert (result.job.state, result.job.outcome) == (JobState.COMPLETED, Outcome.FAILED)
    assert (result.job.error_type, result.job.http_status, result.body) == ("image_load_error", 422, FAILURE.body)


def test_what_the_engine_did_is_kept_with_a_job_that_went_well(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.leases.finish(claim().lease, Success(b"{}", 1.5, Work(2, prompt_hit=True, reference_hit=False, merge_s=0.5)))
    job = store.views.status(request_id)
    assert (job.images, job.prompt_hit, job.reference_hit, job.merge_s) == (2, True, False, 0.5)
    assert (job.error_type, job.error_message, job.http_status) == (None, None, None)


def test_a_job_carries_its_key_and_how_long_its_files_are_to_be_kept(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit(files_expire_s=3600.0, key_id="k1")
    assert claim().files_expire_s == 3600.0
    assert store.views.status(request_id).key_id == "k1"
    submit()
    assert claim().files_expire_s is None


def test_an_unknown_request_id_is_none_everywhere(store: Store) -> None:
    assert store.views.status("none") is None
    assert store.views.report("none") is None
    assert store.views.result("none") is None
    assert store.views.payload("none") is None
    assert store.views.preview("none") is None
    assert store.views.logs("none") == ()
    assert store.jobs.request_cancel("none") is CancelAnswer.NOT_FOUND
    assert store.jobs.retry("none") is RetryAnswer.NOT_FOUND


def test_payloads_are_kept_byte_for_byte(store: Store, submit: Submit, claim: Take) -> None:
    payload = bytes(range(256)) * 5000
    request_id = submit(payload=payload)
    assert claim().payload == payload
    assert store.views.payload(request_id) == payload


def test_odd_text_is_kept(store: Store, submit: Submit) -> None:
    request_id = submit(owner="Zoë 🎬", tags='{"q": "\'; DROP TABLE jobs"}', webhook_url="https://x/%25?a=:b&c=%(d)s")
    job = store.views.status(request_id)
    assert (job.owner, job.tags) == ("Zoë 🎬", '{"q": "\'; DROP TABLE jobs"}')
    assert job.webhook_url == "https://x/%25?a=:b&c=%(d)s"


@pytest.mark.parametrize("odd", ["a\0b", "half a pair \ud83c", "\x7f\x1b[0m", ""])
def test_text_that_no_database_holds_disturbs_nobody(store: Store, submit: Submit, claim: Take, odd: str) -> None:
    request_id = submit(tags=odd, runner_hint=odd, lora_key=odd)
    claimed = claim("w1", warm_lora_key=odd, runner_hint=odd)
    store.leases.finish(claimed.lease, Success(b"{}"), logs=[LogLine(odd, 0)])
    assert len(store.views.logs(request_id)) == 1
    assert store.views.status(odd) is None
    assert store.jobs.request_cancel(odd) is CancelAnswer.NOT_FOUND
    assert store.keys.find(odd) is None


# The queue.


def test_jobs_wait_by_priority_then_age(store: Store, submit: Submit, claim: Take) -> None:
    low, first, second = submit(priority=Priority.LOW), submit(), submit()
    assert [store.views.status(job).queue_position for job in (low, first, second)] == [2, 0, 1]
    assert [claim().request_id for _ in range(3)] == [first, second, low]
    assert store.leases.claim("w1") is None


def test_the_answer_to_a_submit_says_the_place_in_the_queue(store: Store, submit: Submit) -> None:
    submit(priority=Priority.LOW)
    submit()
    answer = store.jobs.enqueue(NewJob("e", "anna", b"{}"))
    assert (answer.queue_position, answer.existing) == (1, False)


def test_a_full_queue_refuses(store: Store, submit: Submit, claim: Take) -> None:
    job = NewJob("e", "anna", b"{}", max_queue_length=2)
    submit(), submit()
    assert store.jobs.enqueue(job) is Refusal.QUEUE_FULL
    assert store.views.status(job.request_id) is None
    claim()
    assert isinstance(store.jobs.enqueue(job), Queued)


def test_the_operators_limit_holds_whatever_the_caller_asks(opened: Callable[[Policy], Store]) -> None:
    store = opened(Policy(max_queue_length=1))
    assert isinstance(store.jobs.enqueue(NewJob("e", "anna", b"{}")), Queued)
    assert store.jobs.enqueue(NewJob("e", "anna", b"{}", max_queue_length=50)) is Refusal.QUEUE_FULL


def test_one_owner_cannot_fill_the_queue(opened: Callable[[Policy], Store]) -> None:
    store = opened(Policy(max_queued_per_owner=1))
    assert isinstance(store.jobs.enqueue(NewJob("e", "anna", b"{}")), Queued)
    assert store.jobs.enqueue(NewJob("e", "anna", b"{}")) is Refusal.OWNER_QUEUE_FULL
    assert isinstance(store.jobs.enqueue(NewJob("e", "boris", b"{}")), Queued)


def test_a_job_that_is_not_started_in_time_fails_instead_of_running(store: Store, submit: Submit, clock) -> None:
    request_id = submit(start_within_s=10)
    clock.pass_s(10)
    assert store.leases.claim("w1") is None
    assert store.leases.sweep().overdue == (request_id,)
    job = store.views.status(request_id)
    assert (job.outcome, job.error_type, job.http_status) == (Outcome.FAILED, "request_timeout", 504)


def test_a_job_that_started_in_time_keeps_its_right_to_run(store: Store, submit: Submit, claim: Take, clock) -> None:
    request_id = submit(start_within_s=10)
    store.leases.release(claim().lease)
    clock.pass_s(60)
    assert store.leases.sweep().overdue == ()
    assert claim().request_id == request_id


# Idempotency.


def test_the_same_key_and_body_give_the_same_job(store: Store, submit: Submit) -> None:
    first = submit(payload=b"{}", idempotency_key="k")
    again = store.jobs.enqueue(NewJob("fal-ai/x", "anna", b"{}", idempotency_key="k"))
    assert again == Queued(first, 0, existing=True)
    assert len(store.views.jobs()) == 1


def test_the_same_key_with_another_body_is_refused(store: Store, submit: Submit) -> None:
    submit(payload=b"{}", idempotency_key="k")
    other = NewJob("fal-ai/x", "anna", b'{"a": 1}', idempotency_key="k")
    assert store.jobs.enqueue(other) is Refusal.IDEMPOTENCY_KEY_REUSED


def test_the_callers_own_hash_goes_before_the_payloads(store: Store, submit: Submit) -> None:
    first = submit(payload=b'{"seed": 1}', idempotency_key="k", body_hash="h")
    again = NewJob("fal-ai/x", "anna", b'{"seed": 2}', idempotency_key="k", body_hash="h")
    assert store.jobs.enqueue(again).request_id == first


@pytest.mark.parametrize("other", [{"owner": "boris"}, {"endpoint": "fal-ai/y"}])
def test_keys_are_apart_by_owner_and_endpoint(store: Store, submit: Submit, other: dict[str, str]) -> None:
    first = submit(payload=b"{}", idempotency_key="k")
    assert submit(payload=b"{}", idempotency_key="k", **other) != first


def test_a_key_is_free_again_after_a_day(store: Store, submit: Submit, clock) -> None:
    first = submit(payload=b"{}", idempotency_key="k")
    clock.pass_s(24 * 3600)
    second = submit(payload=b'{"a": 1}', idempotency_key="k")
    assert second != first
    assert submit(payload=b'{"a": 1}', idempotency_key="k") == second


def test_a_known_key_answers_although_the_queue_is_full(opened: Callable[[Policy], Store]) -> None:
    store = opened(Policy(max_queue_length=1))
    job = NewJob("e", "anna", b"{}", idempotency_key="k")
    assert store.jobs.enqueue(job) == Queued(job.request_id, 0)
    assert store.jobs.enqueue(NewJob("e", "anna", b"{}", idempotency_key="k")) == Queued(job.request_id, 0, True)


def test_a_refused_job_leaves_its_key_free(store: Store, submit: Submit, claim: Take) -> None:
    submit()
    job = NewJob("e", "anna", b"{}", idempotency_key="k", max_queue_length=1)
    assert store.jobs.enqueue(job) is Refusal.QUEUE_FULL
    claim()
    assert store.jobs.enqueue(job) == Queued(job.request_id, 0)


# Logs, progress, previews.


def lines(*messages: str) -> list[LogLine]:
    return [LogLine(message, 1.5, "INFO") for message in messages]


def test_a_log_is_read_whole_or_from_a_cursor(store: Store, submit: Submit, claim: Take) -> None:
    request_id, lease = submit(), claim().lease
    submit()
    store.leases.renew(lease, logs=lines("one", "two"))
    store.leases.renew(claim().lease, logs=lines("of another job"))
    store.leases.finish(lease, Success(b"{}"), logs=[LogLine("three", 2.5, "WARN", "USER")])
    whole = store.views.logs(request_id)
    assert [line.message for line in whole] == ["one", "two", "three"]
    assert (whole[2].level, whole[2].source, whole[2].timestamp) == ("WARN", "USER", 2.5)
    assert store.views.logs(request_id, after=whole[0].cursor) == whole[1:]
    assert store.views.logs(request_id, after=whole[2].cursor) == ()


def test_a_long_log_is_read_to_its_end(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.leases.renew(claim().lease, logs=lines(*map(str, range(2500))))
    assert [line.message for line in store.views.logs(request_id)] == [str(n) for n in range(2500)]


def test_progress_and_the_newest_preview_are_kept(store: Store, submit: Submit, claim: Take) -> None:
    request_id, lease = submit(), claim().lease
    store.leases.renew(lease, progress=Progress(1, 30), preview=b"first")
    store.leases.renew(lease, progress=Progress(2, 30), preview=b"second")
    store.leases.renew(lease)
    preview, job = store.views.preview(request_id), store.views.status(request_id)
    assert (preview.number, preview.body, job.steps_done, job.steps_total) == (2, b"second", 2, 30)
    store.leases.finish(lease, Success(b"{}"))
    assert store.views.preview(request_id) is None


# Cancelling.


def test_a_waiting_job_is_cancelled_at_once(store: Store, submit: Submit) -> None:
    request_id = submit()
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ACCEPTED
    result = store.views.result(request_id)
    assert (result.job.state, result.job.outcome) == (JobState.COMPLETED, Outcome.CANCELLED)
    assert (result.job.error_type, result.job.http_status) == ("client_cancelled", 499)
    assert json.loads(result.body)["error_type"] == "client_cancelled"
    assert store.leases.claim("w1") is None
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ALREADY_COMPLETED


def test_a_running_job_hears_of_its_cancelling_when_it_renews(store: Store, submit: Submit, claim: Take) -> None:
    request_id, lease = submit(), claim().lease
    assert store.leases.renew(lease) is Standing.HELD
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ACCEPTED
    assert store.views.status(request_id).state is JobState.IN_PROGRESS
    assert store.leases.renew(lease) is Standing.CANCEL_REQUESTED
    assert store.leases.finish(lease, CANCELLED) is FinishAnswer.CANCELLED
    assert store.views.status(request_id).outcome is Outcome.CANCELLED


@pytest.mark.parametrize("ending", [Success(b"{}"), FAILURE])
def test_an_accepted_cancel_is_final(store: Store, submit: Submit, claim: Take, ending: Success | Failure) -> None:
    request_id, lease = submit(), claim().lease
    store.jobs.request_cancel(request_id)
    assert store.leases.finish(lease, ending) is FinishAnswer.CANCELLED
    assert store.views.status(request_id).error_type == "client_cancelled"


def test_a_completed_job_cannot_be_cancelled(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.leases.finish(claim().lease, Success(b"{}"))
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ALREADY_COMPLETED
    assert store.views.status(request_id).outcome is Outcome.OK


def test_only_the_owner_and_the_administrator_can_cancel(store: Store, submit: Submit) -> None:
    request_id = submit(owner="anna")
    assert store.jobs.request_cancel(request_id, owner="boris") is CancelAnswer.NOT_FOUND
    assert store.views.status(request_id).state is JobState.IN_QUEUE
    assert store.jobs.request_cancel(request_id, owner="anna") is CancelAnswer.ACCEPTED
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ALREADY_COMPLETED


# Running again by hand.


def test_a_failed_job_runs_again_by_hand(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.leases.finish(claim().lease, FAILURE)
    assert store.jobs.retry(request_id) is RetryAnswer.QUEUED
    job = store.views.status(request_id)
    assert (job.state, job.outcome, job.error_type, job.http_status) == (JobState.IN_QUEUE, None, None, None)
    assert store.views.result(request_id).body is None
    claimed = claim()
    assert (claimed.request_id, claimed.lease.attempt, claimed.runs_left) == (request_id, 2, 2)
    store.leases.finish(claimed.lease, Success(b"{}"))
    assert store.views.result(request_id).body == b"{}"


def test_a_cancelled_job_runs_again_by_hand(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit()
    store.jobs.request_cancel(request_id)
    assert store.jobs.retry(request_id) is RetryAnswer.QUEUED
    assert store.leases.finish(claim().lease, Success(b"{}")) is FinishAnswer.RECORDED


def test_what_did_not_fail_or_lost_its_input_does_not_run_again(store: Store, submit: Submit, claim: Take) -> None:
    request_id, transient = submit(), submit(transient=True)
    assert store.jobs.retry(request_id) is RetryAnswer.NOT_FAILED
    store.leases.finish(claim().lease, Success(b"{}"))
    assert store.jobs.retry(request_id) is RetryAnswer.NOT_FAILED
    store.leases.finish(claim().lease, FAILURE)
    assert store.jobs.retry(transient) is RetryAnswer.INPUT_ERASED


# Lists and gauges.


def test_a_report_says_why_a_job_failed_and_where_its_webhook_stands(
    store: Store, submit: Submit, claim: Take, clock
) -> None:
    hooked, plain, waiting = submit(webhook_url="https://studio.example"), submit(), submit(webhook_url="https://x")
    for _ in range(2):
        store.leases.finish(claim("w1").lease, FAILURE)
    failed = store.views.report(hooked)
    assert (failed.job.error_type, failed.job.error_message) == ("image_load_error", FAILURE.message)
    assert (failed.webhook.state, failed.webhook.attempt, failed.webhook.last_error) == (WebhookState.PENDING, 0, None)
    store.webhooks.failed(store.webhooks.claim(), "answered 410", retry_in_s=None)
    given_up = store.views.report(hooked).webhook
    assert (given_up.state, given_up.attempt, given_up.last_error) == (WebhookState.GIVEN_UP, 1, "answered 410")
    assert given_up.finished_at == clock.now
    assert (store.views.report(plain).webhook, store.views.report(waiting).webhook) == (None, None)
    reports = store.views.reports()
    assert [report.job.request_id for report in reports] == [waiting, plain, hooked]
    assert reports == tuple(map(store.views.report, [waiting, plain, hooked]))
    assert [report.job.request_id for report in store.views.reports(JobFilter(outcome=Outcome.FAILED), limit=1)] == [
        plain
    ]


def test_a_report_tells_of_the_latest_webhook(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit(webhook_url="https://studio.example")
    store.leases.finish(claim().lease, FAILURE)
    store.jobs.retry(request_id)
    report = store.views.report(request_id)
    assert (report.webhook.state, report.webhook.last_error) == (WebhookState.GIVEN_UP, "the job was queued again")
    assert report.job.error_message is None
    store.leases.finish(claim().lease, Success(b"{}"))
    assert store.views.report(request_id).webhook.state is WebhookState.PENDING


@pytest.mark.parametrize("ending", [FAILURE, CANCELLED])
def test_of_a_transient_job_no_message_stays(store: Store, submit: Submit, claim: Take, ending: Failure) -> None:
    request_id, cancelled = submit(transient=True), submit(transient=True)
    store.leases.finish(claim().lease, ending)
    store.jobs.request_cancel(cancelled)
    for job in (store.views.status(request_id), store.views.status(cancelled)):
        assert job.error_type
        assert job.error_message is None


def test_a_very_long_message_is_kept_in_part_and_its_body_whole(store: Store, submit: Submit, claim: Take) -> None:
    request_id, told = submit(), "x" * 5000
    store.leases.finish(claim().lease, Failure("image_load_error", 422, told.encode(), told))
    assert store.views.status(request_id).error_message == "x" * 2000
    assert store.views.result(request_id).body == told.encode()


def test_jobs_are_listed_newest_first_and_by_filter(store: Store, submit: Submit, claim: Take, clock) -> None:
    one, two, three = submit(owner="anna"), submit(owner="boris"), submit(owner="anna", endpoint="fal-ai/y")
    store.leases.finish(claim("w1").lease, FAILURE)
    claim("w2")

    def listed(**wanted: object) -> list[str]:
        return [job.request_id for job in store.views.jobs(JobFilter(**wanted))]

    assert listed() == [three, two, one]
    assert listed(owner="anna") == [three, one]
    assert listed(state=JobState.IN_PROGRESS) == listed(worker="w2") == [two]
    assert listed(outcome=Outcome.FAILED, owner="anna") == [one]
    assert listed(endpoint="fal-ai/y") == [three]
    assert listed(finished_after=clock.now - 1) == [one]
    assert listed(finished_after=clock.now) == []
    first_page = store.views.jobs(limit=2)
    assert [job.request_id for job in first_page] == [three, two]
    assert listed(before_id=first_page[-1].id) == [one]


def test_gauges_count_what_waits_and_runs(store: Store, submit: Submit, claim: Take, clock) -> None:
    assert store.views.gauges().oldest_queued_s == 0
    for priority in (Priority.NORMAL, Priority.NORMAL, Priority.NORMAL, Priority.LOW):
        submit(priority=priority, webhook_url="https://studio.example")
        clock.pass_s(1)
    store.leases.finish(claim().lease, Success(b"{}"))
    claim()
    gauges = store.views.gauges()
    assert gauges.queued == {Priority.NORMAL: 1, Priority.LOW: 1}
    assert (gauges.running, gauges.webhooks_pending, gauges.oldest_queued_s) == (1, 1, 2)
