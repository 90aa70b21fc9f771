"""PostgreSQL is a standby for a while, which answers and takes no changes: what was made is kept until it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from kontextd_server.store import Outcome
from psycopg.errors import ReadOnlySqlTransaction

from .box import NewBox
from .calls import Caller
from .clusters import Cluster, cluster
from .processes import until
from .receiver import Receiver


@pytest.fixture
def postgres() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


def become_standby(postgres: Cluster) -> None:
    postgres.control("stop", "-m", "fast")
    (postgres.folder / "data" / "standby.signal").touch()
    postgres.control("start")


def wakeups(caller: Caller) -> str:
    return str(caller.http.get("/health").json().get("wakeups"))


def test_a_picture_made_while_nothing_can_be_written_is_kept_and_told(
    postgres: Cluster, new_box: NewBox, new_receiver: Callable[..., Receiver], gate: Path
) -> None:
    receiver = new_receiver()
    box = new_box(database=postgres.url, lease_s="600")
    run = box.serve(workers=1)
    anna = box.caller()
    request_id = anna.submit(f"hold-end {gate}", webhook=receiver.url)
    box.in_step(request_id)
    until(lambda: wakeups(anna) == "ok", "wake-ups")
    become_standby(postgres)
    with psycopg.connect(postgres.url.replace("+psycopg", "")) as standby, pytest.raises(ReadOnlySqlTransaction):
        standby.execute("LISTEN kontextd")
    until(lambda: wakeups(anna) == "polling", "the watching to fail")
    gate.touch()
    until(lambda: f"request {request_id}: its end cannot be recorded yet" in run.logged, "the worker to try")
    postgres.control("promote")
    assert anna.completed(request_id).status_code == 200
    until(lambda: receiver.successes(request_id) == 1, "the webhook")
    until(lambda: wakeups(anna) == "ok", "wake-ups again")
    anna.completed(anna.submit(webhook=receiver.url))
    until(lambda: len(receiver.heard) == 2, "the next webhook")
    assert (box.job(request_id).outcome, box.job(request_id).attempt) == (Outcome.OK, 1)
    assert len(run.pids("worker-0")) == len(run.pids("api")) == 1  # none of them died of it
