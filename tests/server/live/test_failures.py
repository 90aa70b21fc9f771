"""A failure in mid-stream is an error to the clients, and a run that fails is posted once."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
from pathlib import Path

import fal_clients
import httpx
import pytest
from kontextd_server.certs import CertificateFiles
from kontextd_server.store import JobFilter, JobKind, JobState

from .box import ENDPOINT, LiveBox, environment_of, eventually
from .expected import edit_of, endless
from .studio import Studio

STREAM_UNTIL_IT_BREAKS = """
import asyncio, json, sys, fal_client
endless, events = json.loads(sys.argv[1]), []

async def asynchronously():
    async for event in fal_client.stream_async(ENDPOINT, endless):
        took(event)

def blocking():
    for event in fal_client.stream(ENDPOINT, endless):
        took(event)

def took(event):
    events.append(event)
    print("event", flush=True)

ENDPOINT, raised = "fal-ai/flux-kontext-lora", None
try:
    asyncio.run(asynchronously()) if sys.argv[2] == "async" else blocking()
except Exception as error:
    raised = [type(error).__module__, type(error).__name__]
print(json.dumps({"raised": raised, "events": events}))
"""


def test_done_rejects_where_a_stream_breaks_in_its_midst(box: LiveBox, studio: Studio, js: Path) -> None:
    config = {"credentials": box.keys.own, "proxyUrl": {"url": box.proxy_url, "when": "always"}}
    asked = {"config": config, "endless": endless(studio)}
    told = fal_clients.run_js("breaking_stream.cjs", json.dumps(asked), timeout_s=300)
    assert "resolved" not in told
    assert told["is"] == ["ApiError"]
    assert told["events"][0]["images"]
    assert cancelled(box, told["streamed"])


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_python_raises_where_a_stream_breaks_in_its_midst(
    face: str, tls_box: LiveBox, studio: Studio, certificates: CertificateFiles
) -> None:
    variables = {"FAL_KEY": tls_box.keys.own, "FAL_RUN_HOST": f"localhost:{tls_box.port}"}
    environment = environment_of({**variables, "SSL_CERT_FILE": str(certificates.ca)})
    command = [sys.executable, "-c", STREAM_UNTIL_IT_BREAKS, json.dumps(endless(studio)), face]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as client:
        assert client.stdout
        assert client.stdout.readline() == "event\n"
        request_id = running_stream(tls_box)
        cancel(tls_box, request_id, certificates)
        said, log = client.communicate(timeout=120)
    told = json.loads(said.splitlines()[-1])
    assert told["raised"], log
    assert told["raised"][0].startswith(("httpx", "httpcore"))
    assert told["events"][0]["images"]
    assert cancelled(tls_box, request_id)


def running_stream(box: LiveBox) -> str:
    with box.store() as store:
        jobs = store.views.jobs(JobFilter(state=JobState.IN_PROGRESS))
    (job,) = [job for job in jobs if job.kind is JobKind.STREAM]
    return job.request_id


def cancel(box: LiveBox, request_id: str, certificates: CertificateFiles) -> None:
    url = f"{box.url}/queue/{ENDPOINT}/requests/{request_id}/cancel"
    headers = {"Authorization": f"Key {box.keys.own}"}
    with httpx.Client(verify=ssl.create_default_context(cafile=certificates.ca), trust_env=False, timeout=60) as client:
        assert client.put(url, headers=headers).status_code == 202


def cancelled(box: LiveBox, request_id: str) -> bool:
    with box.store() as store:
        job = store.views.status(request_id)
    return job is not None and job.error_type == "client_cancelled"


def test_a_run_that_fails_is_posted_once_by_javascript(box: LiveBox, studio: Studio, js: Path) -> None:
    before = len(box.answers("POST run"))
    config = {"credentials": box.keys.own, "proxyUrl": {"url": box.proxy_url, "when": "always"}}
    asked = {"config": config, "input": edit_of(studio), "endless": endless(studio)}
    told = fal_clients.run_js("failing_runs.cjs", json.dumps(asked), timeout_s=300)
    assert (told["statuses"], told["timed_out_by_user"]) == ([422, 422, 504], True)
    assert statuses_since(box, before, len(told["statuses"])) == told["statuses"]


FAILING_RUNS = """
import json, sys, time, fal_client
edit, endless = json.loads(sys.argv[1])
ENDPOINT, statuses = "fal-ai/flux-kontext-lora", []

def failing(arguments, **words):
    try:
        fal_client.run(ENDPOINT, arguments, **words)
    except fal_client.FalClientHTTPError as error:
        statuses.append(error.status_code)

failing({"prompt": "no picture"})
failing({**edit, "image_url": "data:image/png;base64,AAAA"})
busy = fal_client.submit(ENDPOINT, endless)
while isinstance(busy.status(), fal_client.Queued):
    time.sleep(0.1)
failing(edit, start_timeout=1.1)
busy.cancel()
list(busy.iter_events())
print(json.dumps({"statuses": statuses}))
"""


def test_a_run_that_fails_is_posted_once_by_python(
    tls_box: LiveBox, studio: Studio, certificates: CertificateFiles
) -> None:
    before = len(tls_box.answers("POST run"))
    host = f"localhost:{tls_box.port}"
    variables = {"FAL_KEY": tls_box.keys.own, "FAL_RUN_HOST": host, "FAL_QUEUE_RUN_HOST": f"{host}/queue"}
    inputs = json.dumps([edit_of(studio), endless(studio)])
    environment = {**variables, "SSL_CERT_FILE": str(certificates.ca)}
    told = fal_clients.run_python(FAILING_RUNS, environment, inputs, timeout_s=300)
    assert told["statuses"] == [422, 422, 504]
    assert statuses_since(tls_box, before, len(told["statuses"])) == told["statuses"]


def statuses_since(box: LiveBox, before: int, at_least: int) -> list[int]:
    """Of the runs posted since. The line of an answer is written just after it: that of the last may be on its way."""
    eventually(lambda: len(box.answers("POST run")) >= before + at_least)
    found = [re.search(r"POST run (\d+) in", line) for line in box.answers("POST run")[before:]]
    return [int(status[1]) for status in found if status]
