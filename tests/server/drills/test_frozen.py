"""Workers that nobody supervises stand still past their lease: when they go on, their jobs are another's."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from kontextd_server.store import JobState, Outcome

from .box import Box
from .processes import Running, until

LOST = ("the lease was lost", "is given up: lost", ": fenced")  # by whichever thread comes first
WHERE = {"hold": 21, "hold-end": 22}  # in a step, or with the picture in hand; and the seed


def test_workers_that_were_stopped_past_their_lease_cannot_finish(
    box: Box, start_worker: Callable[..., Running], gate: Path
) -> None:
    anna = box.caller()
    stopped = {name: start_worker(name) for name in ("a", "b")}
    jobs = {anna.submit(f"{where} {gate}", seed=seed): seed for where, seed in WHERE.items()}
    held_by = {request_id: box.in_step(request_id).worker for request_id in jobs}
    for first in stopped.values():
        first.freeze(box.data / "jobs.sqlite")
    others = {name: start_worker(name) for name in ("c", "d")}
    taken_by = {request_id: box.in_step(request_id, attempt=2).worker for request_id in jobs}
    assert set(taken_by.values()) == others.keys()
    for request_id, seed in jobs.items():
        first = stopped[held_by[request_id]]
        gate.with_name(f"{gate.name}-{held_by[request_id]}").touch()
        first.send(signal.SIGCONT)  # while the other one runs it
        until(lambda: any(word in first.logged for word in LOST), "the fence")  # noqa: B023
        job = box.job(request_id)
        assert (job.state, job.attempt, job.worker) == (JobState.IN_PROGRESS, 2, taken_by[request_id])
        gate.with_name(f"{gate.name}-{taken_by[request_id]}").touch()
        anna.made(anna.completed(request_id))
        job = box.job(request_id)
        assert (job.outcome, job.attempt, job.worker) == (Outcome.OK, 2, taken_by[request_id])
        assert box.pictures_of(seed) == 1
        assert first.end() == 0  # it lived on, and ends in good order
