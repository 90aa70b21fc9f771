"""A worker process: its threads, its beginning and its end. Knows the parts and signals; knows no work itself.

    main thread   waits for SIGTERM, SIGINT and SIGHUP, and ends the others in good order
    engine        loads, warms up, then claims and edits (loop.py): the only thread that uses the engine
    leases        renews, reports, writes the worker's row (keeper.py)
    saver         encodes, stores, records endings (saver.py)
    pulse         says that the process lives, as long as no stage is overdue (pulse.py)

SIGTERM: no job is claimed any more; the running one may end within `drain_s`, else it is handed back as if it had not
been claimed; results are saved. A second signal hands back at once, but not one that comes within `again_s`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from kontextd_models.errors import InputError, ModelError

from kontextd_server.files import FileStore
from kontextd_server.store import Store, StoreUnavailable, Subscription, Worker, WorkerState, topics
from kontextd_server.worker.inputs import Inputs
from kontextd_server.worker.keeper import LeaseKeeper
from kontextd_server.worker.loaded import LoadedEngine, warm_up
from kontextd_server.worker.loop import WorkerLoop
from kontextd_server.worker.notify import READY, STOPPING, Notifier
from kontextd_server.worker.policy import WorkerPolicy
from kontextd_server.worker.presence import Presence
from kontextd_server.worker.pulse import EXIT_HUNG, Pulse
from kontextd_server.worker.results import ResultKeeper
from kontextd_server.worker.saver import Saver
from kontextd_server.worker.scratch import scratch
from kontextd_server.worker.signals import Askings, SignalPipe, ask_to_end
from kontextd_server.worker.stages import Stage, Watches
from kontextd_server.worker.stopping import Stopping

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_MISTAKE = 2  # of the settings or the model folder: starting again would not help
_RENEWALS_PER_LEASE = 6
_BEATS_PER_SILENCE = 3
_IDLE_END_S = 2.0  # an engine thread without a job ends at once, unless it is loading
_LOOK_S = 0.1
_IN_THE_ENGINE = frozenset({Stage.FETCH, Stage.OPEN, Stage.PREPARE, Stage.STEP, Stage.DECODE})


@dataclass(frozen=True)
class WorkerParts:
    """What a worker works with. `load` is called in the thread of the engine."""

    worker_id: str  # of this process alone: a later one has another
    store: Store
    files: FileStore
    inputs: Inputs
    scratch: Path  # a folder of this box, for inputs of running jobs
    load: Callable[[], LoadedEngine]
    policy: WorkerPolicy = field(default_factory=WorkerPolicy)


def run_worker(parts: WorkerParts, notifier: Notifier) -> int:
    """The whole life of a worker process, from its main thread; returns the exit code."""
    with contextlib.closing(SignalPipe()) as signals, signals.caught(*ask_to_end()):
        return WorkerProcess(parts, notifier, signals).run()


class WorkerProcess:
    """`end_process` ends it where a thread cannot be brought to an end: interpreters do not survive that otherwise."""

    def __init__(
        self,
        parts: WorkerParts,
        notifier: Notifier,
        signals: SignalPipe,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._parts, self._notifier, self._signals, self._end_process = parts, notifier, signals, end_process
        policy, store = parts.policy, parts.store
        worker = Worker(parts.worker_id, socket.gethostname(), "", os.getpid(), WorkerState.STARTING, "")
        self._stopping = Stopping()
        self._watches = Watches(policy.deadlines)
        self._pulse = Pulse(self._watches, notifier, policy.pulse_s, policy.hung_exit_s, self._end_at_once)
        self._presence = Presence(store.workers, worker, store.policy.worker_silence_s / _BEATS_PER_SILENCE)
        self._keeper = LeaseKeeper(
            store.leases,
            self._presence,
            self._watches,
            self._pulse.is_hung,
            renew_every_s=store.policy.lease_s / _RENEWALS_PER_LEASE,
            patience_s=policy.report_wait_s,
        )
        self._saver: Saver | None = None
        self._askings = Askings(signals, policy.again_s)
        self._failure: BaseException | None = None

    def run(self) -> int:
        with ExitStack() as stack:
            watcher = self._parts.store.watch()
            stack.callback(watcher.close)
            jobs = stack.enter_context(watcher.subscribe(topics.QUEUE))
            beside = [self._started("pulse", self._pulse.run), self._started("leases", self._keeper.run)]
            engine = self._started("engine", lambda: self._engine(jobs))
            self._wait_for_the_end(engine)
            self._drain(engine, jobs)
            self._pulse.end()
            self._keeper.end()
            for thread in beside:
                thread.join(_IDLE_END_S)
            self._presence.leave()
            if any(thread.is_alive() for thread in (engine, *beside)):
                self._end_at_once(self._exit_code)
        return self._exit_code

    def _started(self, name: str, run: Callable[[], object]) -> threading.Thread:
        """A thread of this process, which is nothing without any of them."""

        def run_or_fail() -> None:
            try:
                run()
            except (ModelError, InputError) as error:
                self._failure = error
                log.critical("this worker cannot start: %s", error)
            except BaseException as error:
                self._failure = error
                log.critical("this worker cannot go on without its thread %r", name, exc_info=error)
            finally:
                self._signals.wake()

        thread = threading.Thread(target=run_or_fail, name=f"kontextd-{name}", daemon=True)
        thread.start()
        return thread

    # The thread of the engine.

    def _engine(self, jobs: Subscription) -> None:
        with self._watches.one() as watch, scratch(self._parts.scratch, self._parts.worker_id) as folder:
            watch.enter(Stage.LOAD)
            loaded = self._parts.load()
            self._presence.describe(device=loaded.told_device, model_version=loaded.version)
            watch.enter(Stage.WARM_UP)
            warm_up(loaded)
            watch.enter(Stage.IDLE)
            saver, saving = self._start_saver(loaded)
            parts, keeper = self._parts, self._keeper
            loop = WorkerLoop(
                parts.store, parts.inputs, folder, keeper, saver, self._presence, self._stopping, parts.policy
            )
            self._say_ready()
            try:
                loop.run(loaded, jobs, watch)
            finally:
                saver.end()
                saving.join()

    def _start_saver(self, loaded: LoadedEngine) -> tuple[Saver, threading.Thread]:
        policy = self._parts.policy
        results = ResultKeeper(self._parts.files, loaded.version, policy.file_lifetime_s)
        self._saver = Saver(results, self._keeper, policy.retry, policy.saves_waiting)
        return self._saver, self._started("saver", self._saver.run)

    def _say_ready(self) -> None:
        self._presence.say(state=WorkerState.READY, lora_key="")
        self._keeper.wake()
        self._notifier.tell(READY)

    # The main thread.

    def _wait_for_the_end(self, engine: threading.Thread) -> None:
        while engine.is_alive() and self._failure is None and not self._askings.wait(_LOOK_S):
            pass
        if self._pulse.is_hung.is_set():
            self._end_at_once(EXIT_HUNG)

    def _drain(self, engine: threading.Thread, jobs: Subscription) -> None:
        policy = self._parts.policy
        self._stopping.no_more_jobs.set()
        jobs.hint()
        self._notifier.tell(STOPPING)
        self._presence.say(state=WorkerState.DRAINING, lora_key=self._presence.worker.lora_key)
        self._keeper.wake()
        self._wait(engine, policy.drain_s if self._keeper.held() else _IDLE_END_S)
        self._stopping.hand_back.set()
        if engine.is_alive() and self._keeper.held():
            self._wait(engine, policy.hand_back_s)
            self._hand_back_the_running()
            self._wait(engine, policy.save_rest_s)
        if engine.is_alive() and self._saver is not None:
            self._saver.abandon()
            self._wait(engine, _IDLE_END_S)

    def _wait(self, engine: threading.Thread, most_s: float) -> None:
        """Until the engine's thread has ended, with all its results saved; a signal ends the wait."""
        until = time.monotonic() + most_s
        while engine.is_alive() and (left_s := until - time.monotonic()) > 0:
            if self._askings.wait(min(_LOOK_S, left_s)):
                return

    def _hand_back_the_running(self) -> None:
        """Where the engine does not come to the end of a step in time. A job that has hung keeps its lost run."""
        for held in self._keeper.held():
            if held.watch.stage in _IN_THE_ENGINE and not held.watch.is_overdue:
                try:
                    held.release(self._parts.store.leases)
                except StoreUnavailable as error:  # its lease lapses
                    log.warning("request %s could not be handed back: %s", held.claim.request_id, error)

    @property
    def _exit_code(self) -> int:
        if self._failure is None:
            return 0
        return EXIT_MISTAKE if isinstance(self._failure, ModelError | InputError) else EXIT_FAILED

    def _end_at_once(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._end_process(code)
