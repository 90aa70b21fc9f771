"""The bodies of the queue and of the storage host as pydantic models, for parsing and for the OpenAPI document.

Knows fal's names; what the fields hold is made by `statuses`, `auth` and the routes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import FailFast, Field

from kontextd_server.wire.schema import WireModel

MAX_TOKEN_S = 24 * 3600
MAX_PARTS = 10_000  # S3's limit, in case files move there


class QueueState(StrEnum):
    """The only three there are: Python's client raises on any other."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"


class LogEntry(WireModel):
    message: str
    level: Literal["STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG"]
    source: Literal["USER"] = "USER"
    timestamp: str


class Metrics(WireModel):
    inference_time: float | None = Field(description="Seconds of computing; null where it never started.")


class QueueStatus(WireModel):
    """`queue_position` while waiting; `logs` afterwards, null where not asked for; `metrics` and `error` at the end."""

    status: QueueState
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = None
    logs: list[LogEntry] | None = None
    metrics: Metrics | None = None
    error: str | None = None
    error_type: str | None = None


class QueueSubmission(WireModel):
    status: Literal["IN_QUEUE"]
    request_id: str
    gateway_request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int


class CancelAnswer(WireModel):
    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class InitiateUpload(WireModel):
    """`POST /storage/upload/initiate` and `initiate-multipart`."""

    content_type: str = Field("application/octet-stream", max_length=200)
    file_name: str | None = Field(None, max_length=1000)


class UploadGrant(WireModel):
    upload_url: str
    file_url: str


class UploadedPart(WireModel):
    part_number: int = Field(alias="partNumber", ge=1, le=MAX_PARTS)
    etag: str = Field(max_length=200)


class CompleteUpload(WireModel):
    parts: Annotated[list[UploadedPart], FailFast(), Field(max_length=MAX_PARTS)]


class TokenRequest(WireModel):
    """`POST /tokens/`; the answer is a JSON string."""

    allowed_apps: Annotated[list[str], FailFast(), Field(min_length=1, max_length=100)]
    token_expiration: int = Field(120, ge=1, le=MAX_TOKEN_S, description="Seconds.")


class CdnToken(WireModel):
    """`expires_at` ends in +00:00, never in Z: Python 3.10 and older read no other."""

    token: str
    token_type: str
    base_url: str
    expires_at: str


class CdnFile(WireModel):
    access_url: str


class CdnMultipart(WireModel):
    access_url: str
    upload_id: str = Field(serialization_alias="uploadId")


class LibraryLora(WireModel):
    """A LoRA that the operator keeps for requests. `matched` of its `total` tensors had a place in the model."""

    path: str = Field(description="What `loras[].path` of a request calls it.", examples=["library:ink"])
    sha256: str
    size_bytes: int
    dialects: list[str] = Field(description="How its tensors are named.", examples=[["kohya"]])
    rank: int | None = Field(description="The commonest of its matrices; null where its form has none.")
    trigger_words: list[str] = Field(description="Words that bring it out in a prompt, as the file names them.")
    matched: int
    total: int
    added_at: str


class LoraListing(WireModel):
    """`GET /kontextd/loras`, of the box that answers. A path in a root is `ROOT:folder/name`."""

    loras: list[LibraryLora]
    roots: list[str] = Field(description="The names of the roots of LoRA files.", examples=[["library", "studio"]])


class ValidationError(WireModel):
    """What is wrong with one value. `url` leads to a page on the type."""

    loc: list[str | int]
    msg: str
    type: str
    url: str
    ctx: dict[str, object] | None = None
    input: object = None


class HTTPValidationError(WireModel):
    """The body of a model error: FastAPI's own name for it, with fal's fields."""

    detail: list[ValidationError]


class RequestError(WireModel):
    """The body of every other error."""

    detail: str
    error_type: str
