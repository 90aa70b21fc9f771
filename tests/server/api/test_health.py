"""Our own pages: alive, ready, metrics, the webhook keys, the OpenAPI document."""

from __future__ import annotations

import re

import pytest
from kontextd_models.errors import ImageTooSmall
from kontextd_server.store import StoreUnavailable, Success, Work, Worker, WorkerState

from .conftest import ENDPOINT, INPUT, Box, eventually
from .test_run import RUN


def test_it_is_alive_without_a_worker_and_ready_with_one(box: Box) -> None:
    client = box.client("")
    assert client.get("/health").json()["status"] == "ok"
    refused = client.get("/ready")
    assert (refused.status_code, "workers: none" in refused.json()["detail"]) == (503, True)
    box.store.workers.beat(Worker("w1", "host", "cpu", 1, WorkerState.STARTING, "v1"))
    assert client.get("/ready").status_code == 503
    box.say_ready()
    assert client.get("/ready").json() == {"status": "ready", "workers": 1}
    workers = client.get("/health").json()["workers"]
    assert {"id": "double", "state": "ready", "device": "cpu", "version": "v1"} in workers


def test_it_is_alive_without_its_database_and_says_so(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> object:
        raise StoreUnavailable("the job store does not answer: test")

    monkeypatch.setattr(box.store.workers, "live", away)
    client = box.client("")
    assert (client.get("/health").status_code, client.get("/health").json()["store"]) == (200, "unavailable")
    refused = client.get("/ready")
    assert (refused.status_code, refused.headers["x-fal-needs-retry"]) == (503, "true")
    assert "test" not in refused.text


def test_metrics_tell_what_waits_and_count_what_ended_once(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    client.post(RUN, json=INPUT)
    box.worker.fail_with = ImageTooSmall("too small")
    client.post(RUN, json=INPUT)
    box.worker.held.clear()
    box.submit(client)
    box.submit(client)
    box.say_ready()
    eventually(lambda: "kontextd_running_jobs 1.0" in client.get("/metrics").text)
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        'kontextd_queued_jobs{priority="normal"} 1.0',
        'kontextd_finished_jobs_total{error_type="",outcome="ok"} 1.0',
        'kontextd_finished_jobs_total{error_type="image_too_small",outcome="failed"} 1.0',
        "kontextd_steps_total 6.0",
        "kontextd_wait_seconds_count 2.0",
        "kontextd_inference_seconds_count 1.0",
        'kontextd_workers{state="ready"} 1.0',
        'kontextd_http_answers_total{call="run",status="422"} 1.0',
    ):
        assert line in answer.text, line


def test_metrics_count_what_the_engine_did(box: Box) -> None:
    done = [
        Work(4, False, False, 1.5, False, 20.0),
        Work(1, True, False, None, True, 0.02),
        Work(1, True, True, 0.5),  # back to the base model
        Work(),
    ]
    for work in done:
        box.submit(box.client())
        claimed = box.store.leases.claim("w1")
        assert claimed is not None
        box.store.leases.finish(claimed.lease, Success(b"{}", 1.0, work))
    for _ in range(2):  # counted once
        text = box.client("").get("/metrics").text
        for line in (
            "kontextd_images_total 6.0",
            'kontextd_cache_lookups_total{cache="prompt",result="hit"} 2.0',
            'kontextd_cache_lookups_total{cache="prompt",result="miss"} 1.0',
            'kontextd_cache_lookups_total{cache="reference",result="hit"} 1.0',
            'kontextd_cache_lookups_total{cache="reference",result="miss"} 2.0',
            'kontextd_cache_lookups_total{cache="loras",result="hit"} 1.0',
            'kontextd_cache_lookups_total{cache="loras",result="miss"} 1.0',
            "kontextd_lora_load_seconds_sum 20.02",
            'kontextd_lora_load_seconds_bucket{le="0.05"} 1.0',
            "kontextd_lora_merge_seconds_count 2.0",
            "kontextd_lora_merge_seconds_sum 2.0",
            'kontextd_lora_merge_seconds_bucket{le="0.5"} 1.0',
        ):
            assert line in text, line


def test_labels_are_bounded_whatever_is_asked_for(box: Box) -> None:
    client = box.client()
    for number in range(5):
        client.get(f"/files/no-such-file-{number}")
        client.get(f"/nothing/{number}")
        client.get(f"/queue/{ENDPOINT}/requests/{number}/status")
    text = client.get("/metrics").text
    assert set(re.findall(r'answers_total\{call="(\w+)",status="404"', text)) == {"get", "other", "status"}


@pytest.mark.parametrize("path", ["/.well-known/jwks.json", "/rest/.well-known/jwks.json"])
def test_the_webhook_key_is_public(box: Box, path: str) -> None:
    (key,) = box.client("").get(path).json()["keys"]
    assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")


def test_the_document_has_fals_names_and_all_calls(box: Box) -> None:
    told = box.client("").get("/openapi.json").json()
    named = {"FluxKontextLoraInput", "QueueStatus", "LoraWeight", "ResolutionModeEnum"}
    assert named <= told["components"]["schemas"].keys()
    request = f"/queue/{ENDPOINT}/requests/{{request_id}}"
    assert told["paths"][f"/queue/{ENDPOINT}"].keys() == {"post"}
    for path in (RUN, f"{RUN}/stream", request, f"{request}/status", f"{request}/cancel", "/files/{key}"):
        assert path in told["paths"]
    body = told["paths"][RUN]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/FluxKontextLoraInput"}
