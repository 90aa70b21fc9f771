"""The queue through the front door: what a client sees from submit to result, and what is hidden from others."""

from __future__ import annotations

import http.client
import json
import logging
from contextlib import closing
from dataclasses import replace

import pytest
from kontextd_models.errors import ImageTooLarge
from kontextd_server.api import ApiLimits
from kontextd_server.store import Policy

from .conftest import ENDPOINT, INPUT, STEPS, Box, eventually

QUEUE = f"/queue/{ENDPOINT}"


def completed(box: Box, request_id: str) -> bool:
    job = box.store.views.status(request_id)
    return job is not None and job.finished_at is not None


def test_a_submit_answers_with_the_three_urls_and_the_place_in_the_queue(box: Box) -> None:
    client = box.client()
    first, second = client.post(QUEUE, json=INPUT), client.post(QUEUE, json=INPUT)
    body = second.json()
    request_id = body["request_id"]
    base = f"{box.url}/queue/{ENDPOINT}/requests/{request_id}"
    assert body == {
        "status": "IN_QUEUE",
        "request_id": request_id,
        "gateway_request_id": request_id,
        "response_url": base,
        "status_url": f"{base}/status",
        "cancel_url": f"{base}/cancel",
        "queue_position": 1,
    }
    assert first.json()["queue_position"] == 0
    assert second.headers["x-fal-request-id"] == request_id


def test_a_waiting_request_is_202_with_its_position(box: Box) -> None:
    client = box.client()
    box.submit(client)
    answer = client.get(f"{QUEUE}/requests/{box.submit(client)}/status")
    assert (answer.status_code, answer.json()["status"], answer.json()["queue_position"]) == (202, "IN_QUEUE", 1)


