"""Callers who act in the same moment: a cancel and the end of its job, many submits under one Idempotency-Key."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import httpx
import pytest
from kontextd_server.store import JobFilter

from .box import Box, half_files
from .calls import ENDPOINT, Caller, body, detail
from .processes import Running, until

SUBMITS = 20


def after(seconds: float) -> None:
    """More to the point than sleeping, and with no less than this delay."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        time.sleep(0.0002)


def raced(caller: Caller, delay_s: float, seed: int) -> tuple[str, int]:
    """A job that is cancelled so long after its submit, and the status of that call."""
    request_id = caller.submit(seed=seed)
    after(delay_s)
    return request_id, caller.cancel(request_id)


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_cancel_that_races_with_the_end_of_its_job_has_one_outcome(
    box: Box, start_worker: Callable[..., Running], times: int
) -> None:
    start_worker(f"racer-{times}")
    anna = box.caller()
    began = time.monotonic()
    anna.completed(anna.submit())
    delay_s = (time.monotonic() - began) / 2
    races: list[tuple[str, int, int]] = []
    for number in range(times):
        seed = times * 1000 + number
        request_id, answered = raced(anna, delay_s, seed)
        delay_s *= 1.3 if answered == 202 else 1 / 1.3  # towards the moment in which the job ends
        races.append((request_id, answered, seed))
    assert Counter(answered for _, answered, _ in races).keys() == {202, 400}  # both sides won
    for request_id, answered, seed in races:
        result = anna.completed(request_id)
        status = anna.status(request_id)
        if answered == 202:
            assert status["error_type"] == "client_cancelled"
            assert detail(result) == (499, "client_cancelled")
        else:
            assert "error_type" not in status
            assert result.json()["seed"] == seed
            anna.made(result)
        until(lambda: box.pictures_of(seed) == (answered == 400), "no picture of a job that was cancelled")  # noqa: B023
    assert half_files(box.files) == []


def test_many_submits_at_once_under_one_idempotency_key_make_one_job(
    box: Box, start_worker: Callable[..., Running]
) -> None:
    start_worker("single")
    caller, barrier = box.caller("idem"), Barrier(SUBMITS)
    sent = body("once")

    def submit(_: int) -> httpx.Response:
        with httpx.Client(base_url=box.url, headers=caller.http.headers, timeout=60, verify=False) as own:
            barrier.wait()
            return own.post(f"/queue/{ENDPOINT}", json=sent, headers={"Idempotency-Key": "one-of-twenty"})

    with ThreadPoolExecutor(SUBMITS) as threads:
        answers = list(threads.map(submit, range(SUBMITS)))
    assert {answer.status_code for answer in answers} == {200}
    (request_id,) = {answer.json()["request_id"] for answer in answers}
    caller.made(caller.completed(request_id))
    assert [job.request_id for job in box.store.views.jobs(JobFilter(owner="idem"))] == [request_id]
    assert box.job(request_id).attempt == 1
