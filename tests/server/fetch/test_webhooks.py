"""Webhooks: refused at submit where they could not be delivered, and never led astray at delivery."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from kontextd_server.fetch import AllowList
from kontextd_server.fetch.errors import AddressDenied, DownloadFailed, DownloadTimedOut, InvalidReference
from kontextd_server.fetch.webhooks import check_webhook, post
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


def test_an_off_line_box_still_tells_its_own_network(bench: Bench, origin: Origin) -> None:
    """Off-line is about inputs; the rules for webhooks say what may be reached."""
    bench.config = replace(bench.config, offline=True)
    origin.routes["/hook"] = lambda x: x.answer(b"")
    assert post(bench.fetcher().web, origin.url("/hook"), b"", {}) == 200


def test_an_answer_without_end_does_not_hold_a_delivery(bench: Bench, origin: Origin) -> None:
    def serve(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
        exchange.pause(8)

    origin.routes["/hook"] = serve
    began = time.monotonic()
    assert post(bench.fetcher().web, origin.url("/hook"), b"", {}) == 200
    assert time.monotonic() - began < 3


def test_a_receiver_that_says_nothing_is_given_up(bench: Bench, origin: Origin) -> None:
    bench.set(total_s=0.4)
    origin.routes["/hook"] = lambda x: x.pause(8)
    with pytest.raises(DownloadTimedOut):
        post(bench.fetcher().web, origin.url("/hook"), b"", {})


def test_through_a_proxy_only_listed_hosts_are_webhooks(bench: Bench, origin: Origin) -> None:
    from kontextd_server.fetch import Proxy

    bench.set(proxy=Proxy.parse(origin.url("")), allow=AllowList.parse(["hook.test"]))
    web = bench.fetcher().web
    check_webhook(web, "https://hook.test/x")
    with pytest.raises(AddressDenied):
        check_webhook(web, "https://other.test/x")
