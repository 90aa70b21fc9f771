"""The outbox: a webhook is there as soon as its job is completed, and is delivered once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kontextd_server.store import CANCELLED, Claim, Failure, Outcome, Policy, Store, Success, topics

Submit, Take = Callable[..., str], Callable[..., Claim]
HOOK = "https://studio.example/hook"


def test_a_finished_job_puts_its_webhook_into_the_outbox(store: Store, submit: Submit, claim: Take) -> None:
    request_id = submit(webhook_url=HOOK, base_url="https://box.example")
    assert store.webhooks.claim() is None
    store.leases.finish(claim().lease, Success(b'{"images": []}'))
    delivery = store.webhooks.claim()
    assert (delivery.url, delivery.attempt, delivery.body) == (HOOK, 1, b'{"images": []}')
    assert (delivery.job.request_id, delivery.job.outcome) == (request_id, Outcome.OK)
    assert delivery.job.base_url == "https://box.example"


def test_a_job_without_a_webhook_puts_nothing_there(store: Store, submit: Submit, claim: Take) -> None:
    submit()
    store.leases.finish(claim().lease, Success(b"{}"))
    assert store.webhooks.claim() is None
    assert store.webhooks.next_due_at() is None


@pytest.mark.parametrize("ending", [Failure("internal_server_error", 500, b"{}"), CANCELLED])
def test_failed_and_cancelled_jobs_tell_too(store: Store, submit: Submit, claim: Take, ending: Failure) -> None:
    submit(webhook_url=HOOK)
    store.leases.finish(claim().lease, ending)
    delivery = store.webhooks.claim()
    assert (delivery.job.error_type, delivery.body) == (ending.error_type, ending.body)


def test_so_does_a_job_cancelled_while_it_waited(store: Store, submit: Submit) -> None:
    store.jobs.request_cancel(submit(webhook_url=HOOK))
    assert store.webhooks.claim().job.outcome is Outcome.CANCELLED


def test_a_webhook_is_delivered_once(store: Store, submit: Submit, claim: Take, clock) -> None:
    submit(webhook_url=HOOK)
    store.leases.finish(claim().lease, Success(b"{}"))
    delivery = store.webhooks.claim()
    assert store.webhooks.claim() is None
    assert store.webhooks.delivered(delivery) is True
    assert store.webhooks.delivered(delivery) is False
    clock.pass_s(100_000)
    assert store.webhooks.claim() is None


def test_a_webhook_that_failed_is_due_again_later(store: Store, submit: Submit, claim: Take, clock) -> None:
    submit(webhook_url=HOOK)
    store.leases.finish(claim().lease, Success(b"{}"))
    assert store.webhooks.failed(store.webhooks.claim(), "503", retry_in_s=60) is True
    assert store.webhooks.claim() is None
    assert store.webhooks.next_due_at() == clock.now + 60
    clock.pass_s(60)
    assert store.webhooks.claim().attempt == 2


def test_a_webhook_can_be_given_up(store: Store, submit: Submit, claim: Take, clock) -> None:
    submit(webhook_url=HOOK)
    store.leases.finish(claim().lease, Success(b"{}"))
    assert store.webhooks.failed(store.webhooks.claim(), "410", retry_in_s=None) is True
    clock.pass_s(100_000)
    assert store.webhooks.claim() is None
    assert store.views.gauges().webhooks_pending == 0


def test_a_webhook_whose_deliverer_died_is_due_again_and_the_dead_one_fenced(
    store: Store, submit: Submit, claim: Take, clock
) -> None:
    submit(webhook_url=HOOK)
    store.leases.finish(claim().lease, Success(b"{}"))
    lost = store.webhooks.claim()
    clock.pass_s(Policy().webhook_lease_s)
    second = store.webhooks.claim()
    assert (second.id, second.attempt) == (lost.id, 2)
    assert store.webhooks.failed(lost, "late", retry_in_s=1) is False
    assert store.webhooks.delivered(lost) is False
    assert store.webhooks.delivered(second) is True


def test_running_a_job_again_replaces_a_webhook_that_is_still_on_its_way(
    store: Store, submit: Submit, claim: Take
) -> None:
    request_id = submit(webhook_url=HOOK)
    store.leases.finish(claim().lease, Failure("internal_server_error", 500, b"{}"))
    failed = store.webhooks.claim()
    store.jobs.retry(request_id)
    assert store.webhooks.delivered(failed) is False
    store.leases.finish(claim().lease, Success(b"good"))
    assert store.webhooks.claim().body == b"good"
    assert store.webhooks.claim() is None


def test_the_deliverer_is_woken(store: Store, submit: Submit, claim: Take) -> None:
    watcher = store.watch()
    submit(webhook_url=HOOK)
    lease = claim().lease
    with watcher.subscribe(topics.WEBHOOKS) as subscription:
        while subscription.wait(0.3):
            pass
        store.leases.finish(lease, Success(b"{}"))
        assert subscription.wait(20)
    watcher.close()
