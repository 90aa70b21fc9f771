"""Names, addresses and certificates: what is connected to is what was checked."""

from __future__ import annotations

import base64
import threading
import time
from dataclasses import replace
from ipaddress import ip_address

import pytest
from kontextd_server.certs import CertificateFiles
from kontextd_server.fetch import AllowList, Proxy, Purpose, PurposeRules
from kontextd_server.fetch.errors import AddressDenied, DownloadFailed, DownloadTimedOut
from kontextd_server.fetch.network import system_resolver
from loopback import Bench, Origin


def test_a_name_is_resolved_once_and_connected_to_just_there(bench: Bench, origin: Origin, png: bytes) -> None:
    """DNS rebinding: the second answer, which the connection would use if it asked again, is a private address."""
    bench.names.answers["rebind.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    origin.routes["/x"] = lambda x: x.answer(png)
    assert bench.image(origin.url("/x", "rebind.test")) == png
    assert bench.names.asked == ["rebind.test"]
    assert origin.asked[0].headers["host"] == f"rebind.test:{origin.port}"


def test_each_redirect_is_resolved_and_checked_anew(bench: Bench, origin: Origin) -> None:
    bench.names.answers["rebind.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    origin.routes["/x"] = lambda x: x.answer(b"", "302 Found", Location="/y")
    with pytest.raises(AddressDenied, match=r"rebind\.test has the address 10\.0\.0\.1"):
        bench.image(origin.url("/x", "rebind.test"))
    assert len(origin.asked) == 1


def test_one_denied_address_of_a_name_is_enough(bench: Bench, origin: Origin) -> None:
    bench.names.answers["mixed.test"] = [["127.0.0.1", "10.0.0.1"]]
    with pytest.raises(AddressDenied, match=r"10\.0\.0\.1"):
        bench.image(origin.url("/x", "mixed.test"))
    assert origin.asked == []


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "[::1]", "0"]
)
def test_the_loopback_is_closed_however_it_is_written(bench: Bench, origin: Origin, host: str) -> None:
    """With the resolver of the system, which reads all of these."""
    bench.set(allow=AllowList())
    fetcher = bench.fetcher()
    fetcher.web.resolver = system_resolver
    with pytest.raises(AddressDenied, match="KONTEXTD_FETCH_ALLOW_IMAGE"):
        fetcher.fetch(origin.url("/x", host), Purpose.IMAGE, bench.into())
    assert origin.asked == []


def test_each_purpose_has_a_list_of_its_own(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    origin.routes["/x"] = lambda x: x.answer(safetensors)
    fetcher = bench.fetcher()
    fetcher.web.config = replace(fetcher.web.config, image=replace(bench.rules, allow=AllowList()))
    assert fetcher.fetch(origin.url("/x"), Purpose.LORA, bench.into()).size_bytes == len(safetensors)
    with pytest.raises(AddressDenied, match=r"'image'.*KONTEXTD_FETCH_ALLOW_IMAGE"):
        fetcher.fetch(origin.url("/x"), Purpose.IMAGE, bench.into())


def test_a_name_that_does_not_exist_is_said_so(bench: Bench) -> None:
    with pytest.raises(DownloadFailed, match=r"nowhere\.test cannot be resolved: Name or service not known"):
        bench.image("http://nowhere.test/x.png")


def test_a_name_without_an_address_is_said_so(bench: Bench) -> None:
    bench.names.answers["empty.test"] = [[]]
    with pytest.raises(DownloadFailed, match="has no address"):
        bench.image("http://empty.test/x.png")


def test_a_resolver_that_hangs_is_given_up(bench: Bench) -> None:
    bench.set(connect_s=0.2)
    released = threading.Event()
    fetcher = bench.fetcher()
    fetcher.web.resolver = lambda host, port: released.wait(60) and []
    began = time.monotonic()
    with pytest.raises(DownloadTimedOut, match="not resolved within"):
        fetcher.fetch("http://slow.test/x", Purpose.IMAGE, bench.into())
    assert time.monotonic() - began < 30
    released.set()


def test_the_next_address_of_a_name_is_tried(bench: Bench, origin: Origin, png: bytes) -> None:
    """Nobody listens at the first: only 127.0.0.1 is bound."""
    bench.names.answers["two.test"] = [["127.0.0.2", "127.0.0.1"]]
    origin.routes["/x"] = lambda x: x.answer(png)
    assert bench.image(origin.url("/x", "two.test")) == png


def test_zones_of_link_local_addresses_do_not_get_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(10, 1, 6, "", ("fe80::1%eth0", 80, 0, 2))])
    assert system_resolver("x", 80) == [ip_address("fe80::1")]


