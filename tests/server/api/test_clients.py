"""The official clients, unmodified, against a real server with a worker double."""

from __future__ import annotations

from typing import Any

import fal_clients
import pytest
from kontextd_server.certs import write_certificates

from .conftest import ENDPOINT, STEPS, Box


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    """Installing them takes longer than a test may."""
    fal_clients.js_modules()


def test_javascript_makes_every_call_by_one_line_of_configuration(working_box: Box) -> None:
    box = working_box
    told = fal_clients.run_js("journey.cjs", f"{box.url}/api/fal/proxy", box.key)

    assert told["ran"]["data"]["seed"] == 7
    assert box.store.views.status(told["ran"]["requestId"]) is not None

    subscribed = told["subscribed"]
    assert subscribed["states"][-1] == "COMPLETED"
    assert subscribed["result"]["data"]["prompt"] == "paint it red"

    queued = told["queued"]
    assert queued["seen"][-1] == "COMPLETED"
    assert len(queued["status"]["logs"]) == STEPS
    assert queued["result"]["requestId"] == queued["requestId"]
    job = box.store.views.status(queued["requestId"])
    assert job is not None
    assert job.priority.name == "LOW"

    assert told["cancelled"]["error_type"] in ("client_cancelled", None)
    assert told["streamed"]["result"] == told["streamed"]["events"][-1]
    assert told["streamed"]["result"]["images"][0]["url"].startswith(f"{box.url}/files/")

    assert (told["uploaded"]["size"], told["uploaded"]["last"]) == (1000, 7)
    assert told["transformed"]["data"]["seed"] == 7

    assert (told["wrong"]["name"], told["wrong"]["status"]) == ("ValidationError", 422)
    assert told["wrong"]["isValidation"]
    assert (told["unknown"]["name"], told["unknown"]["status"]) == ("ApiError", 404)


def test_javascript_uploads_more_than_90_megabytes_in_parts(box: Box) -> None:
    told = fal_clients.run_js("journey.cjs", f"{box.url}/api/fal/proxy", box.key, str(91 * 2**20))
    assert (told["size"], told["last"]) == (91 * 2**20, 7)


PYTHON_JOURNEY = f"""
import asyncio, json, fal_client
ENDPOINT = {ENDPOINT!r}
input = {{"image_url": "https://studio.example/cat.png", "prompt": "paint it red", "seed": 7}}
told, lines = {{}}, []

def update(status):
    if isinstance(status, (fal_client.InProgress, fal_client.Completed)):
        lines.extend(log["message"] for log in status.logs or [])

told["ran"] = fal_client.run(ENDPOINT, arguments=input)
told["subscribed"] = fal_client.subscribe(ENDPOINT, arguments=input, with_logs=True, on_queue_update=update)
told["lines"] = lines
handle = fal_client.submit(ENDPOINT, arguments=input, priority="low", start_timeout=60)
told["events"] = [type(event).__name__ for event in handle.iter_events(with_logs=True)]
told["result"] = handle.get()
told["request_id"] = handle.request_id
told["status"] = type(fal_client.status(ENDPOINT, handle.request_id, with_logs=True)).__name__
told["streamed"] = list(fal_client.stream(ENDPOINT, arguments=input))
waiting = fal_client.submit(ENDPOINT, arguments=input)
try:
    waiting.cancel()
except fal_client.FalClientHTTPError as error:
    told["cancel"] = error.status_code
try:
    fal_client.run(ENDPOINT, arguments={{"prompt": "x"}})
except fal_client.FalClientHTTPError as error:
    told["wrong"] = [error.status_code, error.error_type]

async def asynchronously():
    handle = await fal_client.submit_async(ENDPOINT, arguments=input)
    return [await handle.get(), await fal_client.run_async(ENDPOINT, arguments=input)]

told["asynchronous"] = asyncio.run(asynchronously())
print(json.dumps(told))
"""


def test_python_makes_every_call_by_its_host_variables(idle_box: Box) -> None:
    """Through TLS: its client speaks nothing else. Its uploads go to fixed names, which are not led here."""
    files = write_certificates(idle_box.folder / "tls", ["127.0.0.1"])
    idle_box.serve(files.leaf, files.leaf_key)
    idle_box.worker.start()
    host = f"127.0.0.1:{idle_box.port}"
    variables = {
        "FAL_KEY": idle_box.key,
        "FAL_RUN_HOST": host,
        "FAL_QUEUE_RUN_HOST": f"{host}/queue",
        "SSL_CERT_FILE": str(files.ca),
    }
    told: dict[str, Any] = fal_clients.run_python(PYTHON_JOURNEY, variables)
    for output in (told["ran"], told["subscribed"], told["result"], told["streamed"][-1], *told["asynchronous"]):
        assert (output["seed"], output["prompt"]) == (7, "paint it red")
    assert told["ran"]["images"][0]["url"].startswith(f"https://{host}/files/")
    assert set(told["lines"]) == {line for line in told["lines"] if "it/s" in line}
    assert told["events"][-1] == told["status"] == "Completed"
    assert told.get("cancel") in (None, 400)
    assert told["wrong"] == [422, "missing"]
    job = idle_box.store.views.status(told["request_id"])
    assert job is not None
    assert (job.priority.name, job.start_by is not None) == ("LOW", True)
