"""Status objects and log lines, read back with the official Python client's own parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import fal_client
import pytest
from fal_client.client import SyncRequestHandle
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.addresses import Bases
from kontextd_server.wire.answers import CancelAnswer, QueueState, QueueStatus, QueueSubmission
from kontextd_server.wire.progress_lines import progress_line
from kontextd_server.wire.statuses import (
    CancelOutcome,
    RequestView,
    cancel,
    iso_time,
    status,
    submission,
)
from tqdm import tqdm


@dataclass(frozen=True)
class Line:
    message: str
    level: str
    timestamp: float


BASES = Bases("http://box", "http://box/queue", "http://box/rest", "http://box")
WAITING = RequestView("r1", "fal-ai/flux-kontext-lora", QueueState.IN_QUEUE, queue_position=0)
RUNNING = replace(WAITING, state=QueueState.IN_PROGRESS)
DONE = replace(WAITING, state=QueueState.COMPLETED, inference_time_s=4.5)
FAILED = replace(DONE, error="the worker died", error_type="runner_disconnected", inference_time_s=None)
LOGS = [Line("█", "INFO", 0.5)]
HANDLE = SyncRequestHandle("r1", "", "", "", client=None)  # type: ignore[arg-type]


def parsed(body: dict[str, object]) -> fal_client.Status:
    sent = json.loads(json.dumps(body))
    QueueStatus.model_validate(sent)
    return HANDLE._parse_status(sent)


def test_a_waiting_request_has_a_position() -> None:
    code, body = status(WAITING, BASES, None)
    assert (code, parsed(body)) == (202, fal_client.Queued(position=0))
    assert body["status_url"] == "http://box/queue/fal-ai/flux-kontext-lora/requests/r1/status"


def test_a_running_request_has_logs() -> None:
    code, body = status(RUNNING, BASES, LOGS)
    assert (code, body["status"]) == (202, "IN_PROGRESS")
    assert parsed(body).logs == [
        {"message": "█", "level": "INFO", "source": "USER", "timestamp": "1970-01-01T00:00:00.500000+00:00"}
    ]


@pytest.mark.parametrize("view", [RUNNING, DONE, FAILED])
def test_logs_are_a_list_where_asked_for_and_null_where_not(view: RequestView) -> None:
    assert status(view, BASES, [])[1]["logs"] == []
    assert status(view, BASES, None)[1]["logs"] is None


def test_a_request_that_is_done_has_metrics() -> None:
    code, body = status(DONE, BASES, [])
    assert code == 200
    assert parsed(body) == fal_client.Completed(logs=[], metrics={"inference_time": 4.5})
    assert "error" not in body


def test_a_request_that_failed_is_completed_with_its_error() -> None:
    code, body = status(FAILED, BASES, [])
    assert code == 200
    assert parsed(body) == fal_client.Completed(
        logs=[], metrics={"inference_time": None}, error="the worker died", error_type="runner_disconnected"
    )


def test_a_submission_has_what_the_clients_keep_of_it() -> None:
    body = submission(WAITING, BASES)
    QueueSubmission.model_validate(body)
    assert body["gateway_request_id"] == body["request_id"] == "r1"
    assert body["response_url"] == "http://box/queue/fal-ai/flux-kontext-lora/requests/r1"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (CancelOutcome.CANCELLATION_REQUESTED, 202),
        (CancelOutcome.ALREADY_COMPLETED, 400),
        (CancelOutcome.NOT_FOUND, 404),
    ],
)
def test_a_cancel_says_what_came_of_it(outcome: CancelOutcome, code: int) -> None:
    assert cancel(outcome) == (code, {"status": outcome.value})
    CancelAnswer.model_validate(cancel(outcome)[1])


@given(st.floats(0, 4e9))
def test_times_are_read_back_by_python(at_s: float) -> None:
    text = iso_time(at_s)
    assert text.endswith("+00:00")
    assert abs((datetime.fromisoformat(text) - datetime.fromtimestamp(at_s, UTC)).total_seconds()) < 1e-5


# Progress lines, against tqdm itself.


@given(st.integers(1, 200), st.integers(1, 200), st.floats(1e-3, 1e5))
def test_a_progress_line_is_what_tqdm_writes(one: int, other: int, elapsed_s: float) -> None:
    done, total = sorted((one, other))
    form = "{l_bar}{bar:10}{r_bar}"  # tqdm's own, with a bar of a fixed width
    theirs = tqdm.format_meter(done, total, elapsed_s, bar_format=form, ascii=False)
    assert progress_line(done, total, elapsed_s) == theirs


def test_a_progress_line_looks_like_this() -> None:
    assert progress_line(12, 30, 2.927) == " 40%|████      | 12/30 [00:02<00:04,  4.10it/s]"
    assert progress_line(1, 30, 0.0) == "  3%|▎         | 1/30 [00:00<?, ?it/s]"
    assert progress_line(109, 200, 1.0).startswith(" 55%")  # rounded as tqdm does it: 100 * (109 / 200) is above 54.5
    assert progress_line(30, 30, 90.0) == "100%|██████████| 30/30 [01:30<00:00,  3.00s/it]"
