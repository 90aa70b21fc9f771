"""The pulse of a worker process: it beats for as long as no stage is overdue. Knows stages; knows no store, no engine.

Nothing here waits for a database or a device, so a pulse that stops means that the process as a whole stands still.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
from collections.abc import Callable

from kontextd_server.worker.notify import ALIVE, HUNG, Notifier
from kontextd_server.worker.stages import Watches

log = logging.getLogger(__name__)

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h


class Pulse:
    """A thread's loop. `end_process` ends a hung process that nobody else ends."""

    def __init__(
        self, watches: Watches, notifier: Notifier, every_s: float, grace_s: float, end_process: Callable[[int], object]
    ) -> None:
        self._watches, self._notifier, self._every_s, self._grace_s = watches, notifier, every_s, grace_s
        self._end_process = end_process
        self._ended = threading.Event()
        self.is_hung = threading.Event()  # from then on no lease is renewed

    def run(self) -> None:
        while not self._ended.is_set():
            stage = self._watches.overdue()
            if stage is not None:
                self._report_hung(stage)
                return
            self._notifier.tell(ALIVE)
            self._ended.wait(self._every_s)

    def end(self) -> None:
        self._ended.set()

    def _report_hung(self, stage: str) -> None:
        self.is_hung.set()
        log.critical("the stage %r has made no progress within its time: this worker hangs and must end", stage)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        self._notifier.tell(HUNG)
        if not self._ended.wait(self._grace_s):
            self._end_process(EXIT_HUNG)
