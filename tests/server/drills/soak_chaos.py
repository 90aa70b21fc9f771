"""What is done to a box in a soak: kill -9 and stops, at random; and what its API process comes to meanwhile."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .box import Box
from .processes import Running

STOPPED_S = 5.0  # beyond the lease
_LOOK_S = 0.5
_PAUSES_S = (4.0, 12.0)


@dataclass(frozen=True)
class Sample:
    """The API process at one moment."""

    pid: int
    at_s: float
    memory_mib: float
    descriptors: int


@dataclass
class Chaos:
    """`run` is a thread's loop. Workers of its own it starts again at once; the others are the supervisor's."""

    box: Box
    server: Running
    stop: threading.Event
    api_until: float  # the monotonic time after which the API is left alone, so that its memory can be looked at
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    own: list[Running] = field(default_factory=list)
    _numbers: int = 0

    def run(self) -> None:
        self.own = [self._new_worker(), self._new_worker()]
        next_s = 0.0
        while not self.stop.wait(_LOOK_S):
            self._sample()
            if time.monotonic() >= next_s:
                self._strike()
                next_s = time.monotonic() + self.random.uniform(*_PAUSES_S)

    def _strike(self) -> None:
        worst = ["own worker", "own worker", "own worker", "stopped worker", "supervised worker"]
        if time.monotonic() < self.api_until:
            worst += ["api", "api"]
        what = self.random.choice(worst) if self.done else "api"
        self.done[what] += 1
        match what:
            case "own worker":
                self._replace(self.random.randrange(len(self.own)))
            case "stopped worker":
                self._stop_for_a_while(self.random.choice(self.own))
            case "supervised worker":
                _kill(self.server.pids("worker-0")[-1])
            case "api":
                _kill(self.server.pids("api")[-1])

    def _replace(self, index: int) -> None:
        self.own[index].kill()
        self.own[index] = self._new_worker()

    def _stop_for_a_while(self, worker: Running) -> None:
        worker.send(signal.SIGSTOP)
        self.stop.wait(STOPPED_S)
        worker.send(signal.SIGCONT)

    def _new_worker(self) -> Running:
        self._numbers += 1
        return self.box.command("worker", "--worker-id", f"own-{self._numbers}")

    def _sample(self) -> None:
        pid = self.server.pids("api")[-1]
        with suppress(FileNotFoundError, ProcessLookupError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            self.samples.append(Sample(pid, time.monotonic(), kib / 1024, descriptors))


@dataclass(frozen=True)
class Growth:
    """Of the API process that lived to the end: medians of the second fifth of its life and of the last."""

    lived_s: float
    memory_mib: tuple[float, float]
    descriptors: tuple[float, float]
    peak_mib: float

    @classmethod
    def of(cls, samples: list[Sample]) -> Growth:
        """The first fifth is left out: it takes some time until everything was used once."""
        last = [sample for sample in samples if sample.pid == samples[-1].pid]
        fifth = max(1, len(last) // 5)
        early, late = last[fifth : 2 * fifth] or last, last[-fifth:]
        return cls(
            lived_s=round(last[-1].at_s - last[0].at_s),
            memory_mib=(_median(s.memory_mib for s in early), _median(s.memory_mib for s in late)),
            descriptors=(_median(s.descriptors for s in early), _median(s.descriptors for s in late)),
            peak_mib=round(max(sample.memory_mib for sample in samples), 1),
        )


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 1)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it is just being started again
        os.kill(pid, signal.SIGKILL)
