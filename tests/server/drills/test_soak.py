"""Ten minutes of everything at once, with kill -9 of workers and API at random: at the end the accounts agree."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from kontextd_server.store import JobState, Outcome, WebhookState

from .box import Box, NewBox, half_files, swept
from .calls import Caller
from .processes import WAIT_S, until
from .receiver import Receiver
from .soak_chaos import Chaos, Growth
from .soak_clients import Accounts, SoakClient

CLIENTS = 6
GROWTH_MIB = 15.0


@pytest.fixture
def seconds() -> float:
    return float(os.environ.get("TEST_SOAK_S", "600"))


@pytest.mark.long
def test_after_a_soak_with_killings_every_job_is_accounted_for(
    new_box: NewBox, new_receiver: Callable[..., Receiver], seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver, accounts = new_receiver(), Accounts()
    box = new_box(lease_s="3")
    server = box.serve(workers=1)
    caller, stop, calm = box.caller(), threading.Event(), threading.Event()
    chaos = Chaos(box, server, calm, time.monotonic() + 0.4 * seconds, random.Random(1))
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        clients = [SoakClient(Caller(box.url, caller.key), receiver.url, accounts, stop, n) for n in range(CLIENTS)]
        running = [threads.submit(chaos.run), *(threads.submit(client.run) for client in clients)]
        try:
            end = time.monotonic() + seconds
            until(lambda: time.monotonic() > end or any(one.done() for one in running), "the end", 0.5, seconds + 60)
        finally:
            stop.set()
            for one in running[1:]:
                one.exception(WAIT_S)  # jobs need their workers to end
            calm.set()
        for one in running:
            one.result(WAIT_S)
    until(lambda: {report.job.state for report in box.store.views.reports(limit=10**6)} == {JobState.COMPLETED}, "all")
    until(lambda: box.store.views.gauges().webhooks_pending == 0, "the webhooks")
    left = half_files(box.files)
    assert server.end() == 0
    for worker in chaos.own:
        worker.end()
    growth = Growth.of(chaos.samples)
    outcomes = Counter(
        f"{r.job.outcome} {r.job.error_type or ''}".strip() for r in box.store.views.reports(limit=10**6)
    )
    figures = {
        "seconds": seconds,
        "jobs": outcomes,
        "runs": Counter(report.job.attempt for report in box.store.views.reports(limit=10**6)),
        "met": accounts.counts,
        "done to it": chaos.done,
        "api": asdict(growth),
        "left by the dead": len(left),
        "files of SQLite, MiB": {p.name: round(p.stat().st_size / 2**20, 1) for p in box.data.glob("jobs.sqlite*")},
    }
    with capsys.disabled():
        print(f"\nsoak: {json.dumps(figures)}")
    assert chaos.done["api"]
    assert chaos.done["own worker"]
    assert_accounts_agree(box, accounts, receiver)
    assert len(left) <= sum(chaos.done.values())
    assert swept(box.files) == []
    assert list((box.data / "scratch").iterdir()) == []
    assert growth.memory_mib[1] <= growth.memory_mib[0] + GROWTH_MIB
    assert growth.descriptors[1] <= growth.descriptors[0] + CLIENTS


def assert_accounts_agree(box: Box, accounts: Accounts, receiver: Receiver) -> None:
    """Every promise was kept, and nothing else was done in its name."""
    reports = {report.job.request_id: report for report in box.store.views.reports(limit=10**6)}
    assert accounts.accepted.keys() <= reports.keys()
    for request_id, has_webhook in accounts.accepted.items():
        webhook = reports[request_id].webhook
        assert (webhook is not None) == has_webhook
        assert webhook is None or webhook.state is WebhookState.DELIVERED
        assert receiver.successes(request_id) == has_webhook
    assert {heard.request_id for heard in receiver.heard} <= accounts.accepted.keys()
    failed = [report.job for report in reports.values() if report.job.outcome is Outcome.FAILED]
    assert {(job.error_type, job.attempt) for job in failed} <= {("runner_disconnected", 3)}
    assert all(report.job.outcome for report in reports.values())
