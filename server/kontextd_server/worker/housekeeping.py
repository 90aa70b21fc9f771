"""What has to be done for all jobs all the time: lost ones run again, old ones go. Knows when; the stores know how.

Any number of processes and boxes may do it at once. What may take long has a thread of its own: `OldJobs`, and
`OldFiles`, which a shared folder can hold up for ever. Lost jobs wait for neither.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from kontextd_server.files import FileStore
from kontextd_server.files.errors import FileStoreError
from kontextd_server.store import Store, StoreUnavailable, Swept
from kontextd_server.worker.policy import Backoff, HousekeepingPolicy

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_JUMP_S = 5.0  # no clock drifts so far between two sweeps


class _Duty:
    """Something to do every so often, and a little later each time that it fails."""

    def __init__(self, what: str, do: Callable[[], object], every_s: float, retry: Backoff) -> None:
        self._what, self._do, self._every_s, self._retry = what, do, every_s, retry
        self._due_at = 0.0
        self._failures = 0

    def run(self, stop: threading.Event) -> None:
        """A thread's loop, for what has one of its own."""
        while not stop.is_set():
            self.do_if_due()
            stop.wait(_LOOK_S)

    def do_if_due(self) -> None:
        if time.monotonic() < self._due_at:
            return
        try:
            self._do()
        except (StoreUnavailable, FileStoreError) as error:
            self._failures += 1
            if self._failures == 1:
                log.warning("%s cannot be looked after, which is tried again: %s", self._what, error)
            self._due_at = time.monotonic() + self._every_s + self._retry.delay_s(self._failures)
            return
        self._failures = 0
        self._due_at = time.monotonic() + self._every_s


class Housekeeping:
    """Looks after jobs that run or wait. `run` is a thread's loop; `report_lost` is called from any thread, and waits
    for nothing."""

    def __init__(self, store: Store, policy: HousekeepingPolicy | None = None, retry: Backoff | None = None) -> None:
        self._store, self._expiry = store, _Expiry(store)
        self._policy, self._retry = policy or HousekeepingPolicy(), retry or Backoff()
        self._lost: deque[str] = deque()
        self._is_lost = threading.Event()

    def report_lost(self, worker_id: str) -> None:
        """This worker's process has ended: whatever it ran is to run again now, without waiting for its lease."""
        self._lost.append(worker_id)
        self._is_lost.set()

    def run(self, stop: threading.Event) -> None:
        lost = _Duty("lost workers", self._take_lost, 0.0, self._retry)
        expired = _Duty("expired leases", self._sweep, self._policy.sweep_s, self._retry)
        while not stop.is_set():
            self._is_lost.wait(_LOOK_S)
            self._is_lost.clear()
            lost.do_if_due()
            expired.do_if_due()
        lost.do_if_due()

    def _take_lost(self) -> None:
        while self._lost:
            self._tell(self._store.leases.sweep(lost_worker=self._lost[0], expired_by=self._expiry.now()))
            self._store.workers.leave(self._lost[0])
            self._lost.popleft()

    def _sweep(self) -> None:
        self._tell(self._store.leases.sweep(expired_by=self._expiry.now()))

    def _tell(self, swept: Swept) -> None:
        if swept.requeued:
            log.warning("their worker was lost, they run again: %s", ", ".join(swept.requeued))
        if swept.failed:
            log.error("their workers were lost too often, they failed: %s", ", ".join(swept.failed))
        if swept.overdue:
            log.info("not started in time: %s", ", ".join(swept.overdue))


class OldJobs(_Duty):
    """Erases from the job store what is past its time; `run` is a thread's loop."""

    def __init__(self, store: Store, policy: HousekeepingPolicy | None = None, retry: Backoff | None = None) -> None:
        every_s = (policy or HousekeepingPolicy()).prune_s
        super().__init__("old jobs", store.retention.prune, every_s, retry or Backoff())


class OldFiles(_Duty):
    """Removes from the file store what is past its time; `run` is a thread's loop."""

    def __init__(
        self, files: FileStore, policy: HousekeepingPolicy | None = None, retry: Backoff | None = None
    ) -> None:
        every_s = (policy or HousekeepingPolicy()).files_s
        super().__init__("old files", files.sweep, every_s, retry or Backoff())


class _Expiry:
    """By when a lease must have ended to count as expired: now, but for a while after the clock went forward at once.

    Leases are times of the store's clock. Where that was set, or this machine slept, all leases end in one moment,
    though their workers are alive: these get the time to renew them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ahead_s: float | None = None  # of the monotonic clock
        self._doubtful_until = -math.inf  # by the monotonic clock

    def now(self) -> float:
        now, monotonic = self._store.clock(), time.monotonic()
        ahead_s = now - monotonic
        jump_s = 0.0 if self._ahead_s is None else ahead_s - self._ahead_s
        self._ahead_s = ahead_s
        if jump_s > _JUMP_S:
            wait_s = self._store.policy.lease_s + self._store.database.clock_lag_s
            log.warning("the clock went forward by %.0f s at once: no lease expires for %.0f s", jump_s, wait_s)
            self._doubtful_until = monotonic + wait_s
        return -math.inf if monotonic < self._doubtful_until else now
