"""Ends jobs beside the engine: saves results, records endings, hands jobs back. Knows the stores; knows no engine.

One thread takes one ending after the other, and the engine's next job runs meanwhile. A job store that does not answer
is asked again and again: a finished job is not thrown away for want of a database.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass

from kontextd_server.files.errors import StoreUnavailable as FilesUnavailable
from kontextd_server.store import CANCELLED, Failure, FinishAnswer, Standing, StoreUnavailable, Success
from kontextd_server.worker.edit import Edited
from kontextd_server.worker.failures import failure_of, job_answer
from kontextd_server.worker.held import HeldJob, News, log_line
from kontextd_server.worker.keeper import LeaseKeeper
from kontextd_server.worker.policy import Backoff
from kontextd_server.worker.results import KeptResult, ResultKeeper
from kontextd_server.worker.stages import Stage

log = logging.getLogger(__name__)

_SAVE_TRIES = 3
_RECORDED = (FinishAnswer.RECORDED, FinishAnswer.ALREADY_RECORDED)


@dataclass(frozen=True)
class HandBack:
    """The job goes back into the queue, as if it had not been claimed."""


Ending = Edited | Failure | HandBack


class Saver:
    """`run` is the thread. `end` lets it finish what it has; `abandon` ends it where it is."""

    def __init__(self, results: ResultKeeper, keeper: LeaseKeeper, retry: Backoff, waiting: int) -> None:
        self._results, self._keeper, self._retry = results, keeper, retry
        self._endings: queue.Queue[tuple[HeldJob, Ending] | None] = queue.Queue(waiting)
        self._abandoned = threading.Event()

    def put(self, held: HeldJob, ending: Ending) -> None:
        """End this job so. Waits where as many wait already as may."""
        held.watch.enter(Stage.IDLE)
        self._endings.put((held, ending))

    def fail(self, held: HeldJob, error: BaseException) -> None:
        held.tell(_told(error))
        self.put(held, failure_of(error, held.claim.request_id))

    def end(self) -> None:
        self._endings.put(None)

    def abandon(self) -> None:
        self._abandoned.set()

    def run(self) -> None:
        while (item := self._endings.get()) is not None:
            held, ending = item
            try:
                self._end(held, ending)
            except Exception as error:  # the thread must go on; the job's lease lapses, and it is run again
                log.error("request %s could not be ended", held.claim.request_id, exc_info=error)
            self._keeper.drop(held)

    def _end(self, held: HeldJob, ending: Ending) -> None:
        if isinstance(ending, HandBack):
            self._hand_back(held)
        elif isinstance(ending, Failure):
            self._finish(held, ending)
        elif held.standing is Standing.CANCEL_REQUESTED:
            self._finish(held, CANCELLED)
        elif held.standing is Standing.HELD:
            self._save(held, ending)

    def _save(self, held: HeldJob, edited: Edited) -> None:
        try:
            kept = self._kept(held, edited)
        except Exception as error:  # a full disk or a bug: the caller is told, and the cause is logged there
            held.tell(_told(error))
            self._finish(held, failure_of(error, held.claim.request_id))
            return
        answer = self._finish(held, kept.success)
        if answer is not None and answer not in _RECORDED:
            self._results.forget(kept.keys)

    def _kept(self, held: HeldJob, edited: Edited) -> KeptResult:
        """A shared folder that is away for a moment is tried again."""
        for failures in range(1, _SAVE_TRIES):
            try:
                return self._keep(held, edited)
            except FilesUnavailable as error:
                log.warning("request %s: its result cannot be kept, trying again: %s", held.claim.request_id, error)
                self._abandoned.wait(self._retry.delay_s(failures))
        return self._keep(held, edited)

    def _keep(self, held: HeldJob, edited: Edited) -> KeptResult:
        held.watch.enter(Stage.SAVE)
        claim = held.claim
        return self._results.keep(edited, owner=claim.owner, transient=claim.transient, expire_s=claim.files_expire_s)

    def _finish(self, held: HeldJob, ending: Success | Failure) -> FinishAnswer | None:
        """What the job store says, however long it takes to say it; None if the process ends before."""
        failures = 0
        while True:
            held.watch.enter(Stage.FINISH)
            try:
                answer = held.finish(self._keeper.leases, ending)
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    log.warning("request %s: its end cannot be recorded yet: %s", held.claim.request_id, error)
                if self._abandoned.wait(self._retry.delay_s(failures)):
                    log.error("request %s: its end was not recorded, it will run again", held.claim.request_id)
                    return None
                continue
            log.info("request %s: %s", held.claim.request_id, answer.value)
            return answer

    def _hand_back(self, held: HeldJob) -> None:
        held.watch.enter(Stage.FINISH)
        try:
            if held.release(self._keeper.leases):
                log.info("request %s was handed back", held.claim.request_id)
        except StoreUnavailable as error:  # its lease lapses
            log.warning("request %s could not be handed back: %s", held.claim.request_id, error)


def _told(error: BaseException) -> News:
    """What the job's log says of its failure."""
    return News((log_line(job_answer(error).message, "ERROR"),))
