"""What a failed job is answered, by table: never a status that makes clients send it again."""

from __future__ import annotations

import json

import pytest
from kontextd_models.errors import ImageTooLarge, OutOfMemory
from kontextd_server.fetch.errors import AddressDenied, InputTooLarge, NotMirrored
from kontextd_server.files.errors import FileNotHere, FileTooLarge, QuotaExceeded, StoreFull, StoreUnavailable
from kontextd_server.store import StoreUnavailable as JobStoreUnavailable
from kontextd_server.wire.error_table import ANSWERS, kept_answer
from kontextd_server.wire.errors import GenerationTimeout, NotAccepted
from kontextd_server.worker.failures import failure_of, job_answer
from kontextd_server.worker.inputs import InputFailed

LORA = ("body", "loras", 1, "path")


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (ImageTooLarge("too large", field="image"), 422, "image_too_large"),
        (OutOfMemory("out of memory"), 500, "internal_server_error"),
        (GenerationTimeout("too long"), 504, "generation_timeout"),
        (NotAccepted("going down"), 500, "internal_error"),
        (StoreUnavailable("not mounted"), 500, "internal_error"),
        (StoreFull("no room in /secret"), 507, "internal_error"),
        (QuotaExceeded("no room in /secret"), 507, "internal_error"),
        (FileTooLarge("of a result"), 500, "internal_error"),
        (JobStoreUnavailable("away"), 500, "internal_error"),
        (ValueError("/secret"), 500, "internal_error"),
        (InputFailed(LORA, AddressDenied("10.0.0.1 is private", setting="X")), 422, "file_download_error"),
        (InputFailed(LORA, NotMirrored("not mirrored")), 422, "file_download_error"),
        (InputFailed(LORA, InputTooLarge("too large")), 422, "file_too_large"),
        (InputFailed(LORA, StoreFull("no room in /secret")), 507, "internal_error"),
        (InputFailed(LORA, FileNotHere("/secret")), 500, "internal_error"),
        (InputFailed(LORA, StoreUnavailable("no room in /secret")), 500, "internal_error"),
    ],
)
def test_each_error_has_its_answer(error: Exception, status: int, error_type: str) -> None:
    failure = failure_of(error, "r1")
    assert (failure.http_status, failure.error_type) == (status, error_type)
    assert b"secret" not in failure.body
    assert failure.message == kept_answer(status, error_type, failure.body).message
    if isinstance(error, InputFailed) and status == 422:
        assert json.loads(failure.body)["detail"][0]["loc"] == list(LORA)


def test_no_job_is_ever_answered_with_a_status_that_brings_it_back() -> None:
    kinds = [kind for kind, row in ANSWERS.items() if row.retry]
    assert kinds
    assert {job_answer(kind("x")).status for kind in kinds} == {500}
