"""An exception as the ending of a job. Knows how a job's answer differs from a call's; the rest is the wire's table."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kontextd_models.errors import KontextdError

from kontextd_server.fetch.errors import FetchError, InputTooLarge
from kontextd_server.files.errors import FileStoreError, QuotaExceeded, StoreFull
from kontextd_server.store import Failure
from kontextd_server.wire.error_table import ANSWERS, ErrorAnswer, Row, Shape, answer
from kontextd_server.wire.errors import FieldError, InternalError, Invalid, WireError
from kontextd_server.worker.inputs import InputFailed

log = logging.getLogger(__name__)

_FULL = "the server's file store is full. Its operator must make room; send the request again after that."
_OURS = Row(500, "internal_error", public=False)
# "Not accepted, send it again" is said before a job is accepted. As a result it would bring the job back, four times.
_JOB_ANSWERS: Mapping[type[BaseException], Row] = {
    **ANSWERS,
    **{kind: _OURS for kind, row in ANSWERS.items() if row.retry},
    FetchError: Row(422, "file_download_error", Shape.LIST),
    InputTooLarge: Row(422, "file_too_large", Shape.LIST),
}


def is_expected(error: BaseException) -> bool:
    """It was raised on purpose, so whatever raised it goes on working."""
    return isinstance(error, KontextdError | WireError | InputFailed)


def failure_of(error: BaseException, request_id: str) -> Failure:
    """What the caller is told. The cause of what is not his fault goes into the log, under the request's id."""
    told = job_answer(error)
    if told.status >= 500:
        log.error("request %s failed with %d %s", request_id, told.status, told.error_type, exc_info=error)
    else:
        log.info("request %s failed with %d %s", request_id, told.status, told.error_type)
    return Failure(told.error_type, told.status, told.encoded)


def job_answer(error: BaseException) -> ErrorAnswer:
    """The answer that a failed job is given."""
    cause = error.cause if isinstance(error, InputFailed) else error
    if isinstance(cause, StoreFull | QuotaExceeded):
        return answer(InternalError(_FULL))  # its own message names folders
    if isinstance(cause, FileStoreError):  # whatever it is to a caller who uploads, here it is ours
        return answer(cause, {BaseException: _OURS})
    told = answer(cause, _JOB_ANSWERS)
    if not isinstance(error, InputFailed) or told.status != 422:
        return told
    return answer(Invalid([FieldError(error.loc, told.message, told.error_type)]))
