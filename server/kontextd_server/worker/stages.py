"""Where a process is in its work, and until when it may be there. Knows clocks; knows nothing of the work itself."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from kontextd_server.worker.policy import StageDeadlines


class Stage(StrEnum):
    IDLE = "idle"  # waits for a job, a place or another thread: for ever, if need be
    LOAD = "load"
    WARM_UP = "warm_up"
    CLAIM = "claim"
    FETCH = "fetch"
    OPEN = "open"
    PREPARE = "prepare"  # until the first step is done: encode, read and merge LoRAs, compile
    STEP = "step"
    DECODE = "decode"  # after the last step of an image; of several, the next one's first step with it
    SAVE = "save"
    FINISH = "finish"


def allowed_s(deadlines: StageDeadlines) -> Mapping[Stage, float]:
    """Each stage's time."""
    return {
        Stage.IDLE: math.inf,
        Stage.LOAD: deadlines.load_s,
        Stage.WARM_UP: deadlines.warm_up_s,
        Stage.CLAIM: deadlines.claim_s,
        Stage.FETCH: deadlines.fetch_s,
        Stage.OPEN: deadlines.open_s,
        Stage.PREPARE: deadlines.merge_s + deadlines.compile_s + deadlines.step_s,
        Stage.STEP: deadlines.step_s,
        Stage.DECODE: deadlines.decode_s + deadlines.step_s,
        Stage.SAVE: deadlines.save_s,
        Stage.FINISH: deadlines.finish_s,
    }


class StageWatch:
    """The stage of one piece of work. Entering a stage again is progress, and starts its time anew."""

    def __init__(self, allowed: Mapping[Stage, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed, self._clock = allowed, clock
        self._now = (Stage.IDLE, math.inf)  # one value, so that other threads never see half a change

    @property
    def stage(self) -> Stage:
        return self._now[0]

    def enter(self, stage: Stage, *, more_s: float = 0.0) -> None:
        """`more_s`: what this piece of work may take beyond the stage's usual time."""
        self._now = (stage, self._clock() + self._allowed[stage] + more_s)

    @property
    def is_overdue(self) -> bool:
        return self._clock() > self._now[1]


class Watches:
    """All that a process has under way."""

    def __init__(self, deadlines: StageDeadlines) -> None:
        self._allowed = allowed_s(deadlines)
        self._watches: set[StageWatch] = set()
        self._lock = threading.Lock()

    def begin(self) -> StageWatch:
        watch = StageWatch(self._allowed)
        with self._lock:
            self._watches.add(watch)
        return watch

    def end(self, watch: StageWatch) -> None:
        with self._lock:
            self._watches.discard(watch)

    @contextmanager
    def one(self) -> Iterator[StageWatch]:
        watch = self.begin()
        try:
            yield watch
        finally:
            self.end(watch)

    def overdue(self) -> Stage | None:
        """The stage that has gone on for too long."""
        with self._lock:
            return next((watch.stage for watch in self._watches if watch.is_overdue), None)
