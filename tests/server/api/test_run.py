"""Sync run and stream through a real connection: what they answer, and what becomes of the job when nobody waits."""

from __future__ import annotations

import base64
import json
import socket
import threading
from contextlib import closing
from io import BytesIO

import httpx
import pytest
from kontextd_models.errors import EngineError, ImageTooSmall
from kontextd_server.store import CANCELLED, JobFilter, JobState, Outcome, StoreUnavailable
from kontextd_server.wire.errors import (
    Cancelled,
    FieldError,
    GenerationTimeout,
    Invalid,
    RunnerDisconnected,
    StartTimeout,
)
from PIL import Image

from .conftest import ENDPOINT, INPUT, PICTURE, Box, eventually

RUN, STREAM = f"/{ENDPOINT}", f"/{ENDPOINT}/stream"


def events(body: str) -> list[dict[str, object]]:
    lines = (line for line in body.splitlines() if line.startswith("data: "))
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def send_and_keep_open(box: Box, path: str) -> socket.socket:
    """A request whose client can go away whenever the test wants it to."""
    body = json.dumps(INPUT)
    connection = socket.create_connection(("127.0.0.1", box.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: box\r\nAuthorization: Key {box.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def broken_off(box: Box, path: str) -> list[dict[str, object]]:
    """The events of a stream that ends without its last chunk; the worker goes on once there is one."""
    body = ""
    with box.client().stream("POST", path, json=INPUT) as stream:
        try:
            for text in stream.iter_text():
                body += text
                box.worker.held.set()
        except httpx.RemoteProtocolError:
            return events(body)
    raise AssertionError(f"the stream ended well: {body}")


def running(box: Box) -> bool:
    return len(box.store.views.jobs(JobFilter(state=JobState.IN_PROGRESS))) == 1


def outcome(box: Box) -> Outcome | None:
    (job,) = box.store.views.jobs()
    return job.outcome


def test_a_run_answers_with_the_output_under_the_id_of_its_job(working_box: Box) -> None:
    answer = working_box.client().post(RUN, json={**INPUT, "seed": 5})
    assert (answer.status_code, answer.json()["seed"]) == (200, 5)
    job = working_box.store.views.status(answer.headers["x-fal-request-id"])
    assert job is not None
    assert (job.kind, job.outcome) == ("run", Outcome.OK)
    assert httpx.get(answer.json()["images"][0]["url"], trust_env=False).content == PICTURE


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (ImageTooSmall("image is 3×3; the smallest side allowed is 64."), 422, "image_too_small"),
        (GenerationTimeout("the request ran for longer than 3600 s."), 504, "generation_timeout"),
        (EngineError("the engine failed"), 500, "internal_server_error"),
        (RunnerDisconnected("the worker died three times on it"), 500, "runner_disconnected"),
    ],
)
def test_a_run_that_fails_answers_with_the_failure(
    working_box: Box, error: Exception, status: int, error_type: str
) -> None:
    working_box.worker.fail_with = error
    answer = working_box.client().post(RUN, json=INPUT)
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (status, error_type)
    if status == 504:  # the one mark that keeps JavaScript's client from posting again
        assert answer.headers["x-fal-request-timeout-type"] == "user"
    assert working_box.store.views.status(answer.headers["x-fal-request-id"]) is not None


@pytest.mark.parametrize("path", [RUN, STREAM])
def test_a_job_is_cancelled_when_its_client_goes_away(working_box: Box, path: str) -> None:
    box = working_box
    box.worker.held.clear()
    with closing(send_and_keep_open(box, path)):
        eventually(lambda: running(box))
    eventually(lambda: outcome(box) is Outcome.CANCELLED)
    assert box.worker.cancelled


@pytest.mark.parametrize("path", [RUN, STREAM])
def test_a_job_that_still_waits_is_cancelled_as_well(box: Box, path: str) -> None:
    with closing(send_and_keep_open(box, path)):
        eventually(lambda: len(box.store.views.jobs()) == 1)
    eventually(lambda: outcome(box) is Outcome.CANCELLED)


def test_a_queued_job_goes_on_when_its_client_goes_away(working_box: Box) -> None:
    with closing(send_and_keep_open(working_box, f"/queue{RUN}")):
        eventually(lambda: len(working_box.store.views.jobs()) == 1)
    eventually(lambda: outcome(working_box) is Outcome.OK)


def test_a_run_that_others_may_have_joined_by_its_idempotency_key_is_not_cancelled(working_box: Box) -> None:
    box = working_box
    box.worker.held.clear()
    client = box.client(**{"Idempotency-Key": "k"})
    with pytest.raises(httpx.ReadTimeout):
        client.post(RUN, json=INPUT, timeout=1)
    box.worker.held.set()
    again = client.post(RUN, json=INPUT)
    assert again.status_code == 200
    assert len(box.store.views.jobs()) == 1


def test_a_run_cancelled_by_another_call_is_499(working_box: Box) -> None:
    box = working_box
    box.worker.held.clear()
    answers: list[httpx.Response] = []
    client = box.client()
    thread = threading.Thread(target=lambda: answers.append(client.post(RUN, json=INPUT)))
    thread.start()
    eventually(lambda: running(box))
    (job,) = box.store.views.jobs()
    assert box.client().put(f"/queue/{ENDPOINT}/requests/{job.request_id}/cancel").status_code == 202
    thread.join()
    assert (answers[0].status_code, answers[0].json()["error_type"]) == (499, "client_cancelled")


def test_a_start_deadline_that_passes_is_a_504_that_is_not_repeated(box: Box) -> None:
    stop = threading.Event()

    def sweep() -> None:
        while not stop.wait(0.05):
            box.store.leases.sweep()

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        answer = box.client(**{"X-Fal-Request-Timeout": "0.3"}).post(RUN, json=INPUT)
    finally:
        stop.set()
        thread.join()
    assert (answer.status_code, answer.json()["error_type"]) == (504, "request_timeout")
    assert answer.headers["x-fal-request-timeout-type"] == "user"


def test_a_stream_sends_previews_and_then_the_output(working_box: Box) -> None:
    box = working_box
    box.worker.held.clear()
    told = []
    with box.client().stream("POST", STREAM, json={**INPUT, "seed": 5}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        job = box.store.views.status(stream.headers["x-fal-request-id"])
        assert job is not None
        assert job.kind == "stream"
        for line in stream.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                box.worker.held.set()
    first, last = told[0], told[-1]
    assert first.keys() == last.keys() - {"kontextd"}
    assert (first["prompt"], first["seed"]) == (INPUT["prompt"], 5)
    kind, _, data = first["images"][0]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    shown = Image.open(BytesIO(base64.b64decode(data))).size
    assert shown == (first["images"][0]["width"], first["images"][0]["height"])
    assert last["images"][0]["url"].startswith(f"{box.url}/files/")


def test_a_stream_that_fails_before_its_first_event_is_an_ordinary_error(box: Box) -> None:
    answer = box.client().post(STREAM, json={"prompt": "x"})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "image_url"])


