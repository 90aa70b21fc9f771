"""A child process: one run after another of one command. Knows processes and what they say; knows no jobs.

Each run is the leader of a process group of its own, so that what it started ends with it, and Ctrl-C in a terminal
reaches the supervisor alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from kontextd_server.worker.leash import leashed
from kontextd_server.worker.notify import ADDRESS_VARIABLE, HUNG, READY, NotifySocket
from kontextd_server.worker.policy import SupervisorPolicy
from kontextd_server.worker.socket_folder import socket_path

log = logging.getLogger(__name__)

_CHUNK_BYTES = 65536
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class ChildSpec:
    """A command to be kept running. `command` is given the id of the run: a worker uses it as its own.

    `silence_s`: a run that says nothing for so long (see notify.py) has hung; None: it is not expected to speak.
    `final_codes`: exit codes after which another start would end in the same way, if no run has ever been ready.
    `descriptors`: open files that the process gets under the same numbers.
    """

    name: str
    command: Callable[[str], Sequence[str]]
    is_worker: bool = False
    silence_s: float | None = None
    final_codes: frozenset[int] = frozenset()
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    run_id: str
    code: int  # negative: by this signal
    is_final: bool  # starting it again would not help


class Run:
    """One process, from its start to its end."""

    def __init__(self, spec: ChildSpec, run_id: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.run_id = run_id
        self.ready_at: float | None = None
        self.started = self.heard_at = time.monotonic()
        self._says_it_hangs = False
        self._tail = b""
        with ExitStack() as undo:
            self._socket = NotifySocket(socket_path(folder))
            undo.callback(self._socket.close)
            self._process = subprocess.Popen(
                leashed(list(spec.command(run_id))),
                env={**environment, ADDRESS_VARIABLE: self._socket.address},
                stdin=subprocess.DEVNULL,
                pass_fds=spec.descriptors,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            undo.callback(self._take_back)
            self._reader = threading.Thread(target=self._pass_on_stderr, name=f"stderr-{spec.name}", daemon=True)
            self._reader.start()
            undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def listen(self) -> None:
        """Take in what it has said."""
        for word in self._socket.heard():
            self.heard_at = time.monotonic()
            if word == READY and self.ready_at is None:
                self.ready_at = self.heard_at
            self._says_it_hangs = self._says_it_hangs or word == HUNG

    def hangs(self, silence_s: float | None) -> str | None:
        """Why it is thought to hang."""
        if self._says_it_hangs:
            return "says that it hangs"
        silent_s = time.monotonic() - self.heard_at
        return f"has said nothing for {silent_s:.0f} s" if silence_s is not None and silent_s > silence_s else None

    def send(self, number: signal.Signals) -> None:
        """To the process; SIGKILL to all that it started as well. Until `reap` its numbers are not given anew."""
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def reap(self) -> int | None:
        """The exit code once it has ended, with all that it started; None while it runs."""
        # WNOWAIT leaves the zombie, which keeps the number of its group from being given anew.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self.send(signal.SIGKILL)
        code = self._process.wait()
        self._reader.join(1.0)  # a process that left the group may hold the pipe open
        self.listen()  # to what it said since we last did
        self._socket.close()
        return code

    def last_words(self, lines: int) -> str:
        """The end of its stderr."""
        return "\n".join(self._tail.decode("utf-8", "replace").splitlines()[-lines:])

    def _take_back(self) -> None:
        """What was started, but cannot be looked after."""
        self.send(signal.SIGKILL)
        with self._process:  # closes the pipe, and waits
            pass

    def _pass_on_stderr(self) -> None:
        assert self._process.stderr is not None  # we asked for the pipe
        descriptor = self._process.stderr.fileno()
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            # Whatever is wrong with our own, where it would be logged too: the child's pipe must not fill up.
            with contextlib.suppress(Exception):
                self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
                sys.stderr.write(chunk.decode("utf-8", "replace"))
                sys.stderr.flush()
        self._process.stderr.close()


class Child:
    """Kept running: `tend` is called again and again, and looks at whatever has to be looked at."""

    def __init__(self, spec: ChildSpec, folder: Path, environment: Mapping[str, str], policy: SupervisorPolicy) -> None:
        self.spec = spec
        self.run: Run | None = None
        self.was_ready = False
        self._folder, self._environment, self._policy = folder, environment, policy
        self._failures = 0
        self._start_at = 0.0
        self._kill_at: float | None = None

    def tend(self) -> Ended | None:
        """Start, listen, end what hangs. Returns how a run ended, once."""
        if self.run is None:
            if time.monotonic() >= self._start_at:
                self._start()
            return None
        self.run.listen()
        code = self.run.reap()
        self.was_ready = self.was_ready or self.run.ready_at is not None
        if code is not None:
            return self._ended(self.run, code)
        self._end_if_it_hangs(self.run)
        return None

    def stop(self) -> None:
        """Ask it to end, and start it no more."""
        self._start_at = math.inf
        if self.run is not None:
            self.run.send(signal.SIGTERM)

    def kill(self) -> None:
        if self.run is not None:
            self.run.send(signal.SIGKILL)

    def _start(self) -> None:
        run_id = f"{self.spec.name}-{token_hex(4)}"
        try:
            self.run, self._kill_at = Run(self.spec, run_id, self._folder, self._environment), None
        except (OSError, RuntimeError) as error:  # no memory, no more processes or threads
            log.error("%s cannot be started: %s; %s", run_id, error, self._start_later(steady_s=0.0))
            return
        log.info("%s started as process %d", run_id, self.run.pid)

    def _end_if_it_hangs(self, run: Run) -> None:
        now = time.monotonic()
        if self._kill_at is not None:
            if now >= self._kill_at:
                log.error("%s does not end, it is killed", run.run_id)
                run.send(signal.SIGKILL)
            return
        why = run.hangs(self.spec.silence_s)
        if why is not None:
            log.error("%s %s, it is ended", run.run_id, why)
            run.send(signal.SIGTERM)
            self._kill_at = now + self._policy.term_s

    def _ended(self, run: Run, code: int) -> Ended:
        self.run = None
        is_final = code in self.spec.final_codes and not self.was_ready
        if self._start_at < math.inf:
            ran_s = time.monotonic() - run.started
            then = "it cannot start" if is_final else self._start_later(self._steady_s(run))
            words = run.last_words(self._policy.tail_lines) or "(none)"
            log.error(
                "%s ended after %.1f s with %s; %s. Its last words:\n%s", run.run_id, ran_s, _told(code), then, words
            )
        return Ended(run.run_id, code, is_final)

    def _steady_s(self, run: Run) -> float:
        """How long it did its work: since it was ready, or since its start where it is not expected to speak."""
        began = run.started if self.spec.silence_s is None else run.ready_at
        return 0.0 if began is None else time.monotonic() - began

    def _start_later(self, steady_s: float) -> str:
        self._failures = 1 if steady_s >= self._policy.stable_s else self._failures + 1
        wait_s = self._policy.restart.delay_s(self._failures)
        self._start_at = time.monotonic() + wait_s
        return f"it is started again in {wait_s:.1f} s ({self._failures} in a row)"


def _told(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"
