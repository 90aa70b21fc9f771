"""Which pages may call, on every host, with and without a key."""

from __future__ import annotations

import pytest
from kontextd_server.wire.cors import CorsSettings
from kontextd_server.wire.error_answers import answer_errors
from kontextd_server.wire.errors import AuthError
from kontextd_server.wire.front_door import DoorSettings, front_door
from kontextd_server.wire.proxy import PROXY_PATH, Lending
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

PAGE = "https://app.studio.example"
LORA = "/fal-ai/flux-kontext-lora"
URLS = [
    f"http://box:8000{PROXY_PATH}",
    f"https://fal.run{LORA}/stream",
    f"https://queue.fal.run{LORA}",
    "https://rest.fal.ai/storage/upload/initiate",
    "https://v3.fal.media/files/upload",
    f"http://box:8000/queue{LORA}/requests/r1/cancel",
]


async def locked(request: Request) -> JSONResponse:
    if "authorization" not in request.headers:
        raise AuthError("this call needs a key.")
    return JSONResponse(1 // int(request.query_params.get("divisor", "1")))


def client(*origins: str, private_network: bool = False, lending: Lending | None = None) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", locked, methods=["GET", "POST", "PUT"])])
    answer_errors(app)
    settings = DoorSettings(cors=CorsSettings(origins, private_network), lending=lending)
    return TestClient(front_door(app, settings), raise_server_exceptions=False)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_a_preflight_is_answered_without_a_key_on_every_host(url: str, method: str) -> None:
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-fal-target-url,x-fal-queue-priority",
    }
    response = client(PAGE).options(url, headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert method in response.headers["access-control-allow-methods"]
    assert "x-fal-target-url" in response.headers["access-control-allow-headers"]
    assert response.headers["x-fal-request-id"]


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
def test_an_unlisted_page_is_refused(origins: tuple[str, ...]) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    response = client(*origins).options(URLS[0], headers=asked)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(("query", "key", "status"), [("", True, 200), ("", False, 401), ("?divisor=0", True, 500)])
def test_a_page_can_read_answers_errors_and_their_causes(query: str, key: bool, status: int) -> None:
    headers = {"Origin": PAGE, **({"Authorization": "Key k"} if key else {})}
    response = client(PAGE).post(f"http://box{LORA}{query}", headers=headers)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, PAGE)
    exposed = {name.strip().lower() for name in response.headers["access-control-expose-headers"].split(",")}
    assert exposed >= {"x-fal-request-id", "x-fal-error-type", "etag"}


def test_a_page_on_the_internet_may_call_a_private_box_only_where_the_operator_says_so() -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    assert client(PAGE).options(URLS[0], headers=asked).status_code == 400
    response = client(PAGE, private_network=True).options(URLS[0], headers=asked)
    assert response.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    "origin",
    ["app.studio.example", "https://app/", "https://app/path", "HTTPS://app", "https://user@app", "ftp://app", ""],
)
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        CorsSettings((origin,))


def test_every_page_can_be_allowed() -> None:
    response = client("*").post(
        f"http://box{LORA}", headers={"Origin": "https://any.example", "Authorization": "Key k"}
    )
    assert response.headers["access-control-allow-origin"] == "*"


def test_a_page_that_a_key_is_lent_to_may_call_with_it_and_no_other_page() -> None:
    door = client(lending=Lending("lent", frozenset({PAGE})))
    for origin, status in ((PAGE, 200), ("https://other.example", 401)):
        headers = {"Origin": origin, "x-fal-target-url": f"https://fal.run{LORA}"}
        response = door.post(URLS[0], headers=headers)
        assert response.status_code == status
        assert response.headers.get("access-control-allow-origin") == (PAGE if origin == PAGE else None)
