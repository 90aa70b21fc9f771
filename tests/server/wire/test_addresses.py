"""The URLs that are handed out, for every way to reach the server."""

from __future__ import annotations

import pytest
from kontextd_server.wire.addresses import (
    AddressSettings,
    Bases,
    Origin,
    bases_for,
    origin_of,
    parse_origin,
    possible_file_key,
)
from kontextd_server.wire.errors import BadRequest
from kontextd_server.wire.hosts import Host

APP = "fal-ai/flux-kontext-lora"
TRUSTING = AddressSettings(trusted_proxies=("10.0.0.0/8", "unix"))


def scope(host: str | None, scheme: str = "http", client: str | None = "10.1.1.1", **headers: str) -> dict[str, object]:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "scheme": scheme,
        "client": (client, 1234) if client else None,
        "server": ("192.0.2.1", 8000),
        "headers": [*([(b"host", host.encode())] if host else []), *raw],
    }


def bases(host: str, scheme: str = "http", settings: AddressSettings | None = None) -> Bases:
    settings = settings or AddressSettings()
    return bases_for(origin_of(scope(host, scheme), settings), settings)


@pytest.mark.parametrize(
    ("host", "scheme", "expected"),
    [
        ("box:8000", "http", ("http://box:8000", "http://box:8000/queue", "http://box:8000/rest", "http://box:8000")),
        ("box:80", "http", ("http://box", "http://box/queue", "http://box/rest", "http://box")),
        ("[::1]:8000", "http", tuple(f"http://[::1]:8000{end}" for end in ("", "/queue", "/rest", ""))),
        (
            "queue.fal.run",
            "https",
            ("https://fal.run", "https://queue.fal.run", "https://rest.fal.ai", "https://v3.fal.media"),
        ),
        (
            "falrun.com",
            "https",
            ("https://falrun.com", "https://queue.falrun.com", "https://rest.fal.ai", "https://v3.fal.media"),
        ),
        (
            "rest.alpha.fal.ai",
            "https",
            ("https://fal.run", "https://queue.fal.run", "https://rest.alpha.fal.ai", "https://v3.fal.media"),
        ),
        (
            "v3.fal.media:8443",
            "https",
            tuple(f"https://{name}:8443" for name in ("fal.run", "queue.fal.run", "rest.fal.ai", "v3.fal.media")),
        ),
        ("queue.box", "https", ("https://box", "https://queue.box", "https://box/rest", "https://box")),
    ],
)
def test_urls_are_at_the_host_the_reader_used_or_its_sisters(host: str, scheme: str, expected: tuple[str, ...]) -> None:
    found = bases(host, scheme)
    assert (found.run, found.queue, found.rest, found.files) == expected


@pytest.mark.parametrize("host", ["box", "queue.fal.run"])
def test_a_public_url_counts_before_everything(host: str) -> None:
    found = bases(host, settings=AddressSettings(public_url="https://studio.example:443/kontext/"))
    assert (found.queue, found.files) == ("https://studio.example/kontext/queue", "https://studio.example/kontext")


def test_a_trusted_proxy_says_how_the_reader_came() -> None:
    said = scope(
        "inner:9", x_forwarded_proto="https", x_forwarded_host="studio.example", x_forwarded_prefix="/kontext/"
    )
    assert str(origin_of(said, TRUSTING)) == "https://studio.example/kontext"
    said = scope("inner:9", x_forwarded_host="studio.example", x_forwarded_port="8443", x_forwarded_proto="https")
    assert str(origin_of(said, TRUSTING)) == "https://studio.example:8443"


@pytest.mark.parametrize(
    ("client", "trusted"),
    [
        ("10.1.1.1", True),
        ("::ffff:10.1.1.1", True),
        (None, True),
        ("11.1.1.1", False),
        ("2001:db8::1", False),
        ("x", False),
    ],
)
def test_others_are_not_believed(client: str | None, trusted: bool) -> None:
    said = scope("box", client=client, x_forwarded_host="evil.example", x_forwarded_proto="https")
    assert (str(origin_of(said, TRUSTING)) == "https://evil.example") is trusted
    assert str(origin_of(said, AddressSettings())) == "http://box"


def test_of_several_values_the_nearest_proxys_counts() -> None:
    said = scope("box", x_forwarded_host="evil.example, studio.example", x_forwarded_proto="http, https")
    assert str(origin_of(said, TRUSTING)) == "https://studio.example"
    added = [(b"x-forwarded-host", name) for name in (b"evil.example", b"other, studio.example ")]
    assert str(origin_of(scope("box") | {"headers": added}, TRUSTING)) == "http://studio.example"


@pytest.mark.parametrize(
    "said", [{"x_forwarded_proto": "ftp"}, {"x_forwarded_host": "a b"}, {"x_forwarded_prefix": '/a"b'}, {"host": "a/b"}]
)
def test_an_address_that_is_none_is_refused(said: dict[str, str]) -> None:
    with pytest.raises(BadRequest):
        origin_of(scope(said.pop("host", "box"), **said), TRUSTING)


@pytest.mark.parametrize("hosts", [("box", "box"), ("box", "evil.example")])
def test_two_hosts_are_one_too_many(hosts: tuple[str, str]) -> None:
    said = scope(None) | {"headers": [(b"host", name.encode()) for name in hosts]}
    for settings in (AddressSettings(), AddressSettings(public_url="https://studio.example"), TRUSTING):
        with pytest.raises(BadRequest, match=f"Host is there 2 times: {hosts[0]!r}, {hosts[1]!r}"):
            origin_of(said, settings)


def test_without_a_host_the_servers_own_address_is_used() -> None:
    assert str(origin_of(scope(None), AddressSettings())) == "http://192.0.2.1:8000"


@pytest.mark.parametrize(
    "url", ["box", "ftp://box", "https://", "https://box/a?b", "https://user@box", "https://box/a b"]
)
def test_a_public_url_that_is_none_is_refused_at_start(url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        AddressSettings(public_url=url)


def test_a_proxy_that_is_no_network_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.300"):
        AddressSettings(trusted_proxies=("10.0.0.300",))


def test_a_request_has_three_urls_and_a_file_one_without_a_query() -> None:
    found = bases("box:8000")
    assert found.request_urls(APP, "r1") == {
        "response_url": f"http://box:8000/queue/{APP}/requests/r1",
        "status_url": f"http://box:8000/queue/{APP}/requests/r1/status",
        "cancel_url": f"http://box:8000/queue/{APP}/requests/r1/cancel",
    }
    assert found.file_url("ab/c?d é.png") == "http://box:8000/files/ab/c%3Fd%20%C3%A9.png"


@pytest.mark.parametrize("text", ["http://box:8000", "https://queue.fal.run", "https://[::1]:1/a/b"])
def test_a_webhook_uses_the_address_kept_at_submit(text: str) -> None:
    assert str(parse_origin(text)) == text


def test_a_file_of_ours_is_recognised_by_whichever_name_it_was_uploaded() -> None:
    key = "ab/c?d é.png"
    for origin in (
        Origin("http", Host("box", 8000)),
        Origin("https", Host("v3.fal.media")),
        Origin("https", Host("x"), "/k"),
    ):
        assert possible_file_key(bases_for(origin, AddressSettings()).file_url(key)) == key


@pytest.mark.parametrize(
    "url",
    [
        "https://x/a.png",
        "https://x/files/",
        "https://x/files/a?b=c",
        "data:image/png;base64,AA",
        "org/model",
        "",
        "//[",
    ],
)
def test_what_cannot_be_a_file_of_ours_is_none(url: str) -> None:
    assert possible_file_key(url) is None
