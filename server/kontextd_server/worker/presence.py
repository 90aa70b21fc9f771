"""A worker's own row in the register of workers. Knows the store's register; knows no jobs."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

from kontextd_server.store import StoreUnavailable, Worker, WorkerState
from kontextd_server.store.workers import Workers

log = logging.getLogger(__name__)

_LEAST_PAUSE_S = 1.0  # between beats that only tell busy from ready: jobs may last milliseconds


class Presence:
    """What the worker says of itself, from any thread; one thread writes it down."""

    def __init__(self, register: Workers, worker: Worker, every_s: float) -> None:
        self._register, self._every_s = register, every_s
        self._worker = worker
        self._lock = threading.Lock()
        self._is_new = True  # something that nobody should have to wait for
        self._is_changed = False
        self._beat_at = 0.0
        self._is_heard = True

    @property
    def worker(self) -> Worker:
        return self._worker

    def say(self, *, state: WorkerState, lora_key: str | None = None) -> None:
        """What it does now, and the LoRA set it has merged."""
        with self._lock:
            urgent = {WorkerState.STARTING, WorkerState.DRAINING}
            was = self._worker.state
            if was is WorkerState.DRAINING:
                state = was  # its last word
            self._worker = replace(self._worker, state=state, lora_key=lora_key)
            self._is_changed = True
            self._is_new = self._is_new or (was is not state and bool(urgent & {was, state}))

    def describe(self, *, device: str, model_version: str) -> None:
        """What is known once the engine is loaded."""
        with self._lock:
            self._worker = replace(self._worker, device=device, model_version=model_version)

    def beat_if_due(self) -> None:
        """Write the row where it is time to, or where it says something new."""
        since_s = time.monotonic() - self._beat_at
        with self._lock:
            is_due = self._is_new or since_s >= (_LEAST_PAUSE_S if self._is_changed else self._every_s)
            worker = self._worker
            if not is_due:
                return
            self._is_new = self._is_changed = False
        self._beat_at = time.monotonic()
        try:
            self._register.beat(worker)
        except StoreUnavailable as error:
            if self._is_heard:
                log.warning("this worker cannot say that it lives, which it goes on trying: %s", error)
            self._is_heard, self._is_changed = False, True
            return
        self._is_heard = True

    def leave(self) -> None:
        """The last thing, in good order."""
        try:
            self._register.leave(self._worker.id)
        except StoreUnavailable as error:  # its row goes stale, and is pruned
            log.warning("this worker could not sign off: %s", error)