def test_a_running_request_is_202_with_its_log_where_asked_for(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    box.worker.held.clear()
    url = f"{QUEUE}/requests/{box.submit(client)}/status"
    eventually(lambda: client.get(url, params={"logs": 1}).json().get("logs"))
    told, quiet = client.get(url, params={"logs": "true"}), client.get(url, params={"logs": "0"})
    assert (told.status_code, told.json()["status"]) == (202, "IN_PROGRESS")
    assert "1/3" in told.json()["logs"][0]["message"]
    assert told.json()["logs"][0]["source"] == "USER"
    assert quiet.json()["logs"] is None


def test_a_finished_request_is_200_with_its_log_and_metrics_and_has_a_result(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    request_id = box.submit(client, seed=7)
    eventually(lambda: completed(box, request_id))
    status = client.get(f"{QUEUE}/requests/{request_id}/status", params={"logs": 1})
    assert (status.status_code, status.json()["status"]) == (200, "COMPLETED")
    assert len(status.json()["logs"]) == STEPS
    assert status.json()["metrics"] == {"inference_time": 0.3}
    assert "error" not in status.json()
    for end in ("", "/response", "/"):
        result = client.get(f"{QUEUE}/requests/{request_id}{end}")
        assert result.status_code == 200
        assert result.headers["x-fal-request-id"] == request_id
    output = result.json()
    assert (output["seed"], output["prompt"]) == (7, "paint it red")
    assert client.get(output["images"][0]["url"]).headers["content-type"] == "image/png"
    assert output["kontextd"] == {"version": "v"}


def test_the_operator_can_leave_our_own_object_out(idle_box: Box) -> None:
    idle_box.configure(with_report=False)
    idle_box.serve()
    idle_box.worker.start()
    assert "kontextd" not in idle_box.client().post(f"/{ENDPOINT}", json=INPUT).json()


def test_a_result_asked_for_too_early_is_400(box: Box) -> None:
    client = box.client()
    answer = client.get(f"{QUEUE}/requests/{box.submit(client)}")
    assert (answer.status_code, answer.json()["detail"]) == (400, "Request is still in progress")


def test_a_failed_request_answers_with_its_own_code_and_body(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    box.worker.fail_with = ImageTooLarge("image is 20000×10; the largest side allowed is 14142. Resize it first.")
    request_id = box.submit(client)
    eventually(lambda: completed(box, request_id))
    status = client.get(f"{QUEUE}/requests/{request_id}/status")
    assert status.status_code == 200
    assert (status.json()["status"], status.json()["error_type"]) == ("COMPLETED", "image_too_large")
    assert status.json()["error"].startswith("image is 20000")
    result = client.get(f"{QUEUE}/requests/{request_id}")
    assert (result.status_code, result.json()["detail"][0]["type"]) == (422, "image_too_large")
    assert result.headers["x-fal-error-type"] == "image_too_large"
    assert result.headers["x-fal-request-id"] == request_id


def test_a_waiting_request_is_cancelled_at_once(box: Box) -> None:
    client = box.client()
    url = f"{QUEUE}/requests/{box.submit(client)}"
    cancelled = client.put(f"{url}/cancel")
    assert (cancelled.status_code, cancelled.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    status = client.get(f"{url}/status").json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")
    assert client.get(url).status_code == 499
    again = client.put(f"{url}/cancel")
    assert (again.status_code, again.json()) == (400, {"status": "ALREADY_COMPLETED"})


def test_a_running_request_is_cancelled_within_a_step(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    box.worker.held.clear()
    request_id = box.submit(client)
    eventually(lambda: client.get(f"{QUEUE}/requests/{request_id}/status").json()["status"] == "IN_PROGRESS")
    assert client.put(f"{QUEUE}/requests/{request_id}/cancel").status_code == 202
    eventually(lambda: box.worker.cancelled == [request_id])
    eventually(lambda: client.get(f"{QUEUE}/requests/{request_id}").status_code == 499)


def test_another_owners_request_looks_unknown_and_an_admin_sees_all(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    request_id = box.submit(client)
    eventually(lambda: completed(box, request_id))
    url, other, admin = f"{QUEUE}/requests/{request_id}", box.client(box.other_key), box.client(box.admin_key)
    for end in ("", "/status", "/status/stream"):
        theirs, never = other.get(url + end), other.get(f"{QUEUE}/requests/00000000{end}")
        assert theirs.status_code == never.status_code == 404
        assert theirs.json()["detail"].replace(request_id, "x") == never.json()["detail"].replace("00000000", "x")
        assert admin.get(url + end).status_code == 200
    theirs = other.put(f"{url}/cancel")
    assert (theirs.status_code, theirs.json()) == (404, {"status": "NOT_FOUND"})


def test_an_unknown_request_is_404(box: Box) -> None:
    client = box.client()
    assert client.get(f"{QUEUE}/requests/nothing/status").status_code == 404
    assert client.put(f"{QUEUE}/requests/nothing/cancel").json() == {"status": "NOT_FOUND"}


def test_a_status_stream_tells_each_change_once_and_each_line_once(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    box.worker.held.clear()
    request_id = box.submit(client)
    statuses, lines = [], []
    with client.stream("GET", f"{QUEUE}/requests/{request_id}/status/stream?logs=1") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["x-fal-request-id"] == request_id
        for event in filter(lambda line: line.startswith("data: "), stream.iter_lines()):
            told = json.loads(event.removeprefix("data: "))
            statuses.append(told["status"])
            lines += [line["message"] for line in told.get("logs") or []]
            if lines:
                box.worker.held.set()
    assert statuses[-1] == "COMPLETED"
    assert statuses == sorted(statuses, key=["IN_QUEUE", "IN_PROGRESS", "COMPLETED"].index)
    assert [line.split("|")[2].split()[0] for line in lines] == ["1/3", "2/3", "3/3"]


def test_a_status_stream_without_logs_tells_nothing_twice(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    url = f"{QUEUE}/requests/{box.submit(client)}/status/stream"
    with client.stream("GET", url) as stream:
        told = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert len(told) == len(set(told)) <= 3


def test_head_of_a_status_stream_ends_before_the_request_does(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream, key = f"{QUEUE}/requests/{box.submit(box.client())}/status/stream", {"Authorization": f"Key {box.key}"}
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=60)
    with closing(connection):
        connection.request("HEAD", stream, headers=key)
        head = connection.getresponse()
        assert (head.status, head.read(), head.headers.get_content_type()) == (200, b"", "text/event-stream")
        connection.request("HEAD", stream.replace("/requests/", "/requests/x"), headers=key)
        missing = connection.getresponse()
        assert (missing.status, missing.read()) == (404, b"")
        connection.request("GET", "/health")  # nor does the connection wait
        assert connection.getresponse().status == 200
    eventually(lambda: "HEAD status_stream 200" in caplog.text)  # all that belonged to the call is closed


@pytest.mark.parametrize(
    ("body", "loc", "kind"),
    [
        ({"prompt": "x"}, ["body", "image_url"], "missing"),
        ({**INPUT, "num_images": 9}, ["body", "num_images"], "less_than_equal"),
        ({**INPUT, "output_format": "gif"}, ["body", "output_format"], "one_of"),
        ({**INPUT, "loras": [{"scale": 1}]}, ["body", "loras", 0, "path"], "missing"),
    ],
)
def test_a_wrong_input_is_refused_before_anything_is_queued(
    box: Box, body: dict[str, object], loc: list[object], kind: str
) -> None:
    answer = box.client().post(QUEUE, json=body)
    assert answer.status_code == 422
    assert (answer.json()["detail"][0]["loc"], answer.json()["detail"][0]["type"]) == (loc, kind)
    assert box.store.views.jobs() == ()


def test_what_is_too_deep_or_too_large_is_refused(idle_box: Box) -> None:
    limits = idle_box.config.limits
    idle_box.configure(limits=replace(limits, body=replace(limits.body, max_bytes=10_000)))
    idle_box.serve()
    client = idle_box.client()
    deep = client.post(QUEUE, content=b"[" * 200 + b"]" * 200)
    assert (deep.status_code, deep.json()["detail"][0]["type"]) == (422, "json_invalid")
    large = client.post(QUEUE, json={**INPUT, "prompt": "x" * 20_000})
    assert (large.status_code, large.headers["x-fal-error-type"]) == (413, "bad_request")


def test_the_operators_own_limits_are_told_as_fal_tells_its(idle_box: Box) -> None:
    idle_box.configure(limits=ApiLimits(max_images=2, max_loras=1))
    idle_box.serve()
    client = idle_box.client()
    images = client.post(QUEUE, json={**INPUT, "num_images": 3}).json()["detail"][0]
    assert (images["type"], images["ctx"], images["input"]) == ("less_than_equal", {"le": 2}, 3)
    loras = client.post(QUEUE, json={**INPUT, "loras": [{"path": "a"}, {"path": "b"}]}).json()["detail"][0]
    assert (loras["type"], loras["loc"]) == ("sequence_too_long", ["body", "loras"])


def test_an_idempotency_key_leads_to_the_same_request_and_never_to_another_body(box: Box) -> None:
    client = box.client(**{"Idempotency-Key": "order-7"})
    first, again = box.submit(client), box.submit(client)
    assert first == again
    assert len(box.store.views.jobs()) == 1
    other = client.post(QUEUE, json={**INPUT, "prompt": "paint it blue"})
    assert (other.status_code, other.json()["detail"][0]["type"]) == (422, "idempotency_key_reused")
    assert box.submit(box.client(box.other_key, **{"Idempotency-Key": "order-7"})) != first


def test_a_queue_longer_than_the_caller_allows_is_429(box: Box) -> None:
    client = box.client()
    box.submit(client)
    answer = client.post(QUEUE, params={"fal_max_queue_length": 1}, json=INPUT)
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (429, "concurrent_requests_limit")
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("policy", [Policy(max_queued_per_owner=1)])
def test_one_owners_full_queue_is_not_anothers(box: Box, policy: Policy) -> None:
    client = box.client()
    box.submit(client)
    assert client.post(QUEUE, json=INPUT).status_code == 429
    box.submit(box.client(box.other_key))


def test_an_owner_that_sends_too_often_is_told_when_to_come_again(idle_box: Box) -> None:
    idle_box.configure(limits=ApiLimits(requests_per_minute=6, burst=2))
    idle_box.serve()
    client = idle_box.client()
    answers = [client.post(QUEUE, json=INPUT) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 10
    idle_box.submit(idle_box.client(idle_box.other_key))


def test_a_webhook_to_a_denied_address_is_refused_at_submit(box: Box) -> None:
    client = box.client()
    denied = client.post(QUEUE, params={"fal_webhook": "http://10.0.0.1/hook"}, json=INPUT)
    assert denied.status_code == 422
    assert denied.json()["detail"][0]["loc"] == ["query", "fal_webhook"]
    assert denied.json()["detail"][0]["type"] == denied.headers["x-fal-error-type"] == "file_download_error"
    assert "KONTEXTD_FETCH_ALLOW_WEBHOOK" in denied.json()["detail"][0]["msg"]
    allowed = client.post(QUEUE, params={"fal_webhook": "https://studio.example/hook"}, json=INPUT)
    job = box.store.views.status(allowed.json()["request_id"])
    assert job is not None
    assert (job.webhook_url, job.base_url) == ("https://studio.example/hook", box.url)


def test_the_headers_of_a_request_are_kept_with_its_job(box: Box) -> None:
    headers = {
        "X-Fal-Queue-Priority": "low",
        "X-Fal-Request-Timeout": "60",
        "X-Fal-No-Retry": "1",
        "X-Fal-Tags": "team=design",
        "X-Fal-Store-IO": "0",
        "X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds": 3600}',
    }
    job = box.store.views.status(box.submit(box.client(**headers)))
    assert job is not None
    (key,) = (key for key in box.store.keys.all() if key.name == "anna")
    assert (job.owner, job.key_id) == ("anna", key.id)
    assert (job.priority.name, job.runs_left, job.transient) == ("LOW", 1, True)
    assert job.start_by == pytest.approx(job.created_at + 60)
    assert json.loads(job.tags or "") == {"team": "design"}
    claimed = box.store.leases.claim("w1")
    assert claimed is not None
    assert claimed.files_expire_s == 3600


@pytest.mark.parametrize("wish", [None, '{"expiration_duration_seconds": null}', '{"expiration_duration_seconds": 0}'])
def test_no_wish_for_a_lifetime_leaves_it_to_the_operator(box: Box, wish: str | None) -> None:
    box.submit(box.client(**({} if wish is None else {"X-Fal-Object-Lifecycle-Preference": wish})))
    claimed = box.store.leases.claim("w1")
    assert claimed is not None
    assert claimed.files_expire_s is None


def test_a_lora_set_is_the_same_whatever_its_order_and_zero_scales_are_absent(box: Box) -> None:
    client = box.client()
    one, two, off = {"path": "a", "scale": 0.5}, {"path": "b"}, {"path": "c", "scale": 0}
    keys = []
    for loras in ([one, two], [two, one], [two, off, one], [two], [off], []):
        job = box.store.views.status(box.submit(client, loras=loras))
        assert job is not None
        keys.append(job.lora_key)
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert keys[4] == keys[5] == ""


def test_the_seed_is_decided_at_submit_so_that_a_second_run_makes_the_same_image(box: Box) -> None:
    client = box.client()
    drawn, given = box.submit(client), box.submit(client, seed=0)
    seeds = [json.loads(box.store.views.payload(request_id) or b"")["seed"] for request_id in (drawn, given)]
    assert 0 <= seeds[0] < 2**53
    assert seeds[1] == 0


def test_a_result_in_sync_mode_leads_to_data_uris_and_is_gone_after_its_time(working_box: Box) -> None:
    box, client = working_box, working_box.client()
    request_id = box.submit(client, sync_mode=True)
    eventually(lambda: completed(box, request_id))
    for _ in range(2):  # clients repeat
        assert client.get(f"{QUEUE}/requests/{request_id}").json()["images"][0]["url"].startswith("data:image/png;")
    box.store.retention.expire(request_id)
    gone = client.get(f"{QUEUE}/requests/{request_id}")
    assert gone.status_code == 404
    assert "leaves nothing behind" in gone.json()["detail"]
    assert client.get(f"{QUEUE}/requests/{request_id}/status").json()["status"] == "COMPLETED"
