"""The receiver of a webhook is away, and the server is restarted meanwhile: in the end it is told exactly once."""

from __future__ import annotations

import signal
from collections.abc import Callable

from kontextd_server.store import WebhookReport, WebhookState

from .box import Box, NewBox
from .processes import until
from .receiver import Receiver


def webhook(box: Box, request_id: str) -> WebhookReport:
    report = box.store.views.report(request_id)
    assert report is not None
    assert report.webhook is not None
    return report.webhook


def test_a_receiver_that_was_away_during_a_restart_is_told_once(
    new_box: NewBox, new_receiver: Callable[..., Receiver]
) -> None:
    statuses: list[int] = []
    receiver = new_receiver(lambda: statuses.pop() if statuses else 200)
    receiver.close()
    box = new_box()
    server = box.serve(workers=1)
    anna = box.caller()
    request_id = anna.submit(webhook=receiver.url)
    anna.made(anna.completed(request_id))
    until(lambda: webhook(box, request_id).attempt >= 2, "two tries")
    assert webhook(box, request_id).state is WebhookState.PENDING
    server.send(signal.SIGTERM)
    assert server.exit_code() == 0
    tried = webhook(box, request_id).attempt
    box.serve()
    until(lambda: webhook(box, request_id).attempt > tried, "a try after the restart")
    statuses.append(500)  # back, but not well at first
    receiver.open()
    until(lambda: webhook(box, request_id).state is WebhookState.DELIVERED, "the delivery")
    assert [(one.request_id, one.status) for one in receiver.heard] == [(request_id, 500), (request_id, 200)]
    attempts = webhook(box, request_id).attempt
    again = anna.submit(webhook=receiver.url)
    assert anna.cancel(again) == 202
    until(lambda: receiver.successes(again), "the next one")  # so the first had its time to be told twice
    assert receiver.successes(request_id) == 1
    assert webhook(box, request_id).attempt == attempts
