"""The events of both streams, as they are sent, against what the OpenAPI document says of them."""

from __future__ import annotations

import json

import httpx
import jsonschema_rs
import pytest
from kontextd_models.errors import ImageTooSmall
from kontextd_server.wire.errors import RunnerDisconnected

from .conftest import ENDPOINT, INPUT, Box
from .test_run import STREAM, broken_off

STATUS_STREAM = f"/queue/{ENDPOINT}/requests/{{request_id}}/status/stream"


def event_schema(box: Box, method: str, path: str) -> jsonschema_rs.Validator:
    """What the document says of an event of this stream."""
    document = box.client("").get("/openapi.json").json()
    (media,) = document["paths"][path][method]["responses"]["200"]["content"].items()
    kind, told = media
    assert kind == "text/event-stream"
    return jsonschema_rs.validator_for({**told["schema"], "components": document["components"]})


def sent(answer: httpx.Response) -> list[dict[str, object]]:
    lines = (line.partition("data: ")[2] for line in answer.text.splitlines())
    return [json.loads(line) for line in lines if line]


def test_the_events_of_a_run_are_outputs(working_box: Box) -> None:
    schema = event_schema(working_box, "post", STREAM)
    events = sent(working_box.client().post(STREAM, json=INPUT))
    assert events
    assert all(map(schema.is_valid, events))
    without_images = {name: value for name, value in events[-1].items() if name != "images"}
    for wrong in ("text", {}, without_images):
        assert not schema.is_valid(wrong)


@pytest.mark.parametrize("error", [ImageTooSmall("image is 3×3"), RunnerDisconnected("it died three times")])
def test_an_event_of_a_failure_is_an_errors_body(working_box: Box, error: Exception) -> None:
    working_box.worker.fail_with = error
    working_box.worker.held.clear()
    schema = event_schema(working_box, "post", STREAM)
    told = broken_off(working_box, STREAM)
    assert "detail" in told[-1]
    assert all(map(schema.is_valid, told))


def test_the_events_of_a_status_stream_are_statuses(working_box: Box) -> None:
    schema, client = event_schema(working_box, "get", STATUS_STREAM), working_box.client()
    url = STATUS_STREAM.format(request_id=working_box.submit(client))
    events = sent(client.get(url, params={"logs": 1}))
    assert events[-1]["status"] == "COMPLETED"
    assert all(map(schema.is_valid, events))
    assert schema.is_valid({"detail": "x", "error_type": "internal_error"})
    assert not schema.is_valid({**events[-1], "status": "DONE"})
