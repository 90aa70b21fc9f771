"""One download, over as many requests as its rules allow. Knows HTTP's ranges and validators; knows no cache.

Length, encoding and the first bytes are looked at as soon as they are there: what is too large or no image is not read
to its end.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus

from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.content import check_head
from kontextd_server.fetch.errors import DownloadFailed, InputTooLarge
from kontextd_server.fetch.network import Deadline
from kontextd_server.fetch.partial import HEAD_BYTES, Partial
from kontextd_server.fetch.urls import Target
from kontextd_server.fetch.web import Answer, Web

log = logging.getLogger(__name__)

# Told the bytes so far and, where it is known, of how many; 0 and None while it waits. What it raises ends the fetch.
Progress = Callable[[int, int | None], None]

_PAUSE_S = 0.25  # before the second try, doubled with each further one
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", re.ASCII)
_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Credential:
    """What is sent along to the first server alone, and what to do where that is not enough."""

    headers: Mapping[str, str]
    remedy: str


NONE = Credential({}, "No credentials are sent: use a public or a presigned URL, or upload the file here.")


@dataclass(frozen=True)
class Wanted:
    """What is downloaded for what, until when, and who is told."""

    target: Target
    purpose: Purpose
    deadline: Deadline
    progress: Progress
    credential: Credential = NONE


@dataclass(frozen=True)
class Downloaded:
    """What the server said of the body now in the `Partial`; `is_unchanged`: there is none, the old one still holds."""

    content_type: str
    etag: str | None
    last_modified: str | None
    is_unchanged: bool = False


def download(web: Web, wanted: Wanted, partial: Partial, validators: Mapping[str, str]) -> Downloaded:
    """Bring the whole of a target into `partial`, taking up what is there. Raises `FetchError` and `InputError`.

    `validators` are the fields of a conditional request, of a body that the caller still has.
    """
    attempts = web.config.rules(wanted.purpose).attempts
    for attempt in range(1, attempts + 1):
        try:
            return _once(web, wanted, partial, validators)
        except DownloadFailed as error:
            pause_s = _PAUSE_S * 2 ** (attempt - 1)
            if not error.transient or attempt == attempts or wanted.deadline.left_s() <= pause_s:
                raise
            log.warning("%s Trying again (%d of %d), from byte %d.", error, attempt + 1, attempts, partial.size_bytes)
            wanted.progress(partial.size_bytes, None)
            time.sleep(pause_s)
    raise AssertionError("there is at least one attempt")


def _once(web: Web, wanted: Wanted, partial: Partial, validators: Mapping[str, str]) -> Downloaded:
    plain = {"Accept-Encoding": "identity", **wanted.credential.headers}
    headers = {**plain, **validators}
    if partial.size_bytes and partial.etag:
        headers = {**plain, "Range": f"bytes={partial.size_bytes}-", "If-Range": partial.etag}
    with web.get(wanted.target, wanted.purpose, wanted.deadline, headers) as answer:
        said = Downloaded(answer.content_type, answer.headers.get("etag"), answer.headers.get("last-modified"))
        if answer.status == HTTPStatus.NOT_MODIFIED and validators:
            return replace(said, is_unchanged=True)
        total = _begin(answer, partial, wanted.credential)
        _receive(answer, partial, total, wanted, web.config.rules(wanted.purpose).max_bytes)
        return said


def _begin(answer: Answer, partial: Partial, credential: Credential) -> int | None:
    """Get `partial` ready for the body that follows. Returns how long the whole will be, where the server says so."""
    check_status(answer, credential)
    encoding = answer.headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise DownloadFailed(f"{answer.target} is sent compressed ({encoding}), though the plain file was asked for.")
    if answer.status != HTTPStatus.PARTIAL_CONTENT:
        partial.begin(_strong(answer.headers.get("etag")))
        length = answer.headers.get("content-length", "")
        return int(length) if length.isdigit() else None
    part = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
    if part is None or int(part[1]) != partial.size_bytes:
        partial.begin(None)
        raise DownloadFailed(f"{answer.target} answered with another part than was asked for.", transient=True)
    return int(part[2])


def check_status(answer: Answer, credential: Credential = NONE) -> None:
    """Raises `DownloadFailed` for an answer that holds no file."""
    status = answer.status
    if status in (HTTPStatus.OK, HTTPStatus.NON_AUTHORITATIVE_INFORMATION):
        return
    if status == HTTPStatus.PARTIAL_CONTENT and answer.headers.get("content-range"):
        return
    reason = next((code.phrase for code in HTTPStatus if code == status), "")
    remedy = "Check the address."
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        remedy = credential.remedy
    told = f"{answer.target} answered {status} {reason}".rstrip()
    raise DownloadFailed(f"{told}. {remedy}", transient=status in _MAY_PASS)


def _receive(answer: Answer, partial: Partial, total: int | None, wanted: Wanted, max_bytes: int) -> None:
    if total is not None and total > max_bytes:
        raise _too_large(answer, f"has {total} bytes", max_bytes)
    is_checked = False
    wanted.progress(partial.size_bytes, total)
    for chunk in answer.chunks():
        if partial.size_bytes + len(chunk) > max_bytes:
            raise _too_large(answer, "does not end there", max_bytes)
        partial.write(chunk)
        if not is_checked and len(partial.head) >= HEAD_BYTES:
            check_head(partial.head, wanted.purpose, str(answer.target))
            is_checked = True
        wanted.progress(partial.size_bytes, total)
    if total is not None and partial.size_bytes != total:
        raise DownloadFailed(f"{answer.target} broke off after {partial.size_bytes} of {total} bytes.", transient=True)
    if not is_checked:
        check_head(partial.head, wanted.purpose, str(answer.target))


def _strong(etag: str | None) -> str | None:
    """RFC 9110, 13.1.5: only a strong validator proves that two parts belong to one body."""
    return etag if etag and etag.startswith('"') else None


def _too_large(answer: Answer, what: str, max_bytes: int) -> InputTooLarge:
    return InputTooLarge(f"{answer.target} {what}; at most {max_bytes} bytes are allowed. Send a smaller file.")
