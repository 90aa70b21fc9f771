"""Webhooks: refused at submit where they could not be delivered, and never led astray at delivery."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest
from kontextd_server.fetch import WEBHOOK_RULES, AllowList
from kontextd_server.fetch.errors import AddressDenied, DownloadFailed, DownloadTimedOut, InvalidReference
from kontextd_server.fetch.webhooks import check_webhook, post
from kontextd_server.wire.webhooks import TIMEOUT_S
from loopback import Bench, Exchange, Origin


def test_a_webhook_is_posted_with_its_body_and_fields(bench: Bench, origin: Origin) -> None:
    origin.routes["/hook"] = lambda x: x.answer(b"thanks", "202 Accepted")
    web = bench.fetcher().web
    check_webhook(web, origin.url("/hook?x=1"))
    assert origin.asked == []
    assert post(web, origin.url("/hook?x=1"), b'{"status": "OK"}', {"Content-Type": "application/json"}) == 202
    asked = origin.asked[0]
    assert (asked.method, asked.path) == ("POST", "/hook?x=1")
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["content-length"] == "16"


def test_a_redirect_is_an_answer_and_not_followed(bench: Bench, origin: Origin) -> None:
    origin.routes["/hook"] = lambda x: x.answer(b"", "302 Found", Location="/other")
    assert post(bench.fetcher().web, origin.url("/hook"), b"", {}) == 302
    assert len(origin.asked) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://hook.lan/", "http://169.254.169.254/", "http://[::1]/"])
def test_a_denied_webhook_is_refused_at_submit_and_at_delivery(bench: Bench, url: str) -> None:
    bench.set(allow=AllowList())
    bench.names.answers["hook.lan"] = [["192.168.0.9"]]
    web = bench.fetcher().web
    with pytest.raises(AddressDenied, match="webhook"):
        check_webhook(web, url)
    with pytest.raises(AddressDenied, match="webhook"):
        post(web, url, b"", {})


def test_a_webhook_that_moves_after_submit_is_refused_at_delivery(bench: Bench, origin: Origin) -> None:
    bench.names.answers["hook.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    web = bench.fetcher().web
    check_webhook(web, origin.url("/", "hook.test"))
    with pytest.raises(AddressDenied):
        post(web, origin.url("/", "hook.test"), b"", {})
    assert origin.asked == []


@pytest.mark.parametrize("url", ["", "hook.test", "ftp://hook.test/", "data:,x", "http://u:p@hook.test/"])
def test_what_is_no_url_is_no_webhook(bench: Bench, url: str) -> None:
    with pytest.raises(InvalidReference):
        check_webhook(bench.fetcher().web, url)


def test_an_unknown_name_is_no_webhook(bench: Bench) -> None:
    with pytest.raises(DownloadFailed, match="cannot be resolved"):
        check_webhook(bench.fetcher().web, "http://nowhere.test/")


def test_an_off_line_box_still_tells_what_its_operator_listed(bench: Bench, origin: Origin) -> None:
    bench.config = replace(bench.config, offline=True)
    origin.routes["/hook"] = lambda x: x.answer(b"")
    web = bench.fetcher().web
    check_webhook(web, origin.url("/hook"))
    assert post(web, origin.url("/hook"), b"", {}) == 200


@pytest.mark.parametrize(
    ("address", "allow", "open_to_it"),
    [
        ("93.184.216.34", [], False),  # public
        ("93.184.216.34", ["hook.test"], True),
        ("93.184.216.34", ["93.184.0.0/16"], True),
        ("192.168.0.9", [], False),
        ("192.168.0.9", ["192.168.0.0/24"], True),
        ("192.168.0.9", ["*.test"], True),
        ("127.0.0.1", ["hook.test"], False),
        ("169.254.169.254", ["hook.test", "0.0.0.0/0"], False),
    ],
)
def test_an_off_line_box_tells_nobody_else(bench: Bench, address: str, allow: list[str], open_to_it: bool) -> None:
    bench.config = replace(bench.config, offline=True)
    bench.set(allow=AllowList.parse(allow))
    bench.names.answers["hook.test"] = [[address]]
    web = bench.fetcher().web
    if open_to_it:
        check_webhook(web, "https://hook.test/x")
        return
    with pytest.raises(AddressDenied, match="'webhook'"):
        check_webhook(web, "https://hook.test/x")
    with pytest.raises(AddressDenied):
        post(web, "https://hook.test/x", b"", {})


def test_a_public_webhook_is_refused_off_line_with_the_setting_that_opens_it(bench: Bench) -> None:
    bench.config = replace(bench.config, offline=True)
    bench.names.answers["hook.test"] = [["93.184.216.34"]]
    with pytest.raises(AddressDenied, match=r"off-line.* adding hook.test or 93.184.216.34 to KONTEXTD_FETCH_ALLOW_W"):
        check_webhook(bench.fetcher().web, "https://hook.test/x")


def test_a_receiver_may_take_fals_fifteen_seconds() -> None:
    assert (WEBHOOK_RULES.idle_s, WEBHOOK_RULES.total_s) == (TIMEOUT_S, TIMEOUT_S)


def test_an_answer_without_end_does_not_hold_a_delivery(bench: Bench, origin: Origin) -> None:
    def serve(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
        exchange.pause(exchange.for_ever_s)

    origin.routes["/hook"] = serve
    began = time.monotonic()
    assert post(bench.fetcher().web, origin.url("/hook"), b"", {}) == 200
    assert time.monotonic() - began < bench.rules.idle_s


def test_a_receiver_that_says_nothing_is_given_up(bench: Bench, origin: Origin) -> None:
    bench.set(total_s=0.4)
    origin.routes["/hook"] = lambda x: x.pause(x.for_ever_s)
    with pytest.raises(DownloadTimedOut):
        post(bench.fetcher().web, origin.url("/hook"), b"", {})


def test_a_receiver_that_reads_slowly_but_steadily_is_given_up_in_time(bench: Bench, origin: Origin) -> None:
    size_bytes, read_bytes = 40_000_000, [0]

    def read_slowly(exchange: Exchange) -> None:
        while came := exchange.handler.rfile.read1(2**16):
            read_bytes[0] += len(came)
            exchange.pause(0.02)

    origin.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
    origin.routes["/hook"] = read_slowly
    bench.set(total_s=1.0)
    with pytest.raises(DownloadTimedOut, match="longer than the 1 s allowed"):
        post(bench.fetcher().web, origin.url("/hook"), bytes(size_bytes), {})
    assert read_bytes[0] < size_bytes / 2


def test_through_a_proxy_only_listed_hosts_are_webhooks(bench: Bench, origin: Origin) -> None:
    from kontextd_server.fetch import Proxy

    bench.set(proxy=Proxy.parse(origin.url("")), allow=AllowList.parse(["hook.test"]))
    web = bench.fetcher().web
    check_webhook(web, "https://hook.test/x")
    with pytest.raises(AddressDenied):
        check_webhook(web, "https://other.test/x")
