"""The middleware, with an application of five lines behind it."""

from __future__ import annotations

import pytest
from kontextd_server.wire.addresses import AddressSettings
from kontextd_server.wire.endpoints import Action
from kontextd_server.wire.hosts import Role
from kontextd_server.wire.request_ids import RequestIds
from kontextd_server.wire.virtual_hosts import VirtualHosts, context_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

LORA = "/fal-ai/flux-kontext-lora"


async def echo(request: Request) -> JSONResponse:
    found = context_of(request)
    action = found.call.action if found.call else None
    return JSONResponse({"path": request.url.path, "role": found.role, "action": action, "bases": vars(found.bases)})


@pytest.fixture
def client() -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT"])])
    return TestClient(RequestIds(VirtualHosts(app, AddressSettings())))


@pytest.mark.parametrize(
    ("url", "path", "role", "action"),
    [
        (f"https://fal.run{LORA}/", LORA, Role.RUN, Action.RUN),
        (f"https://queue.fal.run{LORA}", f"/queue{LORA}", Role.QUEUE, Action.SUBMIT),
        (f"http://box/queue{LORA}/requests/r1/response", f"/queue{LORA}/requests/r1", Role.QUEUE, Action.RESULT),
        (
            f"https://queue.fal.run{LORA}/requests/r1/status",
            f"/queue{LORA}/requests/r1/status",
            Role.QUEUE,
            Action.STATUS,
        ),
        ("https://rest.fal.ai/tokens/", "/rest/tokens/", Role.REST, None),
        ("https://v3.fal.media/files/a%20b.png", "/files/a b.png", Role.FILES, None),
        ("http://box/health", "/health", Role.OWN, None),
    ],
)
def test_every_way_to_write_a_call_is_one_path(
    client: TestClient, url: str, path: str, role: Role, action: Action | None
) -> None:
    told = client.get(url).json()
    assert (told["path"], told["role"], told["action"]) == (path, role, action)


def test_urls_are_rendered_for_the_reader(client: TestClient) -> None:
    assert client.get(f"https://queue.fal.run{LORA}").json()["bases"]["files"] == "https://v3.fal.media"
    assert client.get("http://box:8000/health").json()["bases"]["files"] == "http://box:8000"


def test_what_is_remembered_of_one_reader_is_told_to_no_other() -> None:
    app = Starlette(routes=[Route("/{path:path}", echo)])
    hosts = VirtualHosts(app, AddressSettings(trusted_proxies=("10.0.0.0/8",)))
    readers = [
        (scheme, peer, host, headers)
        for scheme in ("http", "https")
        for peer in ("10.1.1.1", "192.0.2.7")
        for host in ("box:8000", "other", "queue.fal.run")
        for headers in (
            {},
            {"x-forwarded-proto": "https"},
            {"x-forwarded-host": "studio.example"},
            {"x-forwarded-port": "8443"},
            {"x-forwarded-prefix": "/kontext"},
        )
    ]

    def told(app: VirtualHosts, scheme: str, peer: str, host: str, headers: dict[str, str]) -> object:
        client = TestClient(app, base_url=f"{scheme}://{host}", client=(peer, 5555))
        return client.get(LORA, headers=headers).json()["bases"]

    alone = [told(VirtualHosts(app, hosts.settings), *reader) for reader in readers]
    assert [told(hosts, *reader) for reader in (*readers, *readers)] == alone * 2
    assert len({str(bases) for bases in alone}) > 10


def test_no_more_readers_are_remembered_than_fit() -> None:
    hosts = VirtualHosts(Starlette(routes=[Route("/{path:path}", echo)]), AddressSettings())
    client = TestClient(hosts)
    for number in range(1100):
        assert client.get(f"http://box-{number}/health").json()["bases"]["run"] == f"http://box-{number}"
    assert len(hosts._reached) <= 1000


@pytest.mark.parametrize("trusted", [(), ("10.0.0.0/8",)])
def test_what_is_not_believed_is_not_remembered(trusted: tuple[str, ...]) -> None:
    hosts = VirtualHosts(Starlette(routes=[Route("/{path:path}", echo)]), AddressSettings(trusted_proxies=trusted))
    client = TestClient(hosts, client=("192.0.2.7", 5555))
    for number in range(20):
        said = {f"x-forwarded-{name}": f"{number}-{name}" for name in ("proto", "host", "port", "prefix")}
        assert client.get("http://box/health", headers=said).json()["bases"]["run"] == "http://box"
    assert len(hosts._reached) == 1


def test_of_a_trusted_proxys_word_only_what_counts_is_remembered() -> None:
    settings = AddressSettings(trusted_proxies=("10.0.0.0/8",))
    hosts = VirtualHosts(Starlette(routes=[Route("/{path:path}", echo)]), settings)
    client = TestClient(hosts, client=("10.1.1.1", 5555))
    for number in range(20):  # the proxy appended to what the caller sent
        said = {"host": f"inner-{number}", "x-forwarded-host": f"evil-{number}, studio.example"}
        assert client.get("http://box/health", headers=said).json()["bases"]["run"] == "http://studio.example"
    assert len(hosts._reached) == 1


@pytest.mark.parametrize(
    ("url", "host", "status", "error_type"),
    [
        ("https://fal.run/acme/foo", None, 404, "not_found"),
        (f"https://queue.fal.run{LORA}/requests/a%00b/status", None, 404, "not_found"),
        ("https://v3.fal.media/elsewhere", None, 404, "not_found"),
        ("http://box/health", "a b", 400, "bad_request"),
    ],
)
def test_what_leads_nowhere_is_answered_here(
    client: TestClient, url: str, host: str | None, status: int, error_type: str
) -> None:
    response = client.get(url, headers={"host": host} if host else {})
    assert (response.status_code, response.json()["error_type"]) == (status, error_type)
    assert response.headers["x-fal-request-id"]


def test_an_unknown_endpoint_is_told_which_exist(client: TestClient) -> None:
    assert "fal-ai/flux-kontext-lora" in client.post("https://fal.run/fal-ai/flux-pro", json={}).json()["detail"]
