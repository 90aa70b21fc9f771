"""The numbers that the store works by: one frozen record. Knows no SQL."""

from __future__ import annotations

from dataclasses import dataclass

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0


@dataclass(frozen=True)
class Policy:
    """How long things last and how much is let in."""

    lease_s: float = 30.0  # a worker that has not renewed for so long has lost its job
    runs: int = 3  # how often a job is run whose worker dies: once and two retries
    # A job whose LoRA set is merged already may pass a colder one that came at most this many numbers before it, so a
    # job is overtaken by fewer than this many others, however many keep coming.
    affinity_window: int = 16
    max_queue_length: int = 10_000
    max_queued_per_owner: int | None = None
    idempotency_s: float = _DAY_S
    transient_result_s: float = 10 * _MINUTE_S  # how long the result of a transient job can be read
    webhook_lease_s: float = 30.0  # longer than one delivery takes: after it another process tries
    finished_jobs_s: float = 7 * _DAY_S
    lost_workers_s: float = _HOUR_S
    worker_silence_s: float = 15.0  # a worker heard of longer ago does not count as live
