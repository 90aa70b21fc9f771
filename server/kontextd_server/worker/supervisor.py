"""Keeps the processes of a box running: workers, the API, whatever commands it is given. Knows processes and signals.

A child that dies is started again, later each time it dies soon; one that hangs is ended. Whoever waits for news of a
lost worker is told at once. What else has to be done all the time (housekeeping, webhooks) runs in threads beside.

SIGTERM, SIGINT or SIGHUP: all children are asked to end, and killed after `stop_s`; at a second signal they are killed
at once, but not at one that comes within `again_s`.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Protocol

from kontextd_server.worker.children import Child, ChildSpec, Ended
from kontextd_server.worker.notify import ADDRESS_VARIABLE, ALIVE, READY, STOPPING, Notifier
from kontextd_server.worker.policy import SupervisorPolicy
from kontextd_server.worker.signals import Askings, SignalPipe, ask_to_end
from kontextd_server.worker.socket_folder import SocketFolder

log = logging.getLogger(__name__)

_ALIVE_S = 1.0
_COMPANION_PAUSE_S = 5.0
_COMPANION_END_S = 5.0


class Companion(Protocol):
    """Something that runs beside the children for as long as they do."""

    def run(self, stop: threading.Event) -> None: ...


def supervise(
    specs: Sequence[ChildSpec],
    companions: Sequence[Companion],
    on_lost_worker: Callable[[str], object],
    environment: Mapping[str, str],
    policy: SupervisorPolicy | None = None,
    *,
    on_ready: Callable[[], object] = lambda: None,
    on_stopping: Callable[[], object] = lambda: None,
) -> int:
    """Run until SIGTERM, SIGINT or SIGHUP, from the main thread; returns the exit code. See `Supervisor`.

    `on_ready` is called once, when every child has been ready; `on_stopping` before the children are asked to end.
    """
    policy = policy or SupervisorPolicy()
    with closing(SignalPipe()) as signals, signals.caught(*ask_to_end(), signal.SIGCHLD):
        supervisor = Supervisor(specs, companions, on_lost_worker, environment, policy, signals)
        supervisor.on_ready, supervisor.on_stopping = on_ready, on_stopping
        return supervisor.run()


class Supervisor:
    """`on_lost_worker` is called with the id of each worker that ended, however it did; it must not wait."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        companions: Sequence[Companion],
        on_lost_worker: Callable[[str], object],
        environment: Mapping[str, str],
        policy: SupervisorPolicy,
        signals: SignalPipe,
    ) -> None:
        self._companions, self._on_lost_worker = companions, on_lost_worker
        self._policy, self._askings = policy, Askings(signals, policy.again_s)
        self._notifier = Notifier.from_environment(environment)
        self._folder = SocketFolder()
        inherited = {name: value for name, value in environment.items() if name != ADDRESS_VARIABLE}
        self._children = [Child(spec, self._folder.path, inherited, policy) for spec in specs]
        self.on_ready: Callable[[], object] = lambda: None
        self.on_stopping: Callable[[], object] = lambda: None
        self._is_ready = False
        self._tell_at = 0.0

    def run(self) -> int:
        """0 after a signal; the code of a child that can never start otherwise."""
        stop = threading.Event()
        threads = [_beside(companion, stop) for companion in self._companions]
        try:
            code = self._tend()
            self._stop_children()
        finally:
            for child in self._children:
                child.kill()
            stop.set()
            for thread in threads:
                thread.join(_COMPANION_END_S)
            self._notifier.close()
            self._folder.close()
        return code

    def _tend(self) -> int:
        while True:
            for child in self._children:
                ended = child.tend()
                if ended is None:
                    continue
                self._lost(child, ended)
                if ended.is_final:
                    log.error("%s cannot start, so everything is stopped", child.spec.name)
                    return ended.code
            self._say_how_it_goes()
            if self._askings.wait(self._policy.tick_s):
                return 0

    def _stop_children(self) -> None:
        self._notifier.tell(STOPPING)
        self.on_stopping()
        for child in self._children:
            child.stop()
        self._wait_for_the_end(time.monotonic() + self._policy.stop_s)
        for child in self._children:
            if child.run is not None:
                log.error("%s did not end in time, it is killed", child.run.run_id)
                child.kill()
        self._wait_for_the_end(time.monotonic() + self._policy.term_s)

    def _wait_for_the_end(self, until: float) -> None:
        while time.monotonic() < until:
            for child in self._children:
                if ended := child.tend():
                    self._lost(child, ended)
            if not any(child.run for child in self._children):
                return
            if self._askings.wait(self._policy.tick_s):
                return

    def _lost(self, child: Child, ended: Ended) -> None:
        if child.spec.is_worker:
            self._on_lost_worker(ended.run_id)

    def _say_how_it_goes(self) -> None:
        """To systemd, where it started us."""
        if time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + _ALIVE_S
            self._notifier.tell(ALIVE)
        if not self._is_ready and all(child.was_ready for child in self._children):
            self._is_ready = True
            self._notifier.tell(READY)
            self.on_ready()


def _beside(companion: Companion, stop: threading.Event) -> threading.Thread:
    """In a thread; one that fails is begun again after a while."""

    def run() -> None:
        while not stop.is_set():
            try:
                companion.run(stop)
            except Exception as error:  # whatever it is, the children go on; said each time
                log.error("%s failed, it begins again", type(companion).__name__, exc_info=error)
                stop.wait(_COMPANION_PAUSE_S)

    thread = threading.Thread(target=run, name=f"kontextd-{type(companion).__name__.lower()}", daemon=True)
    thread.start()
    return thread
