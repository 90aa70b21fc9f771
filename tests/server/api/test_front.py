"""What holds for every call: hosts, the fal proxy, ids, methods, CORS, unknown endpoints, logs, and the end."""

from __future__ import annotations

import http.client
import json
import logging
import subprocess
import sys
import threading

import httpx
import pytest
from kontextd_server.wire.cors import CorsSettings
from kontextd_server.wire.front_door import DoorSettings

from .conftest import ENDPOINT, INPUT, Box, eventually
from .test_run import RUN, STREAM, running

PROXY = "/api/fal/proxy"


def test_each_of_fals_hosts_answers_and_hands_out_its_sisters(working_box: Box) -> None:
    client = working_box.client()
    submitted = client.post(f"/{ENDPOINT}", json=INPUT, headers={"Host": "queue.fal.run"}).json()
    port = working_box.port
    assert submitted["status_url"].startswith(f"http://queue.fal.run/{ENDPOINT}/requests/")
    ran = client.post(f"/{ENDPOINT}", json=INPUT, headers={"Host": f"fal.run:{port}"}).json()
    assert ran["images"][0]["url"].startswith(f"http://v3.fal.media:{port}/files/")
    told = client.post("/storage/auth/token", headers={"Host": "rest.fal.ai"}).json()
    assert told["base_url"] == "http://v3.fal.media"


def test_a_proxied_call_is_answered_inside_the_process(working_box: Box) -> None:
    client = working_box.client()
    target = {"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}?fal_max_queue_length=5"}
    submitted = client.post(PROXY, json=INPUT, headers=target).json()
    assert submitted["status_url"].startswith(f"{working_box.url}/queue/")
    status = {"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}/requests/{submitted['request_id']}/status?logs=1"}
    assert client.get(PROXY, headers=status).json()["request_id"] == submitted["request_id"]
    assert client.get(PROXY, headers={"x-fal-target-url": "https://evil.example/"}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/fal-ai/flux/dev", 404),
        ("GET", f"/{ENDPOINT}/realtime", 404),
        ("GET", "/", 404),
        ("POST", "/rest/nothing", 404),
        ("GET", f"/{ENDPOINT}", 405),
        ("DELETE", "/health", 405),
        ("PUT", "/files/grants/x/complete", 405),
        ("PUT", "/files/x/multipart/y/complete", 405),
        ("POST", "/files/grants/x/1", 405),
        ("PUT", "/files/grants/x/-1", 404),
        ("PUT", f"/files/x/multipart/y/{'9' * 5000}", 404),
        ("POST", f"/{ENDPOINT}", 401),
        ("GET", "/health", 200),
    ],
)
def test_every_answer_carries_a_request_id_and_errors_are_json(box: Box, method: str, path: str, status: int) -> None:
    answer = box.client("").request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-fal-request-id"]
    if status != 200:
        assert answer.json()["error_type"] == answer.headers["x-fal-error-type"]
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("path", ["/health", f"/queue/{ENDPOINT}/requests/x/status", PROXY])
def test_a_request_with_two_hosts_is_a_400(box: Box, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    for host in ("fal.run", "queue.fal.run"):
        connection.putheader("Host", host)
    connection.putheader("x-fal-target-url", f"https://queue.fal.run/{ENDPOINT}/requests/x/status")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["error_type"]) == (400, "bad_request")
    connection.close()


def test_an_unknown_endpoint_names_those_that_exist(box: Box) -> None:
    assert ENDPOINT in box.client().post("/queue/fal-ai/other", json={}).json()["detail"]


def test_head_is_get_without_a_body_and_options_names_the_methods(box: Box) -> None:
    client = box.client()
    head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 10
    assert client.options("/health").headers["allow"] == "GET, HEAD, OPTIONS"
    assert client.options(f"/queue/{ENDPOINT}").headers["allow"] == "POST, OPTIONS"
    assert client.options("/files/grants/x/complete").headers["allow"] == "POST, OPTIONS"
    assert client.options("/rest/nothing").status_code == 404


