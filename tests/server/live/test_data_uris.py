"""`sync_mode`: pictures come in the answer. That nothing of them stays is in test_traces.py, when its time has come."""

from __future__ import annotations

import base64
import io

import httpx
from PIL import Image

from .box import ENDPOINT, LiveBox
from .expected import check_output, check_picture, picture_of
from .inline import Inline


def test_every_way_to_call_gives_the_same_picture_as_a_data_uri(inline: Inline) -> None:
    outputs = inline.outputs
    assert sorted(outputs) == ["queue", "run", "stream", "subscribe", "webhook"]
    for output in outputs.values():
        check_output(output, "data:image/png;base64,")
    check_picture(picture_of(outputs["run"]))
    assert len({output["images"][0]["url"] for output in outputs.values()}) == 1


def test_previews_of_a_stream_are_data_uris_too(inline: Inline) -> None:
    *previews, _ = inline.told["streamed"]["events"]
    assert previews
    for preview in previews:
        encoded = preview["images"][0]["url"].removeprefix("data:image/jpeg;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).format == "JPEG"


def test_the_result_of_a_run_cannot_be_read_again(inline: Inline, box: LiveBox) -> None:
    """It came with the answer, and so it is gone at once."""
    with box.store() as store:
        runs = [job for job in store.views.jobs(limit=1000) if job.kind in ("run", "stream") and job.transient]
    assert len(runs) >= 2
    for job in runs:
        url = f"{box.url}/queue/{ENDPOINT}/requests/{job.request_id}"
        headers = {"Authorization": f"Key {box.keys.own}"}
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 404
