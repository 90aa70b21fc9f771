"""From a file of the library through HTTP and a whole worker with the demonstration model to answers and metrics."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from kontextd_models import EngineConfig
from kontextd_models.embedded import lora_file, sample_photo
from kontextd_server.cli import main
from kontextd_server.fetch import FetchConfig, Fetcher, Web
from kontextd_server.fetch.roots import LoraRoots
from kontextd_server.mirror import Mirror
from kontextd_server.wire.addresses import possible_file_key
from kontextd_server.worker import Notifier, WorkerParts, WorkerPolicy, load_kontext
from kontextd_server.worker.process import WorkerProcess
from kontextd_server.worker.signals import SignalPipe

from .conftest import ENDPOINT, Box, eventually, in_thread

PHOTO = f"data:image/jpeg;base64,{base64.b64encode(sample_photo().read_bytes()).decode()}"


@pytest.fixture
def whole_box(box: Box) -> Iterator[Box]:
    """A box with a worker of the demonstration model, whose library is that of the listing."""
    web, mirror = Web(FetchConfig(cache=box.folder / "cache", offline=True)), Mirror(box.folder / "files")
    roots = LoraRoots({"library": box.folder / "loras"})
    parts = WorkerParts(
        "w1", box.store, box.files, Fetcher(web, box.files, possible_file_key, mirror, roots), box.folder / "scratch",
        partial(load_kontext, EngineConfig(device="cpu"), box.folder / "sums.json"), WorkerPolicy(poll_s=0.1),
    )  # fmt: skip
    signals = SignalPipe()
    process = WorkerProcess(parts, Notifier(None), signals, end_process=lambda code: None)
    with in_thread(process.run):
        try:
            eventually(lambda: box.client("").get("/ready").status_code == 200, 300)
            yield box
        finally:
            signals.wake(signal.SIGTERM)
    signals.close()


def test_a_lora_of_the_library_changes_the_picture_and_is_told_and_counted(
    whole_box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", "add", str(lora_file("duotone")), "--data", str(whole_box.folder)]) == 0
    client = whole_box.client()
    (listed,) = client.get("/kontextd/loras").json()["loras"]
    assert (listed["path"], listed["matched"]) == ("library:duotone", listed["total"])

    def run(*loras: dict[str, object]) -> tuple[bytes, dict]:
        body = {"image_url": PHOTO, "prompt": "x", "num_inference_steps": 1, "seed": 1, "loras": list(loras)}
        answer = client.post(f"/{ENDPOINT}", json=body)
        assert answer.status_code == 200, answer.text
        return client.get(answer.json()["images"][0]["url"]).content, answer.json()

    plain, _ = run()
    changed, told = run({"path": "library:duotone", "scale": 0.8})
    assert changed != plain
    assert told["kontextd"]["loras"] == [
        {"path": "library:duotone", "matched": listed["total"], "total": listed["total"], "warnings": []}
    ]
    assert told["timings"]["merge"] > 0
    again, told = run({"path": "library:duotone", "scale": 0.8})
    assert (again, told["kontextd"]["cache_hits"]["loras"]) == (changed, True)
    assert run()[0] == plain
    text = client.get("/metrics").text
    for line in (
        "kontextd_lora_load_seconds_count 2.0",
        "kontextd_lora_merge_seconds_count 2.0",  # the set, and the base again
        'kontextd_cache_lookups_total{cache="loras",result="hit"} 1.0',
    ):
        assert line in text, line
