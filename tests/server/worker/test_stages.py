"""Stages and their times, the pulse that depends on them, waits that double."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import until
from kontextd_server.worker import Backoff, Notifier, StageDeadlines, WorkerPolicy
from kontextd_server.worker.notify import ALIVE, HUNG, NotifySocket
from kontextd_server.worker.policy import SupervisorPolicy
from kontextd_server.worker.pulse import EXIT_HUNG, Pulse
from kontextd_server.worker.stages import Stage, StageWatch, Watches, allowed_s


def test_entering_a_stage_again_is_progress() -> None:
    now = [100.0]
    watch = StageWatch(allowed_s(StageDeadlines(step_s=10.0)), lambda: now[0])
    assert not watch.is_overdue
    for _ in range(3):
        watch.enter(Stage.STEP)
        now[0] += 9
        assert not watch.is_overdue
    now[0] += 2
    assert watch.is_overdue
    watch.enter(Stage.IDLE)
    now[0] += 1e9
    assert not watch.is_overdue


def test_every_stage_has_a_time_and_every_deadline_a_stage() -> None:
    allowed = allowed_s(StageDeadlines())
    assert allowed.keys() == set(Stage)
    for field in fields(StageDeadlines):
        longer = StageDeadlines(**{field.name: 1e6})
        assert allowed_s(longer) != allowed, field.name


def test_a_pulse_beats_until_a_stage_is_overdue_and_then_says_that_it_hangs(tmp_path: Path) -> None:
    watches = Watches(StageDeadlines(step_s=0.3))
    codes: list[int] = []
    with NotifySocket(tmp_path / "n.sock") as listener:
        notifier = Notifier(listener.address)
        pulse = Pulse(watches, notifier, 0.02, 0.1, codes.append)
        thread = threading.Thread(target=pulse.run)
        thread.start()
        with watches.one() as watch:
            watch.enter(Stage.STEP)
            heard: list[str] = []
            until(lambda: heard.extend(listener.heard()) or HUNG in heard)
            assert pulse.is_hung.is_set()
            until(lambda: codes == [EXIT_HUNG])
        thread.join()
        notifier.close()
    assert heard[0] == ALIVE
    assert heard[-1] == HUNG


def test_a_pulse_ends_when_it_is_told(tmp_path: Path) -> None:
    pulse = Pulse(Watches(StageDeadlines()), Notifier(None), 60.0, 60.0, pytest.fail)
    thread = threading.Thread(target=pulse.run)
    thread.start()
    pulse.end()
    thread.join(5)
    assert not thread.is_alive()


def test_waits_double_up_to_a_bound_and_differ() -> None:
    backoff = Backoff(first_s=1.0, most_s=8.0)
    for failures, most in ((1, 1.0), (2, 2.0), (4, 8.0), (9, 8.0), (10_000, 8.0)):
        waits = [backoff.delay_s(failures) for _ in range(20)]
        assert most / 2 <= min(waits) < max(waits) <= most


def test_a_supervisor_waits_longer_than_a_worker_takes_to_end() -> None:
    assert SupervisorPolicy().stop_s > WorkerPolicy().stop_s
