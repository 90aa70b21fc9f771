"""The plain records of jobs, keys and workers as they are written. Knows no SQL, no JSON: payloads are bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from uuid import uuid4


class JobState(StrEnum):
    """The three states a job can have, as on the wire."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"


class Outcome(StrEnum):
    """How a completed job ended."""

    OK = "OK"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class JobKind(StrEnum):
    """Which call made the job."""

    QUEUE = "queue"
    RUN = "run"
    STREAM = "stream"


class Priority(IntEnum):
    """Lower goes first."""

    NORMAL = 0
    LOW = 1


class WorkerState(StrEnum):
    """What a worker says it does."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"


class WebhookState(StrEnum):
    """Where a webhook stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class Scope(StrEnum):
    """What a key may do."""

    INFER = "infer"
    ADMIN = "admin"


# Submission.


@dataclass(frozen=True)
class NewJob:
    """A job to queue. `payload` is the request body, which only the worker reads.

    A `transient` job leaves no payload behind: its input is erased when it completes, its result a set time later.
    `body_hash` is what a repeated `idempotency_key` is held against; without it, the SHA-256 of the payload.
    `files_expire_s`: how long the caller wants the files of the result to be kept, None where that is the operator's to
    say.
    """

    endpoint: str
    owner: str
    payload: bytes
    request_id: str = field(default_factory=lambda: str(uuid4()))
    kind: JobKind = JobKind.QUEUE
    priority: Priority = Priority.NORMAL
    lora_key: str = ""  # names the LoRA set; the base model is a set too
    runner_hint: str | None = None
    start_within_s: float | None = None
    no_retry: bool = False
    transient: bool = False
    webhook_url: str | None = None
    base_url: str | None = None  # where the caller reached us: the URLs in the webhook are rendered from it
    tags: str | None = None
    idempotency_key: str | None = None
    body_hash: str | None = None
    max_queue_length: int | None = None  # refuse when so many wait already
    files_expire_s: float | None = None
    key_id: str | None = None  # the key that it came with; its name is the owner


class Refusal(Enum):
    """Why a job was not queued."""

    QUEUE_FULL = "queue_full"
    OWNER_QUEUE_FULL = "owner_queue_full"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"  # the same key with another body


@dataclass(frozen=True)
class Queued:
    """The job is in the store. `existing`: the idempotency key had brought it there before."""

    request_id: str
    queue_position: int
    existing: bool = False


class CancelAnswer(Enum):
    """What became of a wish to cancel. An accepted one is final: the job ends as cancelled, even if it succeeds."""

    ACCEPTED = "accepted"
    ALREADY_COMPLETED = "already_completed"
    NOT_FOUND = "not_found"


class RetryAnswer(Enum):
    """What became of a wish to run a failed job again."""

    QUEUED = "queued"
    NOT_FAILED = "not_failed"
    INPUT_ERASED = "input_erased"
    NOT_FOUND = "not_found"


# Running.


@dataclass(frozen=True)
class Lease:
    """The right to run a job. The attempt number is the fencing token: a job that changed hands has another."""

    job_id: int
    attempt: int


@dataclass(frozen=True)
class Claim:
    """A job as the worker gets it."""

    lease: Lease
    request_id: str
    endpoint: str
    owner: str
    kind: JobKind
    payload: bytes
    lora_key: str
    runner_hint: str | None
    transient: bool
    base_url: str | None
    created_at: float
    runs_left: int  # after this one
    files_expire_s: float | None = None


class Standing(Enum):
    """Whether the job is still the worker's."""

    HELD = "held"
    CANCEL_REQUESTED = "cancel_requested"
    LOST = "lost"


class FinishAnswer(Enum):
    """What became of a result. Files that belong to it may go unless it was recorded, now or before."""

    RECORDED = "recorded"
    ALREADY_RECORDED = "already_recorded"  # by this very lease: the answer to the first call was lost
    CANCELLED = "cancelled"  # a cancel had been accepted
    FENCED = "fenced"  # the job is another worker's, or was given up


@dataclass(frozen=True)
class LogLine:
    """One line of a job's log. The store gives `cursor`; it rises within a job."""

    message: str
    timestamp: float
    level: str = "INFO"
    source: str = "USER"
    cursor: int = 0


@dataclass(frozen=True)
class Progress:
    """Denoise steps done, of how many."""

    done: int
    total: int


@dataclass(frozen=True)
class Work:
    """What the engine did for a job that went well, to be counted. A hit is None where nothing was looked up."""

    images: int = 0
    prompt_hit: bool | None = None
    reference_hit: bool | None = None
    merge_s: float | None = None  # None: no LoRA set had to be merged
    lora_hit: bool | None = None  # the same set was merged already
    lora_load_s: float | None = None  # fetching and reading the set; None: there were no LoRAs


@dataclass(frozen=True)
class Success:
    """A job that went well. `body` is the result as it is to be read back."""

    body: bytes
    inference_s: float | None = None
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Failure:
    """A job that failed. `http_status` and `body` are what the caller is answered, `message` is its text alone."""

    error_type: str
    http_status: int
    body: bytes
    message: str = ""


CANCELLED = Failure(
    "client_cancelled",
    499,
    b'{"detail": "The request was cancelled.", "error_type": "client_cancelled"}',
    "The request was cancelled.",
)
NOT_STARTED_IN_TIME = Failure(
    "request_timeout",
    504,
    b'{"detail": "The request did not start in time.", "error_type": "request_timeout"}',
    "The request did not start in time.",
)
# Never a 503 or 504: clients would post the job that kills its workers again.
WORKERS_LOST = Failure(
    "runner_disconnected",
    500,
    b'{"detail": "The worker was lost while it ran the request.", "error_type": "runner_disconnected"}',
    "The worker was lost while it ran the request.",
)


@dataclass(frozen=True)
class Swept:
    """Request ids of the jobs that a sweep took from dead workers or found too late to start."""

    requeued: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    cancelled: tuple[str, ...] = ()
    overdue: tuple[str, ...] = ()


# Keys, workers.


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept: without its secret. `name` is the owner of what it submits."""

    id: str
    name: str
    scopes: frozenset[Scope]
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True)
class NewKey:
    """A key just made: the only time that its plain text exists."""

    key: ApiKey
    plain: str = field(repr=False)


@dataclass(frozen=True)
class Worker:
    """A worker's own account of itself."""

    id: str
    host: str
    device: str
    pid: int
    state: WorkerState
    model_version: str
    lora_key: str | None = None  # the set that is merged now
    started_at: float = 0.0  # given by the store
    seen_at: float = 0.0  # given by the store


@dataclass(frozen=True)
class Pruned:
    """How many rows a pruning removed. `bytes_gone`: no byte of what was erased is left in the files."""

    bodies: int
    jobs: int
    idempotency_keys: int
    workers: int
    bytes_gone: bool
