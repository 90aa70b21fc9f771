"""JSON bodies of every evil kind: read, or refused as what they are."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.error_answers import answer_errors
from kontextd_server.wire.errors import Invalid
from kontextd_server.wire.json_bodies import JsonLimits, parse_json, read_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

SMALL = JsonLimits(max_bytes=1000, max_depth=5, max_nodes=100, max_digits=20)


def refusal(data: bytes, limits: JsonLimits = SMALL) -> str:
    with pytest.raises(Invalid) as caught:
        parse_json(data, limits)
    (error,) = caught.value.errors
    assert (error.type, error.loc[0]) == ("json_invalid", "body")
    return error.msg


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"{", "expecting property name"),
        (b"[1,]", "expecting value"),
        (b"{'a': 1}", "expecting property name"),
        (b"{} {}", "extra data"),
        (b'"\n"', "invalid control character"),
        (b'{"a": NaN}', "NaN is not"),
        (b"[Infinity]", "Infinity is not"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[1e400]", "out of range"),
        (b"[-1e400]", "out of range"),
        (b"[" + b"9" * 30 + b"]", "30 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        (rb'["\ud800"]', r"half a surrogate pair (\ud800)"),
        (rb'{"\udfff": 1}', r"half a surrogate pair (\udfff)"),
        (b'["\xff"]', "not UTF-8"),
        (b'["\xed\xa0\x80"]', "not UTF-8"),
        (json.dumps(["x"]).encode("utf-16"), "not UTF-8"),
        (b"[[[[[[]]]]]]", "nested deeper than 5"),
        (b"[" * 100_000, "nested deeper than 5"),
        (b'{"a":' * 100_000, "nested deeper than 5"),
        (b"[0" + b",0" * 200 + b"]", "more than 100 values"),
        (b'{"a": [' + b"[]," * 99 + b"[]]}", "more than 100 values"),
    ],
)
def test_what_is_no_json_or_too_much_of_it_is_refused_with_the_reason(data: bytes, told: str) -> None:
    assert told in refusal(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\xef\xbb\xbf{}", {}),  # a byte order mark, as some editors write
        (rb'["\ud83d\ude00"]', ["😀"]),
        (b"[1e-400]", [0.0]),
        (b'{"a": [[[[]]]]}', {"a": [[[[]]]]}),
        (b"9007199254740993", 2**53 + 1),
        (b'{"a": "' + b"," * 90 + b'"}', {"a": "," * 90}),
    ],
)
def test_lawful_json_is_read(data: bytes, value: object) -> None:
    assert parse_json(data, SMALL) == value


def test_a_picture_of_the_allowed_size_fits_as_base64() -> None:
    limits = JsonLimits.for_files(100_000_000)
    assert limits.max_bytes > 100_000_000 * 4 / 3


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(Invalid):
        parse_json(data, SMALL)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**19)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(JSON)
def test_what_a_client_writes_is_read_as_it_was_meant(value: object) -> None:
    limits = JsonLimits()
    assert parse_json(json.dumps(value).encode(), limits) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), limits) == value


@given(st.recursive(st.floats() | st.text(st.characters()), lambda inner: st.lists(inner), max_leaves=5))
def test_whatever_is_read_can_be_sent_on(value: object) -> None:
    try:
        found = parse_json(json.dumps(value).encode(), JsonLimits())
    except Invalid:
        return
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


# Through the front door.


@pytest.fixture
def client() -> TestClient:
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse(await read_json(request, SMALL))

    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    answer_errors(app)
    return TestClient(app)


def test_the_content_type_does_not_matter(client: TestClient) -> None:
    for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/", content=b'{"a": 1}', headers={"content-type": content_type})
        assert response.json() == {"a": 1}


@pytest.mark.parametrize("body", [b"", b"  \n"])
def test_an_empty_body_is_an_empty_object(client: TestClient, body: bytes) -> None:
    assert client.post("/", content=body).json() == {}


def test_a_body_over_the_limit_is_a_413_whether_or_not_it_says_so(client: TestClient) -> None:
    def chunks() -> object:
        yield from [b" " * 600] * 2

    for content in (b" " * 1001, chunks()):
        response = client.post("/", content=content)
        assert (response.status_code, response.json()["error_type"]) == (413, "bad_request")
        assert "1000 bytes" in response.json()["detail"]


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    response = client.post("/", content=b"{}", headers={"content-encoding": "gzip"})
    assert (response.status_code, "Content-Encoding 'gzip'" in response.json()["detail"]) == (400, True)


def test_broken_json_is_a_422_with_its_position(client: TestClient) -> None:
    response = client.post("/", content=b'{"a": }')
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert entry == {
        "loc": ["body", 6],
        "msg": "the body is not valid JSON: expecting value.",
        "type": "json_invalid",
        "url": "https://docs.fal.ai/errors#json_invalid",
    }


def test_a_large_body_is_read_too() -> None:
    async def echo(request: Request) -> JSONResponse:
        value = await read_json(request, JsonLimits())
        return JSONResponse(len(value["image_url"]))  # type: ignore[index]

    client = TestClient(Starlette(routes=[Route("/", echo, methods=["POST"])]))
    assert client.post("/", json={"image_url": "A" * 2**20}).json() == 2**20
