"""The one table from exceptions to answers. Knows statuses, headers and bodies; knows no framework.

Which statuses make the official clients send a request again (read in their sources, measured with them):

    | status        | JavaScript                     | Python                                            |
    |---------------|--------------------------------|---------------------------------------------------|
    | 408, 409      | no                             | up to ten times                                   |
    | 429           | three more times               | up to ten times                                   |
    | 500           | status polls only, five times  | no                                                |
    | 502, 503      | three more times               | only without x-fal-request-id and with "nginx"    |
    | 504           | three more times, unless       | as 503, and never with that header                |
    |               | X-Fal-Request-Timeout-Type:    |                                                   |
    |               | user                           |                                                   |

So a 429 and a 503 are answered only where nothing was accepted, every 504 carries that header, and 408, 409 and 502
are never answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kontextd_models import errors as engine

from kontextd_server.fetch import errors as fetch
from kontextd_server.files import errors as files
from kontextd_server.store import errors as store
from kontextd_server.wire import errors as wire
from kontextd_server.wire.errors import FieldError, Invalid, WireError

ERROR_TYPE_HEADER = "X-Fal-Error-Type"
TIMEOUT_TYPE_HEADER = "X-Fal-Request-Timeout-Type"
RETRY_HEADER = "X-Fal-Needs-Retry"
FAL_ERRORS_PAGE = "https://docs.fal.ai/errors#"
# What the engine calls a field where the wire has another name.
_WIRE_FIELDS = {"image": "image_url"}
_NOT_PUBLIC = "the server failed. Its operator finds the cause in the log, under the id in x-fal-request-id."
_FULL = "the server's file store is full. Its operator must make room; send the request again after that."


class Shape(StrEnum):
    """fal has two forms of error bodies."""

    TEXT = "text"  # {"detail": "…", "error_type": "…"}: requests and infrastructure
    LIST = "list"  # {"detail": [{loc, msg, type, url, …}]}: model errors


@dataclass(frozen=True)
class Row:
    """`retry`: the same request may succeed later, unchanged. `told` is said in place of a message that names what is
    nobody's business, such as folders; that one stays in the log."""

    status: int
    error_type: str
    shape: Shape = Shape.TEXT
    retry: bool = False
    told: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_NO_SECOND_POST = {TIMEOUT_TYPE_HEADER: "user"}  # the one mark that keeps clients from posting after a 504


# The nearest class of an exception's line of descent counts.
ANSWERS: Mapping[type[BaseException], Row] = {
    wire.BadRequest: Row(400, "bad_request"),
    wire.AuthError: Row(401, "auth_error", headers={"WWW-Authenticate": "Key"}),
    wire.NotPermitted: Row(403, "auth_error"),
    wire.NotFound: Row(404, "not_found"),
    wire.MethodNotAllowed: Row(405, "bad_request"),
    wire.BodyTooLarge: Row(413, "bad_request"),
    wire.Invalid: Row(422, "bad_request", Shape.LIST),
    wire.TooManyRequests: Row(429, "concurrent_requests_limit", retry=True),
    wire.Cancelled: Row(499, "client_cancelled"),
    wire.RunnerDisconnected: Row(500, "runner_disconnected"),
    wire.InternalError: Row(500, "internal_error"),
    wire.NotAccepted: Row(503, "runner_scheduling_failure", retry=True),
    wire.StartTimeout: Row(504, "request_timeout", headers=_NO_SECOND_POST),
    wire.GenerationTimeout: Row(504, "generation_timeout", Shape.LIST, headers=_NO_SECOND_POST),
    engine.InputError: Row(422, "value_error", Shape.LIST),
    engine.ImageLoadError: Row(422, "image_load_error", Shape.LIST),
    engine.UnsupportedImageFormat: Row(422, "unsupported_image_format", Shape.LIST),
    engine.ImageTooLarge: Row(422, "image_too_large", Shape.LIST),
    engine.ImageTooSmall: Row(422, "image_too_small", Shape.LIST),
    engine.AspectRatioOutOfRange: Row(422, "image_aspect_ratio_error", Shape.LIST),
    engine.ContentPolicyViolation: Row(422, "content_policy_violation", Shape.LIST),
    engine.FeatureNotSupported: Row(422, "feature_not_supported", Shape.LIST),
    engine.EngineError: Row(500, "internal_server_error", Shape.LIST),
    files.FileNotHere: Row(404, "not_found"),
    files.UploadNotFound: Row(404, "not_found"),
    files.KeyTaken: Row(400, "bad_request"),
    files.InvalidPart: Row(400, "bad_request"),
    files.InvalidGrant: Row(403, "auth_error"),
    files.GrantExpired: Row(403, "auth_error"),
    files.FileTooLarge: Row(413, "file_too_large"),
    files.InvalidRange: Row(416, "bad_request"),
    files.QuotaExceeded: Row(507, "internal_error", told=_FULL),
    files.StoreFull: Row(507, "internal_error", told=_FULL),
    files.StoreUnavailable: Row(503, "runner_scheduling_failure", retry=True, told=_NOT_PUBLIC),
    store.StoreUnavailable: Row(503, "runner_scheduling_failure", retry=True, told=_NOT_PUBLIC),
    fetch.FetchError: Row(422, "file_download_error", Shape.LIST),
    fetch.InputTooLarge: Row(422, "file_too_large", Shape.LIST),
    engine.KontextdError: Row(500, "internal_server_error", Shape.LIST, told=_NOT_PUBLIC),
    BaseException: Row(500, "internal_error", told=_NOT_PUBLIC),
}


