"""`kontextd serve` from its start to its end: SIGTERM while jobs run and wait, a new start, a worker that joins."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from kontextd_models.embedded import sample_photo
from kontextd_server.store import JobState, Outcome

from .box import Box, NewBox
from .processes import REAL, Running, is_alive, until

DRAIN_S = 100.0  # the set time; a worker's own time to the end comes on top of it


def left_running(folder: Path) -> list[str]:
    """Processes whose environment names a data folder."""
    mark = f"KONTEXTD_DATA={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0") and is_alive(int(process.name)):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def group_of(run: Running) -> set[int]:
    """The processes that it started, by its log."""
    return {*run.pids("api"), *run.pids("worker-0")}


def assert_nothing_is_left(box: Box, run: Running) -> None:
    assert not any(is_alive(pid) for pid in group_of(run))
    assert left_running(box.data) == []
    assert box.store.workers.all() == ()
    assert list((box.data / "scratch").glob("*/*")) == []


def test_sigterm_lets_the_demonstration_model_finish_and_a_new_start_makes_the_rest(new_box: NewBox) -> None:
    box = new_box(drain_s=str(DRAIN_S))
    first = box.serve(workers=1, program=REAL)
    anna = box.caller()
    photo = anna.upload(sample_photo().read_bytes())
    edit = {"prompt": "make it black and white", "image_url": photo}
    running = anna.submit(**edit, num_inference_steps=12)
    waiting = [anna.submit(**edit, num_inference_steps=2) for _ in range(2)]
    box.in_step(running)
    began = time.monotonic()
    first.send(signal.SIGTERM)
    assert first.exit_code() == 0, first.logged
    assert time.monotonic() - began < DRAIN_S + 60
    assert_nothing_is_left(box, first)
    assert (box.job(running).outcome, box.job(running).attempt) == (Outcome.OK, 1)
    assert [box.job(one).state for one in waiting] == [JobState.IN_QUEUE] * 2
    box.serve(workers=1)
    for request_id in (running, *waiting):
        anna.made(anna.completed(request_id))


def test_sigterm_hands_back_what_takes_too_long_and_the_next_worker_makes_it(new_box: NewBox, gate: Path) -> None:
    box = new_box(drain_s="0.5")
    first = box.serve(workers=1)
    anna = box.caller()
    running = anna.submit(f"walk {gate}", num_inference_steps=50, num_images=4)
    box.in_step(running)
    first.send(signal.SIGTERM)
    assert first.exit_code() == 0, first.logged
    assert_nothing_is_left(box, first)
    job = box.job(running)
    assert (job.state, job.runs_left) == (JobState.IN_QUEUE, 3)  # as if it had not been begun
    gate.touch()
    second = box.worker("second")
    until(lambda: box.job(running).outcome is Outcome.OK, "the end of what was handed back")
    assert box.job(running).runs_left == 2
    second.send(signal.SIGINT)
    assert second.exit_code() == 0


def test_a_worker_with_another_data_folder_joins_by_database_and_files(
    box: Box, start_worker: Callable[..., Running], tmp_path: Path
) -> None:
    anna = box.caller()
    photo = anna.upload(sample_photo().read_bytes())
    start_worker("joined", data=str(tmp_path / "elsewhere"), database=box.database, files=str(box.files))
    request_id = anna.submit(image_url=photo)
    anna.made(anna.completed(request_id))
    assert box.job(request_id).worker == "joined"
    assert not (tmp_path / "elsewhere" / "jobs.sqlite").exists()
    assert (tmp_path / "elsewhere" / "scratch").is_dir()
    until(lambda: "joined" in str(anna.http.get("/health").json()["workers"]), "its place in /health")
