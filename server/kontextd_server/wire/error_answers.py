"""Exceptions as HTTP answers: the error table, for Starlette and FastAPI. Makes up no status itself."""

from __future__ import annotations

import logging

from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from kontextd_server.wire import errors
from kontextd_server.wire.error_table import ANSWERS, ErrorAnswer, answer, row_of
from kontextd_server.wire.request_ids import request_id_of
from kontextd_server.wire.validation import field_errors

log = logging.getLogger(__name__)


def error_response(error: BaseException) -> Response:
    """The answer to an exception."""
    return response_of(answer(error))


def response_of(told: ErrorAnswer) -> Response:
    """An answer as it is sent: made now, or kept in the store with a failed request."""
    return JSONResponse(told.body, told.status, dict(told.headers))


def answer_errors(app: Starlette) -> None:
    """Make an application answer every exception by the table."""
    for kind in (*ANSWERS, HTTPException, RequestValidationError, ClientDisconnect):
        if issubclass(kind, Exception):
            app.add_exception_handler(kind, _expected)
    app.add_exception_handler(Exception, _unexpected)


def _expected(request: Request, error: Exception) -> Response:
    error = _of_the_tree(request, error)
    if row_of(error).told is not None:  # the client is not told the cause
        log.error("request %s: %s failed: %s", request_id_of(request), request.method, error)
    return error_response(error)


def _unexpected(request: Request, error: Exception) -> Response:
    # Without its path, which may hold an upload grant.
    log.error("request %s: %s failed", request_id_of(request), request.method, exc_info=error)
    return error_response(error)


def _of_the_tree(request: Request, error: Exception) -> Exception:
    """What frameworks raise, in our terms."""
    if isinstance(error, RequestValidationError):
        return errors.Invalid(field_errors(error.errors()))
    if isinstance(error, ClientDisconnect):
        return errors.Cancelled("the client went away before its request was read.")
    if not isinstance(error, HTTPException):
        return error
    if error.status_code == 405:
        return errors.MethodNotAllowed(request.method, (error.headers or {}).get("Allow", "another method").split(", "))
    if error.status_code == 404:
        return errors.NotFound(f"there is nothing at {request.url.path[:200]!r}.")
    return errors.BadRequest(str(error.detail)) if error.status_code < 500 else errors.InternalError(str(error.detail))