@dataclass(frozen=True)
class ErrorAnswer:
    """What a client is told. Status, type and `encoded` body are kept with a request that failed; see `kept_answer`."""

    status: int
    error_type: str
    message: str
    body: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def encoded(self) -> bytes:
        return json.dumps(self.body, allow_nan=False).encode()


# The row of whatever is our own fault, where another status would mislead.
OURS = ANSWERS[BaseException]


def row_of(error: BaseException, table: Mapping[type[BaseException], Row] = ANSWERS) -> Row:
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def placed(error: BaseException, loc: wire.Loc) -> BaseException:
    """The error as one about the value at `loc`, where the caller can mend it; otherwise itself."""
    told = answer(error)
    return Invalid([FieldError(loc, told.message, told.error_type)]) if told.status == 422 else error


def answer(error: BaseException, table: Mapping[type[BaseException], Row] = ANSWERS) -> ErrorAnswer:
    """The answer to an exception: of this tree, of the engine's, or any other (500, without its message)."""
    row = row_of(error, table)
    message = str(error) if row.told is None else row.told
    fields = _field_errors(error, row, message)
    error_type = fields[0].type if row.shape is Shape.LIST else row.error_type
    return ErrorAnswer(
        status=row.status,
        error_type=error_type,
        message=message,
        body={"detail": [entry(one) for one in fields]}
        if row.shape is Shape.LIST
        else {"detail": message, "error_type": error_type},
        headers={**_headers(error_type, row), **(error.headers if isinstance(error, WireError) else {})},
    )


def kept_answer(status: int, error_type: str, encoded: bytes) -> ErrorAnswer:
    """The answer of a request that failed earlier, with the headers that belong to its status."""
    body: dict[str, object] = json.loads(encoded)
    detail = body.get("detail")
    message = str(detail[0].get("msg", "")) if isinstance(detail, list) and detail else str(detail)
    row = next((row for row in ANSWERS.values() if row.status == status), ANSWERS[BaseException])
    return ErrorAnswer(status, error_type, message, body, _headers(error_type, row))


def entry(error: FieldError) -> dict[str, object]:
    """One element of `detail`."""
    url = error.url or FAL_ERRORS_PAGE + error.type
    told: dict[str, object] = {"loc": list(error.loc), "msg": error.msg, "type": error.type, "url": url}
    if error.ctx:
        told["ctx"] = dict(error.ctx)
    if error.has_input:
        told["input"] = error.input
    return told


def _field_errors(error: BaseException, row: Row, message: str) -> tuple[FieldError, ...]:
    if isinstance(error, Invalid) and error.errors:
        return error.errors
    return (FieldError(_loc(error), message, row.error_type),)


def _loc(error: BaseException) -> wire.Loc:
    if isinstance(error, engine.LoraError) and error.index is not None:
        return ("body", "loras", error.index, "path")
    if isinstance(error, engine.InputError):
        return ("body", _WIRE_FIELDS.get(error.field, error.field))
    return ("body",)


def _headers(error_type: str, row: Row) -> dict[str, str]:
    return {ERROR_TYPE_HEADER: error_type, RETRY_HEADER: "true" if row.retry else "false", **row.headers}
