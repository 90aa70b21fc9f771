"""Prometheus metrics. Knows names, and how jobs become numbers; reads the store only when somebody asks.

Gauges are what the store says at that moment. Jobs are counted when they are found finished: each process that is
asked counts all jobs since it began, so of several API processes one is to be scraped, or the greatest number counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kontextd_server.store import Gauges, Job, JobFilter, JobState, Outcome, Priority, Store, WorkerState

_WAIT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_RUN_S = (0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_CALL_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 120)
_LOAD_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_MERGE_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PAGE = 500
_OVERLAP_S = 10.0  # a job's time is taken before its transaction is committed
_MAX_TYPE = 60  # characters: error types are a closed set, but not this module's


class CallMetrics:
    """Calls as they are answered. `call` is the name of a route or "other"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers = Counter(
            "kontextd_http_answers", "Answers by call and status.", ["call", "status"], registry=registry
        )
        self._seconds = Histogram(
            "kontextd_http_seconds", "Time to the end of the answer.", ["call"], buckets=_CALL_S, registry=registry
        )

    def answered(self, call: str, status: int, seconds: float) -> None:
        self._answers.labels(call, str(status)).inc()
        self._seconds.labels(call).observe(seconds)


class JobMetrics:
    """Jobs as the store has them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queued = Gauge("kontextd_queued_jobs", "Jobs that wait.", ["priority"], registry=registry)
        self._running = Gauge("kontextd_running_jobs", "Jobs that run.", registry=registry)
        self._oldest = Gauge("kontextd_oldest_queued_seconds", "Age of the oldest waiting job.", registry=registry)
        self._webhooks = Gauge("kontextd_pending_webhooks", "Webhooks to be delivered.", registry=registry)
        self._workers = Gauge("kontextd_workers", "Live workers by what they do.", ["state"], registry=registry)
        self._finished = Counter(
            "kontextd_finished_jobs", "Jobs by their end.", ["outcome", "error_type"], registry=registry
        )
        self._steps = Counter("kontextd_steps", "Denoise steps of jobs that ended.", registry=registry)
        self._images = Counter("kontextd_images", "Images of jobs that went well.", registry=registry)
        self._lookups = Counter(
            "kontextd_cache_lookups", "Of jobs that went well.", ["cache", "result"], registry=registry
        )
        self._load = Histogram(
            "kontextd_lora_load_seconds", "Fetching and reading a LoRA set.", buckets=_LOAD_S, registry=registry
        )
        self._merge = Histogram(
            "kontextd_lora_merge_seconds", "Merging a LoRA set.", buckets=_MERGE_S, registry=registry
        )
        self._wait = Histogram("kontextd_wait_seconds", "From submit to start.", buckets=_WAIT_S, registry=registry)
        self._run = Histogram("kontextd_inference_seconds", "In the engine.", buckets=_RUN_S, registry=registry)

    def set_gauges(self, now: Gauges) -> None:
        for priority in Priority:
            self._queued.labels(priority.name.lower()).set(now.queued[priority])
        self._running.set(now.running)
        self._oldest.set(now.oldest_queued_s)
        self._webhooks.set(now.webhooks_pending)
        for state in WorkerState:
            self._workers.labels(state.value).set(now.workers.get(state, 0))

    def count(self, job: Job) -> None:
        """A job that has ended."""
        outcome = job.outcome or Outcome.FAILED
        self._finished.labels(outcome.value.lower(), (job.error_type or "")[:_MAX_TYPE]).inc()
        self._steps.inc(job.steps_done or 0)
        self._count_work(job)
        if job.started_at is not None:
            self._wait.observe(max(0.0, job.started_at - job.created_at))
        if job.inference_s is not None:
            self._run.observe(job.inference_s)

    def _count_work(self, job: Job) -> None:
        self._images.inc(job.images or 0)
        for cache, hit in (("prompt", job.prompt_hit), ("reference", job.reference_hit), ("loras", job.lora_hit)):
            if hit is not None:
                self._lookups.labels(cache, "hit" if hit else "miss").inc()
        if job.lora_load_s is not None:
            self._load.observe(job.lora_load_s)
        if job.merge_s is not None:
            self._merge.observe(job.merge_s)


class Metrics:
    """A registry of its own: nothing is registered by importing. `text` blocks."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._registry = CollectorRegistry()
        self.calls = CallMetrics(self._registry)
        self._jobs = JobMetrics(self._registry)
        self._counted: dict[int, float] = {}  # id and end of jobs that could be found once more
        self._began = self._since = time.time()
        self._turn = threading.Lock()

    def text(self) -> bytes:
        """In Prometheus's format. Raises `StoreUnavailable`."""
        with self._turn:
            self._jobs.set_gauges(self._store.views.gauges())
            for job in self._newly_finished():
                self._jobs.count(job)
            return generate_latest(self._registry)

    def _newly_finished(self) -> Iterator[Job]:
        after, before_id = self._since - _OVERLAP_S, None
        newest = self._since
        while True:
            wanted = JobFilter(state=JobState.COMPLETED, finished_after=after, before_id=before_id)
            page = self._store.views.jobs(wanted, limit=_PAGE)
            for job in page:
                ended_at = job.finished_at or 0.0
                if job.id not in self._counted and ended_at > self._began:
                    self._counted[job.id] = ended_at
                    newest = max(newest, ended_at)
                    yield job
            if len(page) < _PAGE:
                break
            before_id = page[-1].id
        self._since = newest
        self._counted = {number: at for number, at in self._counted.items() if at > newest - _OVERLAP_S}
