"""Results as they are kept and as they are read."""

from __future__ import annotations

import json

import pytest
from kontextd_server.wire.addresses import Bases
from kontextd_server.wire.outputs import StoredImage, StoredOutput
from kontextd_server.wire.schema import FluxKontextLoraOutput

HERE = Bases("http://box", "http://box/queue", "http://box/rest", "http://box")
AT_FAL = Bases("https://fal.run", "https://queue.fal.run", "https://rest.fal.ai", "https://v3.fal.media")
FILE = StoredImage(1024, 768, "image/png", "a.png", 99, file_key="ab/a.png")
INLINE = StoredImage(1024, 768, "image/png", "a.png", 99, data_uri="data:image/png;base64,AA==")
REPORT = {
    "loras": [{"path": "https://x/l.safetensors", "matched": 3, "total": 4, "warnings": ["x"]}],
    "preset": {"name": "none", "full": 30, "cached": 0, "skipped": 0},
    "cache_hits": {"prompt": True},
    "seeds": [7],
    "size": {"asked": [1000, 760], "planned": [1008, 768], "reason": "rounded to 16"},
    "version": "1",
}
OUTPUT = StoredOutput((FILE, INLINE), {"inference": 1.5}, 7, (False, True), "make it █", REPORT)


def test_an_output_is_rendered_for_each_reader() -> None:
    body = OUTPUT.render(HERE)
    FluxKontextLoraOutput.model_validate(body)
    assert [image["url"] for image in body["images"]] == ["http://box/files/ab/a.png", INLINE.data_uri]  # type: ignore[attr-defined]
    assert OUTPUT.render(AT_FAL)["images"][0]["url"] == "https://v3.fal.media/files/ab/a.png"  # type: ignore[index]


def test_an_output_has_exactly_fals_fields_and_one_of_ours_that_can_be_turned_off() -> None:
    fals = ["images", "timings", "seed", "has_nsfw_concepts", "prompt"]
    assert list(OUTPUT.render(HERE)) == [*fals, "kontextd"]
    assert list(OUTPUT.render(HERE, with_report=False)) == fals
    assert FluxKontextLoraOutput.model_fields.keys() == {*fals, "kontextd"}


def test_an_output_is_kept_as_json_and_comes_back_whole() -> None:
    assert StoredOutput.from_json(json.loads(json.dumps(OUTPUT.to_json()))) == OUTPUT


def test_an_image_without_a_file_and_without_bytes_is_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match=r"a\.png has neither"):
        StoredImage(1, 1, "image/png", "a.png", 1).render(HERE)
