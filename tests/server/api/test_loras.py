"""What the API says of LoRAs: the listing of the library, and what is refused before it becomes a job."""

from __future__ import annotations

import json

import pytest

from .conftest import ENDPOINT, INPUT, Box

KEPT = {
    "name": "ink",
    "sha256": "ab" * 32,
    "size_bytes": 12,
    "dialects": ["kohya"],
    "rank": 16,
    "trigger_words": ["inkstyle"],
    "matched": 6,
    "total": 7,
    "model": "FLUX.1 Kontext [dev]",
    "added_at": 1_700_000_000.0,
}


@pytest.fixture
def library_box(box: Box) -> Box:
    """A box whose library holds ink."""
    folder = box.folder / "loras"
    folder.mkdir()
    (folder / "ink.safetensors").write_bytes(b"x")
    (folder / "ink.json").write_text(json.dumps(KEPT))
    return box


def test_the_library_is_listed_by_names_to_send(library_box: Box) -> None:
    answer = library_box.client().get("/kontextd/loras")
    assert answer.status_code == 200
    ink = {
        name: KEPT[name] for name in ("sha256", "size_bytes", "dialects", "rank", "trigger_words", "matched", "total")
    }
    assert answer.json() == {
        "loras": [{"path": "library:ink", **ink, "added_at": "2023-11-14T22:13:20.000000+00:00"}],
        "roots": ["library", "studio"],
    }
    assert str(library_box.folder) not in answer.text
    assert "x-fal-request-id" in answer.headers


def test_an_empty_library_is_an_empty_list(box: Box) -> None:
    assert box.client().get("/kontextd/loras").json()["loras"] == []
    assert not (box.folder / "loras").exists()


@pytest.mark.parametrize("key", ["", "wrong"])
def test_the_listing_needs_a_key(library_box: Box, key: str) -> None:
    answer = library_box.client(key).get("/kontextd/loras")
    assert (answer.status_code, answer.json()["error_type"]) == (401, "auth_error")


def test_the_listing_is_a_page_of_our_own_and_no_endpoint(library_box: Box) -> None:
    assert library_box.client(Host="fal.run").get("/kontextd/loras").status_code == 404
    assert library_box.client().get("/kontextd/nothing").status_code == 404
    assert library_box.client().head("/kontextd/loras").status_code == 200


def test_the_listing_is_in_the_document(box: Box) -> None:
    told = box.client("").get("/openapi.json").json()
    answer = told["paths"]["/kontextd/loras"]["get"]["responses"]["200"]
    assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/LoraListing"}
    assert {"path", "sha256", "trigger_words"} <= told["components"]["schemas"]["LibraryLora"]["properties"].keys()


@pytest.mark.parametrize(
    ("scale", "wrong"), [(10.5, "less_than_equal"), (-11, "greater_than_equal"), (1e300, "less_than_equal")]
)
def test_a_scale_out_of_range_is_refused_at_once_and_at_its_place(box: Box, scale: float, wrong: str) -> None:
    loras = [{"path": "library:ink"}, {"path": "library:wash", "scale": scale}]
    answer = box.client().post(f"/queue/{ENDPOINT}", json={**INPUT, "loras": loras})
    (entry,) = answer.json()["detail"]
    assert (answer.status_code, entry["type"], entry["input"]) == (422, wrong, scale)
    assert entry["loc"] == ["body", "loras", 1, "scale"]
    assert entry["msg"] == "Input should be from -10 to 10 on this server"


@pytest.mark.parametrize("scale", [10, -10, 0, 0.001])
def test_a_scale_in_range_is_queued(box: Box, scale: float) -> None:
    box.submit(box.client(), loras=[{"path": "library:ink", "scale": scale}])


def test_jobs_of_one_set_are_known_by_it_whatever_the_order(box: Box) -> None:
    ink, wash, off = ({"path": path, "scale": scale} for path, scale in (("ink", 1), ("wash", 0.5), ("off", 0)))
    keys = []
    for loras in ([ink, wash], [wash, off, ink], [{**ink, "scale": 2}, wash], [off], []):
        box.submit(box.client(), loras=loras)
        keys.append(box.store.leases.claim("w").lora_key)
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == keys[4] == ""
