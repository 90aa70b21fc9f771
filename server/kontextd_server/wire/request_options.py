"""The headers and query parameters that fal defines, as one frozen record. Knows fal's names; knows no bodies."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from starlette.datastructures import Headers, QueryParams

from kontextd_server.wire.errors import BadRequest

_MIN_START_TIMEOUT_S = 0.1  # fal's documentation; both clients refuse 1 and below
_MAX_SECONDS = 10 * 365 * 86400  # longer means "never", without overflowing anybody's clock
_HINT = re.compile(r"[\x20-\x7e]{1,200}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# What fal's gateway takes; it drops pairs that break a rule, and the request goes on.
_TAG_KEY = re.compile(r"[a-z0-9._-]{1,64}")
_TAG_VALUE = re.compile(r"[\x20-\x7e]{0,256}")
_MAX_TAGS, _RESERVED_TAGS = 10, "fal."
_MAX_HEADER = 4096


class Priority(StrEnum):
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True)
class RequestOptions:
    """How a request is to be handled.

    `start_timeout_s`: not started by then, it fails. `files_expire_s`: how long what it makes is kept; None is the
    operator's setting. `retry` False: one attempt. `store_io` False: keep no payloads.
    """

    start_timeout_s: float | None = None
    priority: Priority = Priority.NORMAL
    runner_hint: str | None = None
    retry: bool = True
    store_io: bool = True
    files_expire_s: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None


@dataclass(frozen=True)
class SubmitOptions:
    """What the query of a submit says."""

    webhook_url: str | None = None
    max_queue_length: int | None = None


def request_options(headers: Headers) -> RequestOptions:
    """Raises `BadRequest`, naming header, value and what it may be."""
    return RequestOptions(
        start_timeout_s=_start_timeout(headers),
        priority=_priority(headers),
        runner_hint=_matching(headers, "x-fal-runner-hint", _HINT, "up to 200 printable characters"),
        retry=not _flag(headers, "x-fal-no-retry", False),
        store_io=_flag(headers, "x-fal-store-io", True),
        files_expire_s=_expiration(headers, "x-fal-object-lifecycle-preference"),
        tags=_tags(_single(headers, "x-fal-tags") or ""),
        idempotency_key=_matching(headers, "idempotency-key", _IDEMPOTENCY_KEY, "up to 255 printable characters"),
    )


def upload_expiration(headers: Headers) -> float | None:
    """How long an upload is to be kept: seconds, or None. The clients send either header, or both with one value."""
    own = _expiration(headers, "x-fal-object-lifecycle")
    return own if own is not None else _expiration(headers, "x-fal-object-lifecycle-preference")


def submit_options(query: QueryParams) -> SubmitOptions:
    """Raises `BadRequest`."""
    return SubmitOptions(_webhook(query.get("fal_webhook") or None), _queue_length(query.get("fal_max_queue_length")))


def wants_logs(query: QueryParams) -> bool:
    """JavaScript sends `logs=1`, Python `logs=true`. Raises `BadRequest`."""
    return _truth("logs", query.get("logs", "0"))


def _single(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    if len(values) > 1 or any(len(value) > _MAX_HEADER for value in values):
        raise BadRequest(f"the header {name} must be there once, and be no longer than {_MAX_HEADER} characters.")
    return values[0].strip() or None if values else None


def _matching(headers: Headers, name: str, pattern: re.Pattern[str], meaning: str) -> str | None:
    value = _single(headers, name)
    if value is not None and not pattern.fullmatch(value):
        raise BadRequest(f"{name} is {value[:100]!r}; it must be {meaning}.")
    return value


def _flag(headers: Headers, name: str, default: bool) -> bool:
    value = _single(headers, name)
    return default if value is None else _truth(name, value)


def _truth(name: str, value: str) -> bool:
    if value.lower() in ("1", "true", "yes"):
        return True
    if value.lower() in ("0", "false", "no", ""):
        return False
    raise BadRequest(f"{name} is {value[:100]!r}; it must be 1 or 0.")


def _start_timeout(headers: Headers) -> float | None:
    value = _single(headers, "x-fal-request-timeout")
    if value is None:
        return None
    seconds = _number(value)
    if not seconds > _MIN_START_TIMEOUT_S:  # NaN fails too
        told = f"more than {_MIN_START_TIMEOUT_S:g} seconds"
        raise BadRequest(f"x-fal-request-timeout is {value[:100]!r}; it must be {told}.")
    return min(seconds, float(_MAX_SECONDS))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _priority(headers: Headers) -> Priority:
    value = (_single(headers, "x-fal-queue-priority") or Priority.NORMAL).lower()
    if value not in set(Priority):
        raise BadRequest(f"x-fal-queue-priority is {value[:100]!r}; it must be normal or low.")
    return Priority(value)


def _expiration(headers: Headers, name: str) -> float | None:
    """Null, 0 and absence mean no wish, as at fal. What else the object holds (access rules) has no meaning here."""
    text = _single(headers, name)
    if text is None:
        return None
    try:
        preference = json.loads(text)
    except (ValueError, RecursionError):
        preference = None
    if not isinstance(preference, dict):
        raise BadRequest(f"{name} must be an object like " + '{"expiration_duration_seconds": 3600}.')
    seconds = preference.get("expiration_duration_seconds")
    if seconds is None or seconds == 0:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise BadRequest(f"{name}: expiration_duration_seconds must be a number of seconds above 0.")
    return float(min(seconds, _MAX_SECONDS))


def _tags(text: str) -> dict[str, str]:
    """`team=design,env=prod`. A pair that breaks a rule is dropped, as at fal; of a key given twice the last counts."""
    pairs = [pair.partition("=") for pair in text.split(",")][:_MAX_TAGS]
    tags = {key.strip().lower(): value.strip() for key, equals, value in pairs if equals}
    return {
        key: value
        for key, value in tags.items()
        if _TAG_KEY.fullmatch(key) and _TAG_VALUE.fullmatch(value) and not key.startswith(_RESERVED_TAGS)
    }


def _webhook(url: str | None) -> str | None:
    """Only the form; whether the address is allowed is for the fetching part to say."""
    if url is None:
        return None
    try:
        parts = urlsplit(url[:_MAX_HEADER])
        lawful = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    except ValueError:
        lawful = False
    if not lawful or len(url) > _MAX_HEADER or not url.isprintable() or " " in url:
        raise BadRequest(f"fal_webhook is {url[:200]!r}; it must be an http or https URL without a user name.")
    return url


def _queue_length(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"fal_max_queue_length is {text[:100]!r}; it must be a whole number of at least 0.")
    return int(text)
