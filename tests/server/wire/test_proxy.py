"""The proxy protocol: what is dispatched, and that nothing else ever is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.addresses import AddressSettings
from kontextd_server.wire.errors import BadRequest
from kontextd_server.wire.hosts import HostNames
from kontextd_server.wire.proxy import PROXY_PATH, FalProxy, Lending, Target, parse_target
from kontextd_server.wire.virtual_hosts import VirtualHosts, context_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

LORA = "/fal-ai/flux-kontext-lora"
NAMES = HostNames()
PAGE = "https://app.studio.example"


async def echo(request: Request) -> JSONResponse:
    context = context_of(request)
    return JSONResponse(
        {
            "method": request.method,
            "path": request.scope["path"],
            "query": str(request.query_params),
            "body": (await request.body()).decode(),
            "headers": dict(request.headers),
            "queue": context.bases.queue,
            "proxied": context.proxied,
        }
    )


def proxy(settings: AddressSettings | None = None, lending: Lending | None = None) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT"])])
    settings = settings or AddressSettings()
    wrapped = FalProxy(VirtualHosts(app, settings), settings, lending=lending)
    return TestClient(wrapped, base_url="http://box:8000", client=("10.1.1.1", 1234))


def test_a_call_is_dispatched_with_method_body_query_and_headers() -> None:
    target = f"https://queue.fal.run{LORA}?fal_webhook=https%3A%2F%2Fhook.example%2F%3Fa%3Db"
    headers = {"x-fal-target-url": target, "authorization": "Key k", "x-fal-queue-priority": "low"}
    told = proxy().post(f"{PROXY_PATH}?ignored=1", content=b'{"prompt": "x"}', headers=headers).json()
    assert (told["method"], told["path"], told["body"]) == ("POST", f"/queue{LORA}", '{"prompt": "x"}')
    assert told["query"] == "fal_webhook=https%3A%2F%2Fhook.example%2F%3Fa%3Db"
    assert (told["headers"]["authorization"], told["headers"]["x-fal-queue-priority"]) == ("Key k", "low")
    assert "x-fal-target-url" not in told["headers"]


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_the_method_is_that_of_the_call(method: str) -> None:
    headers = {"x-fal-target-url": f"https://queue.fal.run{LORA}/requests/r1/cancel"}
    assert proxy().request(method, PROXY_PATH, headers=headers).json()["method"] == method


def test_urls_are_those_of_where_the_proxy_was_reached() -> None:
    headers = {"x-fal-target-url": f"https://queue.fal.run{LORA}"}
    told = proxy().post(PROXY_PATH, headers=headers).json()
    assert (told["queue"], told["proxied"]) == ("http://box:8000/queue", True)


def test_what_a_trusted_proxy_says_is_about_the_outer_request() -> None:
    headers = {"x-fal-target-url": f"https://queue.fal.run{LORA}", "x-forwarded-host": "studio.example"}
    told = proxy(AddressSettings(trusted_proxies=("10.1.1.1",))).post(PROXY_PATH, headers=headers).json()
    assert (told["queue"], told["path"]) == ("http://studio.example/queue", f"/queue{LORA}")


def test_a_public_url_counts_on_a_proxied_call_too() -> None:
    headers = {"x-fal-target-url": f"https://queue.fal.run{LORA}"}
    told = proxy(AddressSettings(public_url="https://studio.example/k")).post(PROXY_PATH, headers=headers).json()
    assert told["queue"] == "https://studio.example/k/queue"


def test_other_paths_are_left_alone() -> None:
    told = proxy().get("/health", headers={"x-fal-target-url": "https://elsewhere.example/"}).json()
    assert (told["path"], told["proxied"]) == ("/health", False)


@pytest.mark.parametrize(
    "target",
    [
        "https://elsewhere.example/x",
        "https://fal.run.evil.example/x",
        "https://evil-fal.run/x",
        "https://queue.box/x",
        "https://fal.run@evil.example/x",
        "https://evil.example#@fal.run/x",
        "https://evil.example\\@fal.run/x",
        "https://fal.run:8080/x",
        "https://user:secret@fal.run/x",
        "https://fal.run/x#fragment",
        "http://fal.run/x",
        "file:///etc/passwd",
        "//fal.run/x",
        "fal.run/x",
        "https://fal.run /x",
        "https://fal.run/x\ty",
        "https://fal.run/%zz",
        "https://fal.rün/x",
        "https://[fal.run]/x",
        "https://169.254.169.254/latest",
        "https://fal.run/" + "x" * 9000,
        "",
    ],
)
def test_anything_but_a_host_of_fals_is_refused(target: str) -> None:
    response = proxy().post(PROXY_PATH, headers={"x-fal-target-url": target.encode()})
    assert (response.status_code, response.json()["error_type"]) == (400, "bad_request")


def test_the_target_must_be_there_once() -> None:
    assert proxy().post(PROXY_PATH).status_code == 400
    twice = [("x-fal-target-url", f"https://fal.run{LORA}")] * 2
    assert proxy().post(PROXY_PATH, headers=twice).status_code == 400


def test_the_proxy_does_not_call_itself() -> None:
    response = proxy().post(PROXY_PATH, headers={"x-fal-target-url": f"https://fal.run{PROXY_PATH}"})
    assert response.status_code == 404


def test_an_unknown_endpoint_is_a_404_as_without_a_proxy() -> None:
    response = proxy().post(PROXY_PATH, headers={"x-fal-target-url": "https://fal.run/acme/foo"})
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("headers", "lent"),
    [
        ({"origin": PAGE}, "Key lent"),
        ({"origin": PAGE, "authorization": "Key own"}, "Key own"),
        ({"origin": "https://other.example"}, None),
        ({}, None),
    ],
)
def test_a_key_is_lent_to_listed_pages_that_bring_none(headers: dict[str, str], lent: str | None) -> None:
    client = proxy(lending=Lending("lent", frozenset({PAGE})))
    told = client.post(PROXY_PATH, headers={"x-fal-target-url": f"https://fal.run{LORA}", **headers}).json()
    assert told["headers"].get("authorization") == lent


def test_no_key_is_lent_without_the_proxy() -> None:
    client = proxy(lending=Lending("lent", frozenset({PAGE})))
    assert "authorization" not in client.post(LORA, headers={"origin": PAGE}).json()["headers"]


@given(st.one_of(st.text(), st.from_regex(r"https://[a-z.@:#?\\/]*fal\.run[a-z.@:#?\\/]*", fullmatch=True)))
def test_any_target_is_at_a_host_of_fals_or_refused(text: str) -> None:
    try:
        target = parse_target(text, NAMES)
    except BadRequest:
        return
    assert target.host in NAMES.all
    assert target.path.startswith("/")


def test_a_target_is_taken_apart_as_a_browser_would() -> None:
    text = "https://QUEUE.fal.run:443/a%20b/c?d=%26&e"
    assert parse_target(text, NAMES) == Target("queue.fal.run", "/a b/c", "d=%26&e")