# TLS.


def test_https_is_checked_against_the_name_though_the_address_is_connected_to(
    bench: Bench, secure_origin: Origin, certificates: CertificateFiles, png: bytes
) -> None:
    secure_origin.routes["/x"] = lambda x: x.answer(png)
    bench.config = replace(bench.config, ca_bundle=certificates.ca)
    assert bench.image(secure_origin.url("/x", "studio.test")) == png
    for host in ("127.0.0.1", "other.test"):
        bench.names.answers["other.test"] = [["127.0.0.1"]]
        with pytest.raises(DownloadFailed, match="certificate is not trusted"):
            bench.image(secure_origin.url("/x", host))
    assert len(secure_origin.asked) == 1


def test_a_private_ca_is_trusted_only_where_it_is_named(bench: Bench, secure_origin: Origin) -> None:
    with pytest.raises(DownloadFailed, match=r"not trusted.*KONTEXTD_FETCH_CA_BUNDLE"):
        bench.image(secure_origin.url("/x", "studio.test"))
    assert secure_origin.asked == []


def test_a_server_without_tls_is_no_https_server(bench: Bench, origin: Origin) -> None:
    bench.set(connect_s=0.5)  # neither side says anything that the other one could refuse
    with pytest.raises(DownloadFailed):
        bench.image(origin.url("/x").replace("http:", "https:"))


# Proxies.


def through(proxy: Origin, bench: Bench, *allow: str) -> None:
    bench.set(proxy=Proxy.parse(proxy.url("").replace("//", "//us%er:pass@")), allow=AllowList.parse(allow))


def test_a_proxy_is_asked_for_listed_hosts_and_gets_its_password(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["http://assets.test/x"] = lambda x: x.answer(png)
    through(origin, bench, "assets.test")
    assert bench.image("http://assets.test/x?y=1") == png
    asked = origin.asked[0]
    assert asked.path == "http://assets.test/x?y=1"
    assert asked.headers["host"] == "assets.test"
    assert asked.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"us%er:pass").decode()
    assert bench.names.asked == []  # the proxy resolves


def test_a_proxy_is_not_asked_for_anything_else(bench: Bench, origin: Origin) -> None:
    origin.routes["http://assets.test/x"] = lambda x: x.answer(b"", "302 Found", Location="http://other.test/")
    through(origin, bench, "assets.test", "metadata.google.internal", "169.254.0.0/16")
    for url in (
        "http://other.test/",
        "http://metadata.google.internal/",
        "http://169.254.169.254/",
        "http://10.0.0.1/",
    ):
        with pytest.raises(AddressDenied):
            bench.image(url)
    assert origin.asked == []
    with pytest.raises(AddressDenied, match=r"other\.test is not listed.*through a proxy.*KONTEXTD_FETCH_ALLOW_IMAGE"):
        bench.image("http://assets.test/x")
    assert len(origin.asked) == 1


def test_https_through_a_proxy_is_a_tunnel_in_which_the_certificate_counts(
    bench: Bench, origin: Origin, secure_origin: Origin, certificates: CertificateFiles, png: bytes
) -> None:
    secure_origin.routes["/x"] = lambda x: x.answer(png)
    origin.routes[f"studio.test:{secure_origin.port}"] = lambda x: x.tunnel(secure_origin.port)
    through(origin, bench, "studio.test")
    with pytest.raises(DownloadFailed, match="not trusted"):
        bench.image(secure_origin.url("/x", "studio.test"))
    bench.config = replace(bench.config, ca_bundle=certificates.ca)
    assert bench.image(secure_origin.url("/x", "studio.test")) == png
    assert {asked.method for asked in origin.asked} == {"CONNECT"}
    assert "proxy-authorization" not in secure_origin.asked[0].headers


def test_a_proxy_that_refuses_is_said_so(bench: Bench, origin: Origin) -> None:
    origin.routes["studio.test:443"] = lambda x: x.answer(b"", "407 Proxy Authentication Required")
    through(origin, bench, "studio.test")
    with pytest.raises(DownloadFailed, match="407 Proxy Authentication Required"):
        bench.image("https://studio.test/x")


def test_a_proxy_without_a_list_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="must be listed"):
        PurposeRules(proxy=Proxy.parse("http://proxy.lan:3128"))


@pytest.mark.parametrize(
    "url", ["", "proxy.lan:3128", "socks5://proxy.lan", "http://", "http://a b", "http://u:p@@x:y"]
)
def test_a_proxy_that_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"such as http://proxy\.studio\.lan:3128"):
        Proxy.parse(url)
