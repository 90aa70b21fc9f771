"""Lost workers, start deadlines, old rows: done by themselves, and done later where a store does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from conftest import until
from engines import PATIENCE_S, Unwilling
from kontextd_server.files import FolderStore, Label
from kontextd_server.store import Job, JobState, Policy, Standing, Store, StoreUnavailable
from kontextd_server.store.store import assemble
from kontextd_server.worker import Backoff, Companion, Housekeeping, HousekeepingPolicy, OldFiles, OldJobs

Submit, Completed, Look = Callable[..., str], Callable[[str], Job], Callable[[str], Job]
KeepHouse = Callable[[Housekeeping], Housekeeping]
RARELY, OFTEN = HousekeepingPolicy(sweep_s=60.0), HousekeepingPolicy(sweep_s=0.02)


@pytest.fixture
def beside() -> Iterator[Callable[[Companion], None]]:
    """Runs companions of a supervisor in threads."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def begin(companion: Companion) -> None:
        threads.append(threading.Thread(target=companion.run, args=(stop,)))
        threads[-1].start()

    yield begin
    stop.set()
    for thread in threads:
        thread.join(10)


@pytest.fixture
def keep_house(beside: Callable[[Companion], None]) -> KeepHouse:
    def begin(housekeeping: Housekeeping) -> Housekeeping:
        beside(housekeeping)
        return housekeeping

    return begin


class SetClock:
    """Goes on by itself, and can be set."""

    def __init__(self) -> None:
        self.ahead_s = 1_700_000_000.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def test_the_jobs_of_a_lost_worker_run_again_at_once(
    store: Store, submit: Submit, look_at: Look, keep_house: KeepHouse
) -> None:
    request_id = submit()
    store.leases.claim("w1")
    keep_house(Housekeeping(store, RARELY)).report_lost("w1")
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)


def test_a_lost_worker_is_not_forgotten_while_the_store_does_not_answer(
    store: Store, submit: Submit, look_at: Look, keep_house: KeepHouse
) -> None:
    request_id = submit()
    store.leases.claim("w1")
    leases = Unwilling(store.leases)
    leases.fail_next("sweep", StoreUnavailable("away"), 5)
    keep_house(Housekeeping(replace(store, leases=leases), RARELY, Backoff(0.01, 0.05))).report_lost("w1")
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)
    assert leases.calls["sweep"] >= 6


def test_a_job_that_did_not_start_in_time_is_ended(
    store: Store, submit: Submit, completed: Completed, keep_house: KeepHouse
) -> None:
    request_id = submit(start_within_s=0.3)
    keep_house(Housekeeping(store, HousekeepingPolicy(sweep_s=0.1)))
    assert completed(request_id).error_type == "request_timeout"


def test_what_is_old_goes_from_both_stores(
    store: Store, files: FolderStore, beside: Callable[[Companion], None]
) -> None:
    files.put([b"old"], Label(lifetime_s=0.0))
    retention = Unwilling(store.retention)
    often = HousekeepingPolicy(prune_s=0.1, files_s=0.1)
    beside(OldJobs(replace(store, retention=retention), often))
    beside(OldFiles(files, often))
    until(lambda: files.usage().used_bytes == 0 and retention.calls.get("prune", 0) >= 2)


def test_a_file_store_that_is_away_is_looked_after_when_it_is_back(
    files: FolderStore, beside: Callable[[Companion], None]
) -> None:
    from kontextd_server.files.errors import StoreUnavailable as FilesUnavailable

    files.put([b"old"], Label(lifetime_s=0.0))
    away = Unwilling(files)
    away.fail_next("sweep", FilesUnavailable("not mounted"), 3)
    beside(OldFiles(away, HousekeepingPolicy(files_s=0.0), Backoff(0.01)))
    until(lambda: files.usage().used_bytes == 0)
    assert away.calls["sweep"] >= 4


def test_lost_jobs_and_old_ones_do_not_wait_for_files_that_hang(
    store: Store, submit: Submit, look_at: Look, keep_house: KeepHouse, beside: Callable[[Companion], None]
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class HangingFiles:
        """On a share that does not answer."""

        def sweep(self) -> None:
            entered.set()
            assert go_on.wait(PATIENCE_S)

    request_id = submit()
    store.leases.claim("w1")
    retention = Unwilling(store.retention)
    beside(OldFiles(HangingFiles()))
    assert entered.wait(PATIENCE_S)
    beside(OldJobs(replace(store, retention=retention)))
    keep_house(Housekeeping(store, RARELY)).report_lost("w1")
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)
    until(lambda: retention.calls.get("prune", 0) >= 1)
    go_on.set()


# The clock is set.


def test_a_clock_that_goes_forward_takes_no_job_from_a_worker_that_lives(
    store: Store, submit: Submit, look_at: Look, keep_house: KeepHouse, caplog: pytest.LogCaptureFixture
) -> None:
    clock, store, leases = by_a_clock(store, lease_s=600.0)
    housekeeping = keep_house(Housekeeping(replace(store, leases=leases), OFTEN))
    request_id, other = submit(), submit()
    held = store.leases.claim("w1").lease
    store.leases.claim("w2")
    for hours in (1, 2):
        wait_for_sweeps(leases)
        clock.ahead_s += hours * 3600.0
        wait_for_sweeps(leases)
        assert store.leases.renew(held) is Standing.HELD
    assert "the clock went forward by 7200 s at once" in caplog.text
    housekeeping.report_lost("w2")
    until(lambda: look_at(other).state is JobState.IN_QUEUE)
    wait_for_sweeps(leases)
    assert store.leases.renew(held) is Standing.HELD
    assert look_at(request_id).attempt == 1


def test_after_a_lease_the_jobs_of_workers_that_did_not_renew_run_again(
    store: Store, submit: Submit, look_at: Look, keep_house: KeepHouse
) -> None:
    clock, store, leases = by_a_clock(store, lease_s=0.2)
    keep_house(Housekeeping(replace(store, leases=leases), OFTEN))
    wait_for_sweeps(leases)
    request_id = submit()
    store.leases.claim("w1")
    clock.ahead_s += 3600.0
    until(lambda: look_at(request_id).state is JobState.IN_QUEUE)


def test_a_clock_that_goes_back_ends_no_lease(
    store: Store, submit: Submit, keep_house: KeepHouse, caplog: pytest.LogCaptureFixture
) -> None:
    clock, store, leases = by_a_clock(store, lease_s=600.0)
    keep_house(Housekeeping(replace(store, leases=leases), OFTEN))
    wait_for_sweeps(leases)
    submit()
    held = store.leases.claim("w1").lease
    clock.ahead_s -= 3600.0
    wait_for_sweeps(leases)
    assert store.leases.renew(held) is Standing.HELD
    assert "went forward" not in caplog.text


def by_a_clock(store: Store, lease_s: float) -> tuple[SetClock, Store, Unwilling]:
    """A clock that can be set, a store of the same database that goes by it, and its leases for those who sweep."""
    clock = SetClock()
    made = assemble(store.database, Policy(lease_s=lease_s), clock)
    return clock, made, Unwilling(made.leases)


def wait_for_sweeps(leases: Unwilling) -> None:
    """Of which at least one begins and ends from now on."""
    before = leases.calls.get("sweep", 0)
    until(lambda: leases.calls.get("sweep", 0) >= before + 2)
