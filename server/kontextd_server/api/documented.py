"""What the OpenAPI document says of answers besides the good one. Knows models; handlers know nothing of it."""

from __future__ import annotations

from typing import Any

from kontextd_server.wire.answers import CancelAnswer, HTTPValidationError, QueueStatus, RequestError

# Any: FastAPI's own type for this argument.
Responses = dict[int | str, dict[str, Any]]

_TEXT = {"model": RequestError}
_KEYLESS: Responses = {401: {**_TEXT, "description": "no valid key"}, 403: {**_TEXT, "description": "not this key's"}}
GONE: Responses = {**_KEYLESS, 404: {**_TEXT, "description": "no such request of this key's owner"}}
NOT_DONE: Responses = {
    **GONE,
    400: {**_TEXT, "description": "still in progress"},
    422: {"model": HTTPValidationError, "description": "the request failed by its input"},
    499: {**_TEXT, "description": "cancelled"},
}
JSON_ERRORS: Responses = {
    **_KEYLESS,
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
    **_KEYLESS,
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
SSE: Responses = {
    **GONE,
    400: {**_TEXT, "description": "a header or the query cannot be right"},
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "server-sent events"},
}
