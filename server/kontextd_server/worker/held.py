"""A job that this worker holds, as its threads share it. Knows leases and what is told of a job; knows no engine.

The thread that works on the job says where it is and what there is to tell; the keeper of the leases carries it to the
store and brings back whether the job is still ours; whoever ends the job ends it once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kontextd_models import Step
from PIL import Image

from kontextd_server.pictures import PictureFormat, encode
from kontextd_server.store import (
    Claim,
    Failure,
    FinishAnswer,
    LogLine,
    Progress,
    Standing,
    StoreUnavailable,
    Success,
)
from kontextd_server.store.leases import Leases
from kontextd_server.wire.progress_lines import progress_line
from kontextd_server.worker.stages import StageWatch


@dataclass(frozen=True)
class News:
    """What there is to tell of a job."""

    logs: tuple[LogLine, ...] = ()
    progress: Progress | None = None
    preview: Image.Image | None = None  # encoded by whoever carries it, not by the thread of the engine

    @classmethod
    def of_step(cls, step: Step) -> News:
        line = log_line(progress_line(step.index, step.total, step.elapsed_s), "INFO")
        return cls((line,), Progress(step.index, step.total), step.preview)

    def then(self, later: News) -> News:
        """Both: every line, the newest progress and preview."""
        return News(self.logs + later.logs, later.progress or self.progress, later.preview or self.preview)


def log_line(message: str, level: str) -> LogLine:
    """A line of a job's log. It may quote its caller, and PostgreSQL keeps no NUL and no half surrogate pair."""
    storable = message.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return LogLine(storable, time.time(), level)


class HeldJob:
    """Made by `LeaseKeeper.hold`. `watch` is where the work on it stands."""

    def __init__(self, claim: Claim, watch: StageWatch, wake: Callable[[], None], patience_s: float) -> None:
        self.claim = claim
        self.watch = watch
        self._wake, self._patience_s = wake, patience_s
        self._turn = threading.Lock()  # one call about this lease at a time
        self._changed = threading.Condition()  # of what follows
        self._standing = Standing.HELD
        self._news = News()
        self._asked = self._answered = 0
        self._is_ended = False

    @property
    def standing(self) -> Standing:
        """As of the last time that the store was asked."""
        return self._standing

    def tell(self, news: News) -> None:
        """Something to be carried with the next renewal."""
        with self._changed:
            self._news = self._news.then(news)

    def report(self, news: News) -> Standing:
        """Tell, and renew the lease now: the answer is fresh, unless the store is slow to give it.

        While an earlier report has no answer nobody waits, so a slow store costs one wait, not one a step.
        """
        with self._changed:
            is_behind = self._answered < self._asked
            self._news = self._news.then(news)
            self._asked += 1
            number = self._asked
        self._wake()
        with self._changed:
            if not is_behind:
                self._changed.wait_for(lambda: self._answered >= number, self._patience_s)
            return self._standing

    # What the keeper calls.

    @property
    def wants_renewal(self) -> bool:
        return self._answered < self._asked or self._news != News()

    def renew(self, leases: Leases) -> None:
        """Carry the news to the store. Raises `StoreUnavailable`, with the news kept for the next time."""
        with self._turn:
            if self._is_ended:
                return
            news, number = self._take()
            try:
                standing = leases.renew(
                    self.claim.lease, logs=news.logs, progress=news.progress, preview=_as_jpeg(news.preview)
                )
            except StoreUnavailable:
                self._keep(news, number)
                raise
            self._answer(number, standing)

    # What ends it.

    def finish(self, leases: Leases, ending: Success | Failure) -> FinishAnswer:
        """Record the ending with the lines still to tell. Raises `StoreUnavailable`: then call it again."""
        with self._turn:
            news, number = self._take()
            try:
                answer = leases.finish(self.claim.lease, ending, logs=news.logs)
            except StoreUnavailable:
                self._keep(news, number)
                raise
            self._is_ended = True
            return answer

    def release(self, leases: Leases) -> bool:
        """Hand the job back. Raises `StoreUnavailable`."""
        with self._turn:
            released = not self._is_ended and leases.release(self.claim.lease)
            self._is_ended = True
            return released

    def _take(self) -> tuple[News, int]:
        with self._changed:
            news, self._news = self._news, News()
            return news, self._asked

    def _keep(self, news: News, number: int) -> None:
        with self._changed:
            self._news = news.then(self._news)
            self._answered = max(self._answered, number)  # the step goes on; the next one asks again
            self._changed.notify_all()

    def _answer(self, number: int, standing: Standing) -> None:
        with self._changed:
            self._standing = standing
            self._answered = max(self._answered, number)
            self._changed.notify_all()


def _as_jpeg(preview: Image.Image | None) -> bytes | None:
    return None if preview is None else encode(preview, PictureFormat.JPEG).data
