"""A finished job as its caller is told of it: output or failure. Knows the store's records and fal's; sends nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kontextd_models.errors import EngineError
from starlette.responses import JSONResponse, Response

from kontextd_server.store import JobState, Outcome, Result
from kontextd_server.wire import errors
from kontextd_server.wire.addresses import Bases
from kontextd_server.wire.error_answers import response_of
from kontextd_server.wire.error_table import ErrorAnswer, kept_answer
from kontextd_server.wire.outputs import StoredOutput
from kontextd_server.wire.request_ids import REQUEST_ID_HEADER

_BY_TYPE = {
    "client_cancelled": errors.Cancelled,
    "runner_disconnected": errors.RunnerDisconnected,
}


def output(result: Result, bases: Bases, *, with_report: bool) -> dict[str, object] | ErrorAnswer:
    """What the result says. Raises `StillInProgress` and `ResultGone`."""
    job = result.job
    if job.state is not JobState.COMPLETED:
        raise errors.StillInProgress
    if result.body is None:
        why = "it was of a request that leaves nothing behind" if job.transient else "it is older than results are kept"
        raise errors.ResultGone(f"the result of {job.request_id} was removed: {why}. Send the request again.")
    if job.outcome is Outcome.OK:
        return StoredOutput.from_json(json.loads(result.body)).render(bases, with_report=with_report)
    return kept_answer(job.http_status or 500, job.error_type or "internal_error", result.body)


def response(told: Mapping[str, object] | ErrorAnswer, request_id: str) -> Response:
    """As the answer to a result call, and to a sync run."""
    made = response_of(told) if isinstance(told, ErrorAnswer) else JSONResponse(told)
    made.headers[REQUEST_ID_HEADER] = request_id
    return made


def error_of(told: ErrorAnswer) -> Exception:
    """The exception whose answer this was: what breaks a stream off is raised."""
    detail = told.body.get("detail")
    if isinstance(detail, list):
        return _model_error(told, detail)
    if told.error_type == "request_timeout":
        error: errors.WireError = errors.StartTimeout(0)
        error.args = (told.message,)
        return error
    return _BY_TYPE.get(told.error_type, errors.InternalError)(told.message)


def _model_error(told: ErrorAnswer, detail: list[Any]) -> Exception:  # Any: decoded JSON
    if told.status == 422:
        return errors.Invalid([_field_error(entry) for entry in detail])
    if told.error_type == "generation_timeout":
        return errors.GenerationTimeout(told.message)
    return EngineError(told.message)


def _field_error(entry: Mapping[str, Any]) -> errors.FieldError:  # Any: decoded JSON
    return errors.FieldError(
        loc=tuple(entry["loc"]),
        msg=entry["msg"],
        type=entry["type"],
        ctx=entry.get("ctx"),
        input=entry.get("input"),
        has_input="input" in entry,
        url=entry.get("url"),
    )
