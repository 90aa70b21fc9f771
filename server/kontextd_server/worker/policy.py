"""The numbers that a worker and its supervisor work by: frozen records. Knows no stages' work, no store, no engine."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

_LORAS_A_SHARE, _BYTES_A_SHARE = 16, 4 * 2**30


@dataclass(frozen=True)
class Backoff:
    """Waits that double, each cut by chance by up to a half: processes that fail together do not try again together."""

    first_s: float = 0.1
    most_s: float = 5.0

    def delay_s(self, failures: int) -> float:
        """Before the next try, after `failures` in a row (1 at first)."""
        doubled = self.first_s * 2.0 ** min(failures - 1, 30)
        return float(min(self.most_s, doubled) * random.uniform(0.5, 1.0))


@dataclass(frozen=True)
class StageDeadlines:
    """How long a stage may go on without progress before its process counts as hung. Seconds.

    They find what will never end; what is merely too slow has limits of its own (downloads, `run_limit_s`).
    """

    load_s: float = 1800.0
    warm_up_s: float = 1800.0  # may compile
    claim_s: float = 120.0
    fetch_s: float = 60.0  # without a byte and without a wait that is looked after
    open_s: float = 120.0  # decoding the input
    merge_s: float = 300.0  # of sixteen LoRAs, or 4 GiB of them; see `more_merge_s`
    compile_s: float = 900.0
    step_s: float = 300.0
    decode_s: float = 300.0  # the safety checkers with it
    save_s: float = 120.0
    finish_s: float = 120.0  # one try

    def more_merge_s(self, count: int, size_bytes: int) -> float:
        """What a large LoRA set may take beyond `merge_s`: the engine does not tell how far it is with them."""
        shares = max(1, math.ceil(count / _LORAS_A_SHARE), math.ceil(size_bytes / _BYTES_A_SHARE))
        return self.merge_s * (shares - 1)


@dataclass(frozen=True)
class WorkerPolicy:
    """How a worker goes about its jobs. Seconds."""

    deadlines: StageDeadlines = field(default_factory=StageDeadlines)
    poll_s: float = 2.0  # how often it looks into the queue without being woken
    run_limit_s: float = 3600.0  # a run that takes longer fails with fal's generation_timeout
    preview_interval: int = 1  # steps between previews of a stream
    report_wait_s: float = 0.5  # a step waits so long for the store, not longer
    report_every_s: float = 0.02  # steps that come faster are reported together
    saves_waiting: int = 2  # results that may wait to be saved before the engine waits too
    file_lifetime_s: float | None = None  # None: the file store's default
    retry: Backoff = field(default_factory=Backoff)  # of a store that does not answer
    drain_s: float = 20.0  # how long the running job may go on when the process is to end
    hand_back_s: float = 5.0  # then: how long the engine may take to come to the end of its step
    save_rest_s: float = 15.0  # then: how long results may take to be saved
    again_s: float = 1.0  # a signal so soon after one that counted is that one again
    pulse_s: float = 1.0
    hung_exit_s: float = 10.0  # a hung process that nobody ends in this time ends itself

    @property
    def stop_s(self) -> float:
        """The longest time from SIGTERM to the end, with a job store that answers."""
        return self.drain_s + self.hand_back_s + self.save_rest_s + 6.0


@dataclass(frozen=True)
class SupervisorPolicy:
    """How children are started again and stopped. Seconds."""

    tick_s: float = 0.1
    restart: Backoff = field(default_factory=lambda: Backoff(first_s=0.5, most_s=60.0))
    stable_s: float = 60.0  # a child that was ready for so long begins its restarts anew
    term_s: float = 5.0  # a hung child's time between SIGTERM and SIGKILL
    stop_s: float = 60.0  # at the end: longer than `WorkerPolicy.stop_s`
    again_s: float = 1.0  # a signal so soon after one that counted is that one again
    tail_lines: int = 20  # of a dead child's stderr, in the log


@dataclass(frozen=True)
class HousekeepingPolicy:
    """How often what is looked after. Seconds."""

    sweep_s: float = 1.0  # leases that expired, start deadlines
    prune_s: float = 60.0
    files_s: float = 600.0
