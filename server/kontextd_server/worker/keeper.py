"""Keeps the leases of a worker: one thread that talks to the store while others work. Knows leases; knows no engine.

A lease is renewed when there is something to report, and every few seconds in any case, as long as the stage of the job
is within its time. Past it the renewing stops, and the job becomes another worker's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kontextd_server.store import Claim, Standing, StoreUnavailable
from kontextd_server.store.leases import Leases
from kontextd_server.worker.held import HeldJob
from kontextd_server.worker.presence import Presence
from kontextd_server.worker.stages import Watches

log = logging.getLogger(__name__)

_LOOK_S = 0.25  # how long news may wait that nobody is to be kept waiting for


class LeaseKeeper:
    """`run` is the thread; everything else may be called from any. `hung` set: nothing is renewed any more."""

    def __init__(
        self,
        leases: Leases,
        presence: Presence,
        watches: Watches,
        hung: threading.Event,
        *,
        renew_every_s: float,
        patience_s: float,
    ) -> None:
        self.leases = leases
        self._presence, self._watches, self._hung = presence, watches, hung
        self._renew_every_s, self._patience_s = renew_every_s, patience_s
        self._held: dict[HeldJob, float] = {}  # and when it was last renewed
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._woken.set()  # the first thing it does is to say that the worker is there
        self._ended = threading.Event()
        self._is_heard = True

    def hold(self, claim: Claim) -> HeldJob:
        held = HeldJob(claim, self._watches.begin(), self.wake, self._patience_s)
        with self._lock:
            self._held[held] = time.monotonic()
        return held

    def drop(self, held: HeldJob) -> None:
        """It is done, or lost."""
        with self._lock:
            self._held.pop(held, None)
        self._watches.end(held.watch)

    def held(self) -> tuple[HeldJob, ...]:
        with self._lock:
            return tuple(self._held)

    def wake(self) -> None:
        self._woken.set()

    def end(self) -> None:
        self._ended.set()
        self._woken.set()

    def run(self) -> None:
        while not self._ended.is_set():
            self._woken.wait(min(_LOOK_S, self._renew_every_s / 2))
            self._woken.clear()
            for held in self.held():
                if self._is_due(held):
                    self._renew(held)
            self._presence.beat_if_due()

    def _is_due(self, held: HeldJob) -> bool:
        if self._hung.is_set() or held.watch.is_overdue or held.standing is Standing.LOST:
            return False
        return held.wants_renewal or time.monotonic() - self._held.get(held, 0.0) >= self._renew_every_s

    def _renew(self, held: HeldJob) -> None:
        with self._told_once(held):
            held.renew(self.leases)
        with self._lock:
            if held in self._held:
                self._held[held] = time.monotonic()
        if held.standing is Standing.LOST:
            log.warning("request %s: the lease was lost, its work is thrown away", held.claim.request_id)

    @contextmanager
    def _told_once(self, held: HeldJob) -> Iterator[None]:
        """An outage of the store is logged when it begins and when it ends. The work goes on meanwhile."""
        try:
            yield
        except StoreUnavailable as error:
            if self._is_heard:
                log.warning("leases cannot be renewed, which is tried again: %s", error)
            self._is_heard = False
            return
        except Exception as error:  # something in the news that the store cannot take: without them it is renewed
            log.error("request %s: what it has to tell is lost", held.claim.request_id, exc_info=error)
            return
        if not self._is_heard:
            log.warning("the job store answers again")
        self._is_heard = True