def test_a_stream_that_fails_later_says_so_and_breaks_off(working_box: Box) -> None:
    box = working_box
    box.worker.fail_with = ImageTooSmall("image is 3×3; the smallest side allowed is 64.")
    box.worker.held.clear()
    told = broken_off(box, STREAM)
    assert told[0].keys() >= {"images", "prompt"}
    assert told[-1]["detail"][0]["type"] == "image_too_small"


@pytest.mark.parametrize(
    "error",
    [
        Cancelled("cancelled by an operator"),
        RunnerDisconnected("the worker died three times on it"),
        GenerationTimeout("the request ran for longer than 3600 s."),
        EngineError("the engine failed"),
        StartTimeout(3),
        Invalid([FieldError(("body", "loras", 1, "path"), "no weights", "file_download_error", {"a": 1}, "x", True)]),
    ],
)
def test_each_kind_of_failure_reads_in_a_stream_as_in_a_result(working_box: Box, error: Exception) -> None:
    box = working_box
    box.worker.fail_with = error
    box.worker.held.clear()
    told = broken_off(box, STREAM)
    (job,) = box.store.views.jobs()
    assert told[-1] == box.client().get(f"/queue/{ENDPOINT}/requests/{job.request_id}").json()


def test_sync_mode_leaves_neither_file_nor_result_behind(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    for path in (RUN, STREAM):
        answer = client.post(path, json={**INPUT, "sync_mode": True})
        output = events(answer.text)[-1] if path == STREAM else answer.json()
        assert output["images"][0]["url"].startswith("data:image/png;base64,")
        left = box.store.views.result(answer.headers["x-fal-request-id"])
        assert left is not None
        assert left.expired
        assert box.store.views.payload(answer.headers["x-fal-request-id"]) is None
    assert box.files.usage().used_bytes == 0


def test_a_run_waits_for_a_store_that_is_away_for_a_moment(
    working_box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A 503 would make clients post a second time what was accepted."""
    box, real = working_box, working_box.store.views.status
    looks: list[str] = []

    def status(request_id: str) -> object:
        looks.append(request_id)
        if len(looks) <= 3:
            raise StoreUnavailable("the job store does not answer: test")
        return real(request_id)

    monkeypatch.setattr(box.store.views, "status", status)
    assert box.client().post(RUN, json=INPUT).status_code == 200
    assert caplog.text.count("cannot be read") == 1


def test_a_worker_that_ends_a_job_as_cancelled_is_told_as_such(box: Box) -> None:
    client = box.client()
    request_id = box.submit(client)
    claim = box.store.leases.claim("w")
    assert claim is not None
    box.store.leases.finish(claim.lease, CANCELLED)
    assert client.get(f"/queue/{ENDPOINT}/requests/{request_id}").status_code == 499
