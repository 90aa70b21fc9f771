"""Status objects, logs and cancel answers from plain records. Knows fal's bodies; knows no store, no routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol

from kontextd_server.wire.addresses import Bases
from kontextd_server.wire.answers import QueueState

# A status, and the body that goes with it.
Answer = tuple[int, dict[str, object]]


class LogLine(Protocol):
    """One line of a request's log; `timestamp` in seconds since 1970. The store's lines are such."""

    @property
    def message(self) -> str: ...

    @property
    def level(self) -> str: ...

    @property
    def timestamp(self) -> float: ...


@dataclass(frozen=True)
class RequestView:
    """What a status tells of a request. `queue_position` counts from 0; `error` is None unless it failed."""

    request_id: str
    app: str
    state: QueueState
    queue_position: int = 0
    inference_time_s: float | None = None
    error: str | None = None
    error_type: str | None = None


class CancelOutcome(StrEnum):
    CANCELLATION_REQUESTED = "CANCELLATION_REQUESTED"
    ALREADY_COMPLETED = "ALREADY_COMPLETED"
    NOT_FOUND = "NOT_FOUND"


_CANCEL_STATUS = {
    CancelOutcome.CANCELLATION_REQUESTED: 202,
    CancelOutcome.ALREADY_COMPLETED: 400,
    CancelOutcome.NOT_FOUND: 404,
}


def submission(view: RequestView, bases: Bases) -> dict[str, object]:
    """The answer to a submit."""
    return {
        "status": QueueState.IN_QUEUE,
        "request_id": view.request_id,
        "gateway_request_id": view.request_id,
        **bases.request_urls(view.app, view.request_id),
        "queue_position": view.queue_position,
    }


def status(view: RequestView, bases: Bases, logs: Sequence[LogLine] | None) -> Answer:
    """The answer to a status call. `logs` None: they were not asked for.

    Once a request runs the key `logs` is always there, and a list where logs were asked for: Python's client raises
    without the key, and the usual JavaScript snippet throws on null.
    """
    body: dict[str, object] = {
        "status": view.state,
        "request_id": view.request_id,
        **bases.request_urls(view.app, view.request_id),
    }
    if view.state is QueueState.IN_QUEUE:
        return 202, {**body, "queue_position": view.queue_position}
    body["logs"] = None if logs is None else [log_entry(line) for line in logs]
    if view.state is QueueState.IN_PROGRESS:
        return 202, body
    body["metrics"] = {"inference_time": view.inference_time_s}
    if view.error is not None:
        body |= {"error": view.error, "error_type": view.error_type}
    return 200, body


def log_entry(line: LogLine) -> dict[str, object]:
    return {"message": line.message, "level": line.level, "source": "USER", "timestamp": iso_time(line.timestamp)}


def cancel(outcome: CancelOutcome) -> Answer:
    """The answer to a cancel."""
    return _CANCEL_STATUS[outcome], {"status": outcome}


def iso_time(at_s: float) -> str:
    """ISO 8601 in UTC, with microseconds and +00:00: Python before 3.11 reads no Z."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="microseconds")
