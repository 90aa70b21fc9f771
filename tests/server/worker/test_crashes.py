"""Workers in processes of their own that are killed, frozen, hung or asked to end. Real signals, both databases."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import WAIT_S, picture_uri, until
from kontextd_server.files import FolderStore
from kontextd_server.store import (
    Claim,
    Job,
    JobState,
    Outcome,
    Store,
    StoreUnavailable,
    Success,
    WorkerState,
    open_store,
)
from kontextd_server.worker import EXIT_FAILED, EXIT_HUNG

Submit, Completed, Look = Callable[..., str], Callable[[str], Job], Callable[[str], Job]
Spawn = Callable[..., multiprocessing.Process]

on_both_databases = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


def code_of(process: multiprocessing.Process) -> int | None:
    process.join(WAIT_S)
    return process.exitcode


@pytest.fixture
def mid_step(spawn: Spawn, submit: Submit, look_at: Look) -> Callable[..., tuple[multiprocessing.Process, str]]:
    """A worker in its own process in the midst of a job, which takes ten seconds. Words go to the worker."""

    def begin(prompt: str = "long", steps: int = 50, **settings: object) -> tuple[multiprocessing.Process, str]:
        process = spawn(step_s=0.2, **settings)
        request_id = submit(prompt, num_inference_steps=steps, webhook_url="https://studio.example")
        until(lambda: (look_at(request_id).steps_done or 0) >= 1)
        return process, request_id

    return begin


@pytest.fixture
def claimed(store: Store) -> Callable[[], Claim]:
    """Claims as another worker would."""

    def take() -> Claim:
        claim = store.leases.claim("another")
        assert claim is not None
        return claim

    return take


# Killed.


@on_both_databases
def test_a_job_whose_worker_is_killed_runs_again_and_has_one_result(
    store: Store,
    files: FolderStore,
    spawn: Spawn,
    mid_step: Callable[..., tuple],
    completed: Completed,
    look_at: Look,
    tmp_path: Path,
) -> None:
    process, request_id = mid_step()
    process.kill()
    assert code_of(process) == -signal.SIGKILL
    assert store.leases.sweep(lost_worker="p1").requeued == (request_id,)
    assert look_at(request_id).state is JobState.IN_QUEUE
    left = tmp_path / "files" / "scratch" / "p1"
    assert left.exists()
    spawn("p2")
    job = completed(request_id)
    assert (job.outcome, job.attempt, job.worker, job.runs_left) == (Outcome.OK, 2, "p2", 1)
    assert len(list((files.root / "objects").glob("*/*.json"))) == 1
    assert store.views.gauges().webhooks_pending == 1
    assert "worker was lost" in str(store.views.logs(request_id))
    assert not left.exists()


# Frozen.


def freeze(process: multiprocessing.Process, store: Store) -> None:
    """Stops it, but not while it holds SQLite's lock for writing, which would stop all others as well."""
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: threads_of(process) == {"T"}, "for it to stop")
        try:
            with store.database.write():
                return
        except StoreUnavailable:
            os.kill(process.pid, signal.SIGCONT)


