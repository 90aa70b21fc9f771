"""kill -9 of `kontextd serve` itself, alone and with all that it started: nothing is lost, nothing is left for ever."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kontextd_server.store import JobState, Outcome

from .box import Box, NewBox
from .processes import Running, is_alive, until
from .receiver import Receiver
from .test_serving import assert_nothing_is_left, group_of


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands of this test keep their sockets. The path of one has to be short."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def kill(run: Running) -> None:
    run.send(signal.SIGKILL)
    assert run.exit_code() == -signal.SIGKILL


def test_what_a_killed_supervisor_started_ends_by_itself_and_the_next_start_makes_the_rest(
    new_box: NewBox, new_receiver: Callable[..., Receiver], gate: Path, temporary: Path
) -> None:
    box, receiver = new_box(drain_s="1", lease_s="3600"), new_receiver()  # no lease ends within the test
    first = box.serve(workers=1)
    anna = box.caller()
    running = anna.submit(f"walk {gate}", webhook=receiver.url, seed=21, num_inference_steps=50, num_images=4)
    waiting = anna.submit(webhook=receiver.url, seed=25)
    box.in_step(running)
    kill(first)
    (left,) = temporary.glob("kontextd-*")
    until(lambda: not any(map(is_alive, group_of(first))), "the end of what it started")
    assert_nothing_is_left(box, first)
    assert [box.job(one).state for one in (running, waiting)] == [JobState.IN_QUEUE] * 2
    assert box.job(running).runs_left == 3  # it was handed back, as if it had not been begun
    gate.touch()
    second = box.serve(workers=1)
    assert list(temporary.glob("kontextd-*")) != [left]
    assert not left.exists()
    for request_id in (running, waiting):
        anna.made(anna.completed(request_id))
    assert [box.pictures_of(seed) for seed in (21, 22, 23, 24, 25)] == [1] * 5
    until(lambda: box.store.views.gauges().webhooks_pending == 0, "the webhooks")
    assert [receiver.successes(request_id) for request_id in (running, waiting)] == [1, 1]
    assert second.end() == 0
    assert list(temporary.iterdir()) == []


def test_where_all_are_killed_at_once_the_job_runs_again_after_its_lease(
    new_box: NewBox, gate: Path, temporary: Path
) -> None:
    """As systemd kills what is left of a service, the kernel a container, and a power cut all."""
    box = new_box(lease_s="6")
    first = box.serve(workers=1)
    anna = box.caller()
    running = anna.submit(f"hold {gate}", seed=31)
    waiting = anna.submit(seed=32)
    box.in_step(running)
    killed_at_once(first)
    assert box.job(running).state is JobState.IN_PROGRESS
    assert scratch_of(box) != []
    gate.touch()
    box.serve(workers=1)
    for request_id in (running, waiting):
        anna.made(anna.completed(request_id))
    assert (box.job(running).outcome, box.job(running).attempt) == (Outcome.OK, 2)
    assert [box.pictures_of(seed) for seed in (31, 32)] == [1, 1]
    assert len(list(temporary.glob("kontextd-*"))) == 1
    until(lambda: scratch_of(box) == [], "an empty scratch folder")


def killed_at_once(run: Running) -> None:
    pids = group_of(run)
    run.send(signal.SIGSTOP)  # or it would start them again
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    kill(run)
    until(lambda: not any(map(is_alive, pids)), "the end of all")


def scratch_of(box: Box) -> list[Path]:
    return list((box.data / "scratch").glob("*/*"))
