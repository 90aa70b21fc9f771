"""The document: fal's schema names, and bodies that are read by our own reader."""

from __future__ import annotations

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from kontextd_server.wire.answers import HTTPValidationError, RequestError
from kontextd_server.wire.error_answers import answer_errors
from kontextd_server.wire.json_bodies import JsonLimits
from kontextd_server.wire.openapi import body_of, document, takes
from kontextd_server.wire.schema import FluxKontextLoraInput, FluxKontextLoraOutput

LORA = "/fal-ai/flux-kontext-lora"
FALS = {
    "OutputFormatEnum",
    "AccelerationEnum",
    "ResolutionModeEnum",
    "LoraWeight",
    "Image",
    "ImageSize",
    "FluxKontextLoraInput",
    "FluxKontextLoraOutput",
    "QueueStatus",
}


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI(title="kontextd", version="1")
    taken = Depends(body_of(FluxKontextLoraInput, JsonLimits(max_bytes=1000)))

    @app.post(LORA, response_model=FluxKontextLoraOutput, openapi_extra=takes(FluxKontextLoraInput))
    async def run(asked: FluxKontextLoraInput = taken) -> dict[str, object]:
        return {"images": [], "timings": {}, "seed": 7, "has_nsfw_concepts": [], "prompt": asked.prompt}

    answer_errors(app)
    return app


def references(node: object) -> set[str]:
    """Every `$ref` in a document."""
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_schemas_have_fals_names(app: FastAPI) -> None:
    schemas = document(app)["components"]["schemas"]  # type: ignore[index]
    assert schemas.keys() >= FALS
    assert [name for name in schemas if name.endswith(("-Input", "-Output"))] == []


def test_the_errors_in_the_document_are_those_that_are_sent(app: FastAPI) -> None:
    schemas = document(app)["components"]["schemas"]  # type: ignore[index]
    sent = TestClient(app).post(LORA, json={"image_url": "x", "prompt": "y", "output_format": "gif"}).json()
    assert HTTPValidationError.model_validate(sent).detail[0].ctx == {"expected": ["jpeg", "png"]}
    assert schemas["ValidationError"]["required"] == ["loc", "msg", "type", "url"]
    RequestError.model_validate(TestClient(app).get("/nowhere").json())


def test_every_reference_leads_somewhere(app: FastAPI) -> None:
    made = document(app)
    named = {f"#/components/schemas/{name}" for name in made["components"]["schemas"]}  # type: ignore[index]
    assert references(made) <= named


def test_the_route_says_which_body_it_takes_and_the_document_its_limits(app: FastAPI) -> None:
    made = document(app)
    body = made["paths"][LORA]["post"]["requestBody"]["content"]["application/json"]["schema"]  # type: ignore[index]
    assert body == {"$ref": "#/components/schemas/FluxKontextLoraInput"}
    taken = made["components"]["schemas"]["FluxKontextLoraInput"]  # type: ignore[index]
    assert taken["required"] == ["image_url", "prompt"]
    steps = taken["properties"]["num_inference_steps"]
    assert (steps["default"], steps["minimum"], steps["maximum"]) == (30, 1, 50)
    assert made["components"]["schemas"]["ImageSize"]["properties"]["width"]["default"] == 512  # type: ignore[index]


def test_a_body_reaches_the_route_as_a_model(app: FastAPI) -> None:
    client = TestClient(app)
    assert client.post(LORA, json={"image_url": "x", "prompt": "█", "unknown": 1}).json()["prompt"] == "█"


@pytest.mark.parametrize(
    ("body", "status", "loc"),
    [
        (b"", 422, ["body", "image_url"]),
        (b"{", 422, ["body", 1]),
        (b"[]", 422, ["body"]),
        (b'{"image_url": "x", "prompt": "y", "seed": 1e400}', 422, ["body", 0]),
        (b'{"image_url": "x", "prompt": "y", "num_images": 9}', 422, ["body", "num_images"]),
    ],
)
def test_a_body_that_is_wrong_is_a_422_of_fals_form(app: FastAPI, body: bytes, status: int, loc: list[object]) -> None:
    response = TestClient(app).post(LORA, content=body)
    assert (response.status_code, response.json()["detail"][0]["loc"]) == (status, loc)


def test_a_body_that_is_too_large_is_a_413(app: FastAPI) -> None:
    assert TestClient(app).post(LORA, content=b" " * 1001).status_code == 413
