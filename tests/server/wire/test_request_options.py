"""Headers and query parameters, as the clients send them and as nobody should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.errors import BadRequest
from kontextd_server.wire.request_options import (
    Priority,
    RequestOptions,
    SubmitOptions,
    request_options,
    submit_options,
    upload_expiration,
    wants_logs,
)
from starlette.datastructures import Headers, QueryParams

DECADE = 10 * 365 * 86400.0


def options(**headers: str) -> RequestOptions:
    return request_options(Headers({name.replace("_", "-"): value for name, value in headers.items()}))


def test_without_headers_everything_is_as_usual() -> None:
    assert options() == RequestOptions()


def test_what_the_clients_send_is_understood() -> None:
    assert options(
        x_fal_request_timeout="30.0",
        x_fal_queue_priority="low",
        x_fal_runner_hint="lora-a",
        x_fal_no_retry="yes",
        x_fal_store_io="0",
        x_fal_object_lifecycle_preference='{"expiration_duration_seconds": 3600, "initial_acl": {"default": "hide"}}',
        x_fal_tags="team=design,env=prod",
        idempotency_key="3f1c",
    ) == RequestOptions(
        start_timeout_s=30.0,
        priority=Priority.LOW,
        runner_hint="lora-a",
        retry=False,
        store_io=False,
        files_expire_s=3600.0,
        tags={"team": "design", "env": "prod"},
        idempotency_key="3f1c",
    )


@pytest.mark.parametrize(("text", "seconds"), [("1.5", 1.5), ("90", 90.0), ("1e+21", DECADE), ("inf", DECADE)])
def test_a_start_timeout_is_any_number_of_seconds(text: str, seconds: float) -> None:
    assert options(x_fal_request_timeout=text).start_timeout_s == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("{}", None),
        ('{"expiration_duration_seconds": null}', None),
        ('{"expiration_duration_seconds": 0}', None),  # fal's word for "no expiration"
        ('{"expiration_duration_seconds": 60}', 60.0),
        ('{"expiration_duration_seconds": 0.5}', 0.5),
        ('{"expiration_duration_seconds": 1e300}', DECADE),
    ],
)
def test_a_lifecycle_says_how_long_files_are_kept(text: str, seconds: float | None) -> None:
    assert options(x_fal_object_lifecycle_preference=text).files_expire_s == seconds


def test_an_upload_takes_either_lifecycle_header() -> None:
    wish = '{"expiration_duration_seconds": 60}'
    for name in ("x-fal-object-lifecycle", "x-fal-object-lifecycle-preference"):
        assert upload_expiration(Headers({name: wish})) == 60
    assert upload_expiration(Headers({})) is None


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a=b", {"a": "b"}),
        (" Team = Design Dept , env=", {"team": "Design Dept", "env": ""}),
        ("a=1,a=2", {"a": "2"}),
        ("a=b=c", {"a": "b=c"}),
        ("nonsense,=x,a b=c,fal.x=y,ok=1", {"ok": "1"}),
        (",".join(f"k{index}=v" for index in range(20)), {f"k{index}": "v" for index in range(10)}),
        ("k" * 65 + "=v,ok=1", {"ok": "1"}),
    ],
)
def test_tags_that_break_a_rule_are_dropped_as_at_fal(text: str, tags: dict[str, str]) -> None:
    assert options(x_fal_tags=text).tags == tags


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x-fal-request-timeout", "soon"),
        ("x-fal-request-timeout", "0"),
        ("x-fal-request-timeout", "-5"),
        ("x-fal-request-timeout", "nan"),
        ("x-fal-queue-priority", "high"),
        ("x-fal-runner-hint", "ü"),
        ("x-fal-runner-hint", "x" * 201),
        ("x-fal-no-retry", "perhaps"),
        ("x-fal-store-io", "2"),
        ("x-fal-object-lifecycle-preference", "3600"),
        ("x-fal-object-lifecycle-preference", "[" * 2000),
        ("x-fal-object-lifecycle-preference", "{'a': 1}"),
        ("x-fal-object-lifecycle-preference", '{"expiration_duration_seconds": -1}'),
        ("x-fal-object-lifecycle-preference", '{"expiration_duration_seconds": "1h"}'),
        ("x-fal-object-lifecycle-preference", '{"expiration_duration_seconds": true}'),
        ("x-fal-object-lifecycle-preference", '{"expiration_duration_seconds": NaN}'),
        ("idempotency-key", "a b"),
        ("idempotency-key", "x" * 256),
        ("idempotency-key", "x" * 5000),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(BadRequest, match=name):
        request_options(Headers({name: text}))


def test_a_header_that_is_there_twice_is_refused() -> None:
    twice = Headers(raw=[(b"x-fal-queue-priority", b"low"), (b"x-fal-queue-priority", b"normal")])
    with pytest.raises(BadRequest, match="once"):
        request_options(twice)


NAMES = (
    "x-fal-request-timeout",
    "x-fal-queue-priority",
    "x-fal-runner-hint",
    "x-fal-no-retry",
    "x-fal-store-io",
    "x-fal-object-lifecycle-preference",
    "x-fal-tags",
    "idempotency-key",
)


@given(st.dictionaries(st.sampled_from(NAMES), st.text(st.characters(max_codepoint=255))))
def test_any_headers_are_understood_or_refused(headers: dict[str, str]) -> None:
    try:
        found = request_options(Headers(headers))
    except BadRequest:
        return
    assert found.start_timeout_s is None or 0 < found.start_timeout_s <= DECADE


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", SubmitOptions()),
        ("fal_webhook=&fal_max_queue_length=", SubmitOptions()),
        ("fal_webhook=https%3A%2F%2Fhook.example%2F%3Fa%3Db", SubmitOptions("https://hook.example/?a=b")),
        ("fal_webhook=http://10.0.0.7:9000/h&fal_max_queue_length=0", SubmitOptions("http://10.0.0.7:9000/h", 0)),
    ],
)
def test_a_submit_says_webhook_and_queue_length_in_its_query(query: str, expected: SubmitOptions) -> None:
    assert submit_options(QueryParams(query)) == expected


@pytest.mark.parametrize(
    "query",
    [
        "fal_webhook=ftp://x/",
        "fal_webhook=hook.example",
        "fal_webhook=https://",
        "fal_webhook=https://user:secret@x/",
        "fal_webhook=https://x/a%20b",
        "fal_webhook=https://x/%0d%0aX:y",
        "fal_webhook=http://[",
        "fal_webhook=https://x/" + "y" * 5000,
        "fal_max_queue_length=-1",
        "fal_max_queue_length=1.5",
        "fal_max_queue_length=many",
        "fal_max_queue_length=" + "9" * 30,
    ],
)
def test_a_query_that_cannot_be_is_refused(query: str) -> None:
    with pytest.raises(BadRequest, match="fal_"):
        submit_options(QueryParams(query))


@pytest.mark.parametrize(
    ("query", "wanted"),
    [("", False), ("logs=0", False), ("logs=false", False), ("logs=1", True), ("logs=true", True), ("logs=True", True)],
)
def test_logs_are_asked_for_in_each_clients_way(query: str, wanted: bool) -> None:
    assert wants_logs(QueryParams(query)) is wanted


def test_another_word_for_logs_is_refused() -> None:
    with pytest.raises(BadRequest, match="logs is 'maybe'"):
        wants_logs(QueryParams("logs=maybe"))