def test_a_page_of_a_listed_origin_may_call_and_is_not_asked_for_a_key_first(idle_box: Box) -> None:
    idle_box.configure(door=DoorSettings(cors=CorsSettings(("https://app.example",))))
    idle_box.serve()
    client = idle_box.client("", Origin="https://app.example")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert client.options(RUN, headers=asked).headers["access-control-allow-origin"] == "https://app.example"
    refused = client.post(RUN, json=INPUT)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")
    assert idle_box.client("", Origin="https://evil.example").options(RUN, headers=asked).status_code == 400


def test_a_revoked_key_ends_within_its_time_and_its_tokens_at_once(idle_box: Box) -> None:
    idle_box.configure(key_memory_s=0.2)
    idle_box.serve()
    client = idle_box.client()
    token = client.post("/rest/tokens/", json={"allowed_apps": ["flux-kontext-lora"]}).json()
    box_keys = idle_box.store.keys
    box_keys.revoke(next(key.id for key in box_keys.all() if key.name == "anna"))
    by_token = httpx.post(f"{idle_box.url}{RUN}?fal_jwt_token={token}", json=INPUT, trust_env=False)
    assert by_token.status_code == 401
    eventually(lambda: client.get(f"/queue/{ENDPOINT}/requests/x/status").status_code == 401)


def test_neither_keys_nor_prompts_nor_grants_are_logged(working_box: Box, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = working_box.client()
    ran = client.post(f"{RUN}?fal_jwt_token=tok-secret", json={**INPUT, "prompt": "a secret wish"})
    urls = client.post("/rest/storage/upload/initiate", json={"file_name": "a.txt"}).json()
    client.put(urls["upload_url"], content=b"x")
    eventually(lambda: "put_granted 200" in caplog.text)
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("kontextd"))
    assert "POST run 200 in" in logged
    assert ran.headers["x-fal-request-id"] in logged
    for secret in ("secret", working_box.key, urls["upload_url"].rpartition("/")[2]):
        assert secret not in logged


def test_while_the_process_drains_nothing_new_is_accepted(box: Box) -> None:
    client = box.client()
    request_id = box.submit(client)
    box.drain.begin()
    for path in (RUN, STREAM, f"/queue{RUN}"):
        answer = client.post(path, json=INPUT)
        assert (answer.status_code, answer.headers["x-fal-needs-retry"]) == (503, "true")
    assert client.get("/ready").status_code == 503
    assert client.get(f"/queue/{ENDPOINT}/requests/{request_id}/status").status_code == 202
    assert len(box.store.views.jobs()) == 1


def test_a_run_that_outlasts_the_drain_is_cancelled_and_may_be_sent_again(working_box: Box) -> None:
    box = working_box
    box.worker.held.clear()
    answers: list[httpx.Response] = []
    client = box.client()
    thread = threading.Thread(target=lambda: answers.append(client.post(RUN, json=INPUT)))
    thread.start()
    eventually(lambda: running(box))
    box.drain.begin()
    thread.join()
    assert (answers[0].status_code, answers[0].headers["x-fal-needs-retry"]) == (503, "true")
    eventually(lambda: box.worker.cancelled)


def test_slow_calls_of_the_store_keep_nobody_else_waiting(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers wait for one another; whoever only reads does not wait for them."""
    client, other, real = box.client(), box.client(), box.store.jobs.enqueue
    entered, released = threading.Event(), threading.Event()

    def slow(job: object) -> object:
        entered.set()
        released.wait(30)
        return real(job)

    request_id = box.submit(client)
    monkeypatch.setattr(box.store.jobs, "enqueue", slow)
    thread = threading.Thread(target=box.submit, args=(client,))
    thread.start()
    assert entered.wait(30)
    assert other.get(f"/queue/{ENDPOINT}/requests/{request_id}/status").status_code == 202
    assert thread.is_alive()
    released.set()
    thread.join()


def test_a_status_poll_is_one_call_of_the_store(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    client = box.client()
    url = f"/queue/{ENDPOINT}/requests/{box.submit(client)}/status"
    calls, read = [], box.store.database.read

    def counted() -> object:
        calls.append(1)
        return read()

    monkeypatch.setattr(box.store.database, "read", counted)
    client.get(url, params={"logs": 1})
    assert len(calls) == 1


def test_the_api_never_imports_torch() -> None:
    code = "import sys, kontextd_server.api; print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
