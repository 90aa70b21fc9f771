"""An exception as the ending of a job. Knows how a job's answer differs from a call's; the rest is the wire's table."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kontextd_models.errors import KontextdError

from kontextd_server.files.errors import FileStoreError, QuotaExceeded, StoreFull
from kontextd_server.store import Failure
from kontextd_server.wire.error_table import ANSWERS, OURS, ErrorAnswer, Row, answer, kept_answer, placed
from kontextd_server.wire.errors import WireError
from kontextd_server.worker.inputs import InputFailed

log = logging.getLogger(__name__)

# "Not accepted, send it again" is said before a job is accepted: as a result it would bring the job back, four times.
# What the file store says to a caller who uploads means nothing to one who edits, but that it is full.
_JOB_ANSWERS: Mapping[type[BaseException], Row] = {
    **{kind: OURS if row.retry or issubclass(kind, FileStoreError) else row for kind, row in ANSWERS.items()},
    FileStoreError: OURS,
    **{kind: ANSWERS[kind] for kind in (StoreFull, QuotaExceeded)},
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
    body = told.encoded
    return Failure(told.error_type, told.status, body, kept_answer(told.status, told.error_type, body).message)


def job_answer(error: BaseException) -> ErrorAnswer:
    """The answer that a failed job is given."""
    return answer(placed(error.cause, error.loc) if isinstance(error, InputFailed) else error, _JOB_ANSWERS)
