"""PostgreSQL is restarted as if it had crashed, twice, while jobs come and run: nothing is lost, each is told once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from kontextd_server.store import Outcome, WebhookState

from .box import Box, NewBox
from .calls import ENDPOINT, Caller, body
from .clusters import Cluster, cluster
from .processes import WAIT_S, until
from .receiver import Receiver

CLIENTS = 4
TRY_AGAIN_S = 0.1


@pytest.fixture
def postgres() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


def insist(call: Callable[[], httpx.Response], stop: threading.Event) -> httpx.Response:
    """Until the server takes it: while its database is away it answers 503, and nothing else."""
    while True:
        answer = call()
        if answer.status_code != 503:
            return answer
        assert not stop.wait(TRY_AGAIN_S)


def work(box: Box, caller: Caller, webhook: str, name: str, enough: threading.Event, stop: threading.Event) -> set[str]:
    """A client that has one job after the other made, until it is enough; each submit has an Idempotency-Key."""
    done: set[str] = set()
    with httpx.Client(base_url=box.url, headers=caller.http.headers, timeout=WAIT_S, verify=False) as http:
        while not enough.is_set():
            headers, sent = {"Idempotency-Key": f"{name}-{len(done)}"}, body("nothing")
            ask = {"fal_webhook": webhook}
            answer = insist(lambda: http.post(f"/queue/{ENDPOINT}", json=sent, params=ask, headers=headers), stop)  # noqa: B023
            assert answer.status_code == 200, answer.text
            place = f"/queue/{ENDPOINT}/requests/{answer.json()['request_id']}"
            while insist(lambda: http.get(f"{place}/status"), stop).json()["status"] != "COMPLETED":  # noqa: B023
                assert not stop.wait(0.02)
            assert insist(lambda: http.get(place), stop).status_code == 200  # noqa: B023
            done.add(answer.json()["request_id"])
    return done


def test_restarts_of_the_database_lose_no_job_and_no_webhook(
    postgres: Cluster, new_box: NewBox, new_receiver: Callable[..., Receiver]
) -> None:
    receiver = new_receiver()
    box = new_box(database=postgres.url, lease_s="5")
    box.serve(workers=1)
    anna, enough, stop = box.caller(), threading.Event(), threading.Event()
    with ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(work, box, anna, receiver.url, f"client-{n}", enough, stop) for n in range(CLIENTS)]
        try:
            for _ in range(2):
                before = len(receiver.heard)
                until(lambda: len(receiver.heard) >= before + 10 or any(c.done() for c in clients), "jobs to be made")  # noqa: B023
                postgres.control("restart", "-m", "immediate")
            before = len(receiver.heard)
            until(lambda: len(receiver.heard) >= before + 10 or any(c.done() for c in clients), "jobs to be made again")
            enough.set()
            done = set().union(*(client.result(WAIT_S) for client in clients))
        finally:
            enough.set()
            stop.set()
    assert box.runs[0].process.poll() is None
    assert len(box.runs[0].pids("worker-0")) == len(box.runs[0].pids("api")) == 1  # none of them died of it
    until(lambda: box.store.views.gauges().webhooks_pending == 0, "the webhooks")
    jobs = box.store.views.reports(limit=10_000)
    assert {report.job.request_id for report in jobs} == done  # no job twice either
    assert {report.job.outcome for report in jobs} == {Outcome.OK}
    assert {report.webhook.state for report in jobs if report.webhook} == {WebhookState.DELIVERED}
    assert {request_id: receiver.successes(request_id) for request_id in done} == dict.fromkeys(done, 1)
    assert len(receiver.heard) == len(done)
    assert box.store.database.is_sqlite is False
