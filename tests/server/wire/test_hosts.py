"""Hosts and paths to places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.errors import BadRequest, NotFound
from kontextd_server.wire.hosts import Host, HostNames, Place, Role, parse_host, place

NAMES = HostNames()
LORA = "/fal-ai/flux-kontext-lora"


@pytest.mark.parametrize(
    ("host", "path", "role", "within"),
    [
        ("fal.run", LORA, Role.RUN, LORA),
        ("falrun.com", f"{LORA}/stream", Role.RUN, f"{LORA}/stream"),
        ("fal.run", "/health", Role.RUN, "/health"),  # our own pages are not on fal's hosts
        ("queue.fal.run", LORA, Role.QUEUE, LORA),
        ("queue.falrun.com", f"{LORA}/requests/1/status", Role.QUEUE, f"{LORA}/requests/1/status"),
        ("QUEUE.FAL.RUN:443", LORA, Role.QUEUE, LORA),
        ("queue.fal.run.", LORA, Role.QUEUE, LORA),
        ("queue.box.studio.lan:8443", LORA, Role.QUEUE, LORA),
        ("rest.fal.ai", "/tokens/", Role.REST, "/tokens/"),
        ("rest.alpha.fal.ai", "/storage/upload/initiate", Role.REST, "/storage/upload/initiate"),
        ("v3.fal.media", "/files/a/b.png", Role.FILES, "/a/b.png"),
        ("v3.fal.media", "/files/upload", Role.FILES, "/upload"),
        ("box:8000", LORA, Role.RUN, LORA),
        ("10.0.0.5", f"/queue{LORA}", Role.QUEUE, LORA),
        ("[::1]:8000", "/rest/tokens/", Role.REST, "/tokens/"),
        ("box", "/files/a/b.png", Role.FILES, "/a/b.png"),
        ("box", "/queue", Role.QUEUE, ""),
        ("box", "/queues", Role.RUN, "/queues"),
        ("box", "/health", Role.OWN, "/health"),
        ("box", "/api/fal/proxy", Role.OWN, "/api/fal/proxy"),
        ("box", "/", Role.OWN, "/"),
        ("box", "/acme/foo", Role.RUN, "/acme/foo"),
        ("rest.fal.ai", "/.well-known/jwks.json", Role.OWN, "/.well-known/jwks.json"),
        ("fal.run", "/.well-known/jwks.json", Role.OWN, "/.well-known/jwks.json"),
    ],
)
def test_the_host_comes_first_then_the_path(host: str, path: str, role: Role, within: str) -> None:
    assert place(parse_host(host), path, NAMES) == Place(role, within)


@pytest.mark.parametrize("host", ["fal.run", "queue.fal.run", "rest.fal.ai", "v3.fal.media"])
def test_every_place_has_a_path_at_a_plain_name_that_is_the_same_place(host: str) -> None:
    found = place(parse_host(host), "/files/x/y", NAMES)
    assert place(Host("box"), found.plain_path, NAMES).plain_path == found.plain_path


def test_a_name_of_the_box_may_begin_with_queue() -> None:
    names = HostNames(plain=("queue.studio.lan",))
    assert place(Host("queue.studio.lan"), LORA, names).role is Role.RUN
    assert place(Host("queue.studio.lan"), f"/queue{LORA}", names).role is Role.QUEUE


def test_the_files_host_has_only_files() -> None:
    with pytest.raises(NotFound):
        place(Host("v3.fal.media"), LORA, NAMES)


def test_dns_and_certificates_have_seven_names_to_cover() -> None:
    assert len(set(NAMES.all)) == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a/b",
        "a:b",
        "a:0",
        "a:99999",
        "user@box",
        "box:80:80",
        "[::1",
        "::1",
        "-a",
        "a\r\nx: y",
        "ü.de",
        "a" * 300,
    ],
)
def test_a_host_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_host(text)


@given(st.text())
def test_any_host_is_parsed_or_refused(text: str) -> None:
    try:
        host = parse_host(text)
    except BadRequest:
        return
    assert parse_host(str(host)) == host
    assert str(host).isascii()


@given(st.sampled_from([*NAMES.all, "box", "queue.box"]), st.text(st.characters(codec="ascii")).map("/{}".format))
def test_any_path_is_somewhere_or_not_found(host: str, path: str) -> None:
    try:
        found = place(Host(host), path, NAMES)
    except NotFound:
        assert host == "v3.fal.media"
        return
    assert found.role in Role
