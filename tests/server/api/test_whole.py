"""From the front door through a real worker and back: uploads as inputs, results as files, nothing left of secrets."""

from __future__ import annotations

import base64
import json
import signal
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from io import BytesIO

import pytest
from kontextd_models import Done, EditRequest, Step
from kontextd_server.fetch import FetchConfig, Fetcher, Web
from kontextd_server.mirror import Mirror
from kontextd_server.wire.addresses import possible_file_key
from kontextd_server.worker import Notifier, WorkerParts, WorkerPolicy
from kontextd_server.worker.null_engine import NullEngine, load_null
from kontextd_server.worker.process import WorkerProcess
from kontextd_server.worker.signals import SignalPipe
from PIL import Image

from .conftest import ENDPOINT, PICTURE, Box, eventually, in_thread

URI = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
RUN = f"/{ENDPOINT}"


@dataclass(frozen=True)
class Held:
    """Gives back what it is given, when it may: in a tenth of a second a busy box shows no preview of it."""

    go_on: threading.Event

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        for event in NullEngine(0.02).edit(request):
            if isinstance(event, Done):
                assert self.go_on.wait(120)
            yield event


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Cleared: no edit comes to its end."""
    made = threading.Event()
    made.set()
    yield made
    made.set()


@pytest.fixture
def whole_box(box: Box, go_on: threading.Event) -> Iterator[Box]:
    """A box with a worker of the real kind, whose engine gives back what it is given."""
    inputs = Fetcher(
        Web(FetchConfig(cache=box.folder / "cache", offline=True)),
        box.files,
        possible_file_key,
        Mirror(box.folder / "files"),
    )
    parts = WorkerParts(
        "w1", box.store, box.files, inputs, box.folder / "scratch", lambda: load_null(Held(go_on)),
        WorkerPolicy(poll_s=0.1, pulse_s=0.1),
    )  # fmt: skip
    signals = SignalPipe()
    process = WorkerProcess(parts, Notifier(None), signals, end_process=lambda code: None)
    with in_thread(process.run):
        try:
            eventually(lambda: box.client("").get("/ready").status_code == 200)
            yield box
        finally:
            signals.wake(signal.SIGTERM)
    signals.close()


def test_an_uploaded_file_is_edited_and_comes_back_as_a_file(whole_box: Box) -> None:
    client = whole_box.client()
    urls = client.post("/rest/storage/upload/initiate", json={"file_name": "in.png"}).json()
    client.put(urls["upload_url"], content=PICTURE)
    answer = client.post(RUN, json={"image_url": urls["file_url"], "prompt": "x", "num_images": 2})
    assert answer.status_code == 200, answer.text
    output = answer.json()
    assert len(output["images"]) == len(output["has_nsfw_concepts"]) == len(output["kontextd"]["seeds"]) == 2
    made = client.get(output["images"][1]["url"])
    assert made.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(made.content)).size == Image.open(BytesIO(PICTURE)).size
    assert all(isinstance(seconds, float) for seconds in output["timings"].values())


def test_a_result_file_expires_as_its_caller_asked(whole_box: Box) -> None:
    client = whole_box.client(**{"X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds": 3600}'})
    output = client.post(RUN, json={"image_url": URI, "prompt": "x"}).json()
    file = whole_box.files.info(output["images"][0]["url"].rpartition("/")[2])
    assert file.expires_at == pytest.approx(file.created_at + 3600)


def test_a_stream_shows_previews_of_its_steps(whole_box: Box, go_on: threading.Event) -> None:
    body = {"image_url": URI, "prompt": "x", "num_inference_steps": 5}
    go_on.clear()
    told = []
    with whole_box.client().stream("POST", f"{RUN}/stream", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                go_on.set()
    assert len(told) >= 2
    assert all(event["images"][0]["url"].startswith("data:image/jpeg") for event in told[:-1])
    assert told[-1]["images"][0]["url"].startswith(whole_box.url)


def test_an_input_that_cannot_be_had_is_a_422_on_its_field(whole_box: Box) -> None:
    answer = whole_box.client().post(RUN, json={"image_url": f"{whole_box.url}/files/nothing", "prompt": "x"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "image_url"]


def test_of_a_run_in_sync_mode_no_byte_is_left(whole_box: Box) -> None:
    mark = "a-prompt-that-nobody-may-find"
    answer = whole_box.client().post(RUN, json={"image_url": URI, "prompt": mark, "sync_mode": True})
    assert answer.json()["images"][0]["url"].startswith("data:image/png;base64,")
    eventually(lambda: whole_box.store.retention.prune().bytes_gone)
    whole_box.store.retention.prune()
    for path in (path for path in whole_box.folder.rglob("*") if path.is_file()):
        found = path.read_bytes()
        assert mark.encode() not in found, path
        assert PICTURE not in found, path
