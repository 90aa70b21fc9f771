"""What the OpenAPI document says of answers besides the good one. Knows models; handlers know nothing of it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from kontextd_server.wire.answers import CancelAnswer, HTTPValidationError, QueueStatus, RequestError
from kontextd_server.wire.openapi import REF
from kontextd_server.wire.schema import FluxKontextLoraOutput

# Any: FastAPI's own type for this argument.
Responses = dict[int | str, dict[str, Any]]

_TEXT = {"model": RequestError}
KEYED: Responses = {401: {**_TEXT, "description": "no valid key"}, 403: {**_TEXT, "description": "not this key's"}}
GONE: Responses = {**KEYED, 404: {**_TEXT, "description": "no such request of this key's owner"}}
NOT_DONE: Responses = {
    **GONE,
    400: {**_TEXT, "description": "still in progress"},
    422: {"model": HTTPValidationError, "description": "the request failed by its input"},
    499: {**_TEXT, "description": "cancelled"},
}
JSON_ERRORS: Responses = {
    **KEYED,
    400: {**_TEXT, "description": "a header or the query cannot be right"},
    413: {**_TEXT, "description": "too large"},
    422: {"model": HTTPValidationError, "description": "the body is not what the endpoint takes"},
    429: {**_TEXT, "description": "not accepted; try again later"},
    503: {**_TEXT, "description": "not accepted; try again"},
}
STATUS: Responses = {
    **GONE,
    202: {"model": QueueStatus, "description": "waiting or running"},
    400: {**_TEXT, "description": "the query cannot be right"},
}
CANCEL: Responses = {
    **KEYED,
    400: {"model": CancelAnswer, "description": "completed already"},
    404: {"model": CancelAnswer, "description": "no such request of this key's owner"},
}
UPLOAD: Responses = {**JSON_ERRORS, 404: {**_TEXT, "description": "no such upload; it may have expired"}}
FILE: Responses = {
    206: {"description": "the range that was asked for"},
    304: {"description": "the ETag is the same"},
    404: {**_TEXT, "description": "no such file; it may have expired"},
    416: {**_TEXT, "description": "the file has no such range"},
}


def _events(*kinds: type[BaseModel]) -> Responses:
    """A stream. OpenAPI 3.1 has no word for a schema of each event, which readers of documents take `schema` for."""
    schema = {"anyOf": [{"$ref": REF.format(model=kind.__name__)} for kind in kinds]}
    told = "server-sent events; the schema is that of the JSON in each. An error is the last event, without an end"
    return {
        **GONE,
        400: {**_TEXT, "description": "a header or the query cannot be right"},
        200: {"content": {"text/event-stream": {"schema": schema}}, "description": told},
    }


OUTPUT_EVENTS = _events(FluxKontextLoraOutput, HTTPValidationError, RequestError)
STATUS_EVENTS = _events(QueueStatus, HTTPValidationError, RequestError)