def threads_of(process: multiprocessing.Process) -> set[str]:
    """The states of its threads, in the letters of proc(5)."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/stat")
    return {task.read_text().rpartition(")")[2].split()[0] for task in tasks}


@on_both_databases
def test_a_frozen_worker_has_lost_its_job_when_it_wakes(
    store: Store,
    files: FolderStore,
    mid_step: Callable[..., tuple],
    claimed: Callable[[], Claim],
    submit: Submit,
    completed: Completed,
) -> None:
    process, request_id = mid_step(steps=50, lease_s=0.8)
    freeze(process, store)
    until(lambda: store.leases.sweep().requeued == (request_id,))
    claim = claimed()
    os.kill(process.pid, signal.SIGCONT)
    assert completed(submit()).worker == "p1"  # it has given the job up, and lives
    assert files.usage().used_bytes < 1200  # of that one
    store.leases.finish(claim.lease, Success(b"mine"))
    assert store.views.result(request_id).body == b"mine"


# Hung.


def test_a_worker_that_hangs_stops_renewing_and_ends(
    database_url: str, mid_step: Callable[..., tuple], look_at: Look, tmp_path: Path
) -> None:
    settings = {"lease_s": 1.2, "deadlines": {"step_s": 3.0}, "policy": {"hung_exit_s": 0.2}}
    process, request_id = mid_step("hang", stderr=str(tmp_path / "stderr"), **settings)
    assert code_of(process) == EXIT_HUNG
    told = (tmp_path / "stderr").read_text()
    assert "this worker hangs" in told
    assert "_mishap" in told  # where it hangs
    store = open_store(database_url)
    until(lambda: store.leases.sweep().requeued == (request_id,))
    assert look_at(request_id).runs_left == 2
    store.close()


# Asked to end.


def test_at_sigterm_the_running_job_is_finished(
    store: Store, mid_step: Callable[..., tuple], submit: Submit, look_at: Look
) -> None:
    process, request_id = mid_step(steps=10, policy={"drain_s": 60.0})
    waiting = submit()
    process.terminate()
    until(lambda: WorkerState.DRAINING in {row.state for row in store.workers.all()} or not process.is_alive())
    assert code_of(process) == 0
    assert look_at(request_id).outcome is Outcome.OK
    assert look_at(waiting).state is JobState.IN_QUEUE
    assert store.workers.all() == ()


@on_both_databases
def test_at_sigterm_a_long_job_is_handed_back_without_losing_a_run(
    mid_step: Callable[..., tuple], look_at: Look
) -> None:
    process, request_id = mid_step(steps=50, policy={"drain_s": 0.2})
    process.terminate()
    assert code_of(process) == 0
    job = look_at(request_id)
    assert (job.state, job.runs_left) == (JobState.IN_QUEUE, 3)


def test_a_terminal_that_closes_is_as_sigterm(mid_step: Callable[..., tuple], look_at: Look) -> None:
    process, request_id = mid_step(steps=50, policy={"drain_s": 0.2})
    os.kill(process.pid, signal.SIGHUP)
    assert code_of(process) == 0
    job = look_at(request_id)
    assert (job.state, job.runs_left) == (JobState.IN_QUEUE, 3)


def test_a_second_signal_hands_the_job_back_at_once(
    store: Store, mid_step: Callable[..., tuple], look_at: Look
) -> None:
    process, request_id = mid_step(steps=50, policy={"drain_s": 60.0, "again_s": 0.1})
    process.terminate()
    until(lambda: WorkerState.DRAINING in {row.state for row in store.workers.all()})
    time.sleep(0.2)  # since it took in the first one: more than `again_s`
    os.kill(process.pid, signal.SIGINT)
    assert code_of(process) == 0
    assert look_at(request_id).state is JobState.IN_QUEUE


def test_signals_in_quick_succession_are_one(mid_step: Callable[..., tuple], look_at: Look) -> None:
    """The death of a parent is told once for each of its threads."""
    process, request_id = mid_step(steps=10, policy={"drain_s": 60.0, "again_s": 30.0})
    for _ in range(8):
        process.terminate()
        time.sleep(0.05)
    assert code_of(process) == 0
    assert look_at(request_id).outcome is Outcome.OK


def test_at_sigterm_a_job_in_a_long_step_is_handed_back_too(mid_step: Callable[..., tuple], look_at: Look) -> None:
    policy = {"drain_s": 0.2, "hand_back_s": 0.3, "save_rest_s": 0.2}
    process, request_id = mid_step("hang", policy=policy)
    began = time.monotonic()
    process.terminate()
    assert code_of(process) == 0
    assert time.monotonic() - began < 50  # or it waited for the end of the step
    assert (look_at(request_id).state, look_at(request_id).runs_left) == (JobState.IN_QUEUE, 3)


def test_a_worker_that_waits_ends_at_once(store: Store, spawn: Spawn) -> None:
    process = spawn(policy={"poll_s": 60.0, "drain_s": 60.0})
    until(lambda: WorkerState.READY in {row.state for row in store.workers.all()})
    began = time.monotonic()
    process.terminate()
    assert code_of(process) == 0
    assert time.monotonic() - began < 30
    assert store.workers.all() == ()


def test_a_worker_that_cannot_load_its_engine_ends_with_an_error(spawn: Spawn) -> None:
    assert code_of(spawn(fails_to_load=True)) == EXIT_FAILED


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_full_disk_fails_the_job_cleanly_and_the_worker_works_on(
    store: Store, spawn: Spawn, submit: Submit, completed: Completed
) -> None:
    """No file of that process may grow over 64 KiB: write(2) fails as on a full disk. SQLite's would be such a file."""
    spawn(max_file_bytes=65536)
    large = completed(request_id := submit(image_url=picture_uri(300, 300, "jpeg")))
    assert (large.outcome, large.http_status, large.error_type) == (Outcome.FAILED, 507, "internal_error")
    assert b"file store is full" in store.views.result(request_id).body
    assert completed(submit()).outcome is Outcome.OK
