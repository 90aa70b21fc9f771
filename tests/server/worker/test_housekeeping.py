"""Lost workers, start deadlines, old rows: done by themselves, and done later where a store does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import until
from engines import Unwilling
from kontextd_server.files import FolderStore, Label
from kontextd_server.store import Job, JobState, Store, StoreUnavailable
from kontextd_server.worker import Backoff, Housekeeping, HousekeepingPolicy

Submit, Completed, Look = Callable[..., str], Callable[[str], Job], Callable[[str], Job]
RARELY = HousekeepingPolicy(sweep_s=60.0)


@pytest.fixture
def keep_house() -> Iterator[Callable[[Housekeeping], Housekeeping]]:
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def begin(housekeeping: Housekeeping) -> Housekeeping:
        threads.append(threading.Thread(target=housekeeping.run, args=(stop,)))
        threads[-1].start()
        return housekeeping

    yield begin
    stop.set()
    for thread in threads:
        thread.join(10)


def test_the_jobs_of_a_lost_worker_run_again_at_once(
    store: Store, files: FolderStore, submit: Submit, look_at: Look, keep_house: Callable[..., Housekeeping]
) -> None:
    request_id = submit()
    store.leases.claim("w1")
    keep_house(Housekeeping(store, files, RARELY)).report_lost("w1")
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)


def test_a_lost_worker_is_not_forgotten_while_the_store_does_not_answer(
    store: Store, files: FolderStore, submit: Submit, look_at: Look, keep_house: Callable[..., Housekeeping]
) -> None:
    request_id = submit()
    store.leases.claim("w1")
    leases = Unwilling(store.leases)
    leases.fail_next("sweep", StoreUnavailable("away"), 5)
    keep_house(Housekeeping(replace(store, leases=leases), files, RARELY, Backoff(0.01, 0.05))).report_lost("w1")
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)
    assert leases.calls["sweep"] >= 6


def test_a_job_that_did_not_start_in_time_is_ended(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, keep_house: Callable[..., Housekeeping]
) -> None:
    request_id = submit(start_within_s=0.3)
    keep_house(Housekeeping(store, files, HousekeepingPolicy(sweep_s=0.1)))
    assert completed(request_id).error_type == "request_timeout"


def test_what_is_old_goes_from_both_stores(
    store: Store, files: FolderStore, tmp_path: Path, keep_house: Callable[..., Housekeeping]
) -> None:
    files.put([b"old"], Label(lifetime_s=0.0))
    retention = Unwilling(store.retention)
    keep_house(Housekeeping(replace(store, retention=retention), files, HousekeepingPolicy(prune_s=0.1, files_s=0.1)))
    until(lambda: files.usage().used_bytes == 0 and retention.calls.get("prune", 0) >= 2)


def test_a_file_store_that_is_away_does_not_stop_the_rest(
    store: Store, files: FolderStore, submit: Submit, look_at: Look, keep_house: Callable[..., Housekeeping]
) -> None:
    from kontextd_server.files.errors import StoreUnavailable as FilesUnavailable

    away = Unwilling(files)
    away.fail_next("sweep", FilesUnavailable("not mounted"), 10_000)
    request_id = submit()
    store.leases.claim("w1")
    housekeeping = keep_house(Housekeeping(store, away, HousekeepingPolicy(sweep_s=60.0, files_s=0.0), Backoff(0.01)))
    until(lambda: away.calls.get("sweep", 0) >= 2)
    housekeeping.report_lost("w1")
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)
