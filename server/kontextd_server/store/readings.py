"""The plain records that are read from the store: jobs, what they left, lists and counts. Knows no SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kontextd_server.store.records import JobKind, JobState, Outcome, Priority, WebhookState, WorkerState


@dataclass(frozen=True)
class Job:
    """A job without its payloads. `queue_position` counts the jobs before it, None once it left the queue."""

    id: int
    request_id: str
    endpoint: str
    owner: str
    key_id: str | None  # the key that it came with
    kind: JobKind
    state: JobState
    outcome: Outcome | None
    priority: Priority
    lora_key: str
    transient: bool
    tags: str | None
    webhook_url: str | None
    base_url: str | None
    created_at: float
    start_by: float | None
    started_at: float | None  # of the latest attempt
    finished_at: float | None
    attempt: int
    runs_left: int
    worker: str | None  # the latest
    lease_until: float | None
    cancel_requested: bool
    steps_done: int | None
    steps_total: int | None
    error_type: str | None
    error_message: str | None  # None also where nothing of the request may stay
    http_status: int | None
    inference_s: float | None
    # As in `Work`.
    images: int | None
    prompt_hit: bool | None
    reference_hit: bool | None
    merge_s: float | None
    lora_hit: bool | None
    lora_load_s: float | None
    queue_position: int | None = None


@dataclass(frozen=True)
class Result:
    """What a job left to be read. `body` is None while it is not completed, and once it has expired."""

    job: Job
    body: bytes | None

    @property
    def expired(self) -> bool:
        return self.job.state is JobState.COMPLETED and self.body is None


@dataclass(frozen=True)
class WebhookReport:
    """How a job's webhook stands. `attempt` counts the tries; `next_at` matters while it is pending."""

    state: WebhookState
    attempt: int
    next_at: float
    last_error: str | None
    finished_at: float | None


@dataclass(frozen=True)
class JobReport:
    """A job as its operator sees it. `webhook` is None where none was asked for, or none is due yet."""

    job: Job
    webhook: WebhookReport | None


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list; None means any."""

    owner: str | None = None
    endpoint: str | None = None
    state: JobState | None = None
    outcome: Outcome | None = None
    worker: str | None = None
    finished_after: float | None = None
    before_id: int | None = None  # the next page: older than this one


@dataclass(frozen=True)
class Gauges:
    """What waits and runs now."""

    queued: Mapping[Priority, int]
    running: int
    oldest_queued_s: float
    webhooks_pending: int
    workers: Mapping[WorkerState, int]


@dataclass(frozen=True)
class Preview:
    """The newest preview of a running job; `number` rises with each."""

    number: int
    body: bytes


@dataclass(frozen=True)
class Delivery:
    """A webhook to post now. `attempt` fences: only who claimed it last can say how it went."""

    id: int
    attempt: int  # 1 at first
    url: str
    created_at: float
    job: Job
    body: bytes | None  # the result or the failure's body
