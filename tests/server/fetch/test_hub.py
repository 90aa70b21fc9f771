"""Hub ids: refused with a remedy until they are allowed, then found as a hub lists them; tokens go nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from kontextd_server.fetch import Purpose
from kontextd_server.fetch.errors import DownloadFailed, FetchError, InvalidReference, NoHubFile, NotMirrored
from loopback import Bench, Exchange, Origin

TOKEN = "hf_topsecret"
Listing = Callable[[Iterable[str]], None]


@pytest.fixture
def online(bench: Bench, origin: Origin) -> Bench:
    bench.config = replace(bench.config, hub=origin.url(""), hub_ids=True)
    bench.set(fresh_s=60)
    return bench


@pytest.fixture
def holds(origin: Origin, safetensors: bytes) -> Listing:
    """Lets the hub's repository owner/name hold these files."""

    def serve(names: Iterable[str]) -> None:
        listing = json.dumps({"id": "owner/name", "siblings": [{"rfilename": name} for name in names]}).encode()
        origin.routes["/api/models/owner/name"] = lambda x: x.answer(listing, Content_Type="application/json")
        for name in names:
            origin.routes[f"/owner/name/resolve/main/{name.replace(' ', '%20')}"] = lambda x: x.answer(safetensors)

    return serve


def asked(origin: Origin) -> list[str]:
    return [one.path for one in origin.asked]


def test_hub_ids_are_not_fetched_until_the_operator_allows_them(bench: Bench, origin: Origin) -> None:
    bench.config = replace(bench.config, hub=origin.url(""))
    with pytest.raises(NotMirrored) as caught:
        bench.lora("owner/name")
    told = str(caught.value)
    assert "owner/name is a hub id, of which this server fetches none" in told
    assert "allow hub ids with KONTEXTD_HUB_IDS=1: kontextd mirror add owner/name FILE" in told
    assert [note.url for note in bench.mirror.missing()] == ["owner/name"]
    assert origin.asked == []


def test_off_line_no_hub_is_asked_whatever_is_allowed(online: Bench, origin: Origin) -> None:
    online.config = replace(online.config, offline=True)
    with pytest.raises(NotMirrored, match="off-line"):
        online.lora("owner/name/x.safetensors")
    assert origin.asked == []


def test_the_mirror_goes_before_the_hub(online: Bench, origin: Origin, safetensors: bytes) -> None:
    (online.folder / "w").write_bytes(safetensors)
    online.mirror.add("owner/name", online.folder / "w")
    assert online.lora("owner/name") == safetensors
    assert origin.asked == []


@pytest.mark.parametrize("file", ["x.safetensors", "sub/folder/x-1.safetensors"])
def test_a_file_that_is_named_is_that_file(
    online: Bench, origin: Origin, holds: Listing, safetensors: bytes, file: str
) -> None:
    holds([file, "other.safetensors"])
    assert online.lora(f"owner/name/{file}") == safetensors
    assert asked(origin) == [f"/owner/name/resolve/main/{file}"]


@pytest.mark.parametrize(
    ("files", "meant"),
    [
        (["README.md", "ink.safetensors", "ink.pt"], "ink.safetensors"),
        (["a b.safetensors"], "a%20b.safetensors"),
        (["step1.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
    ],
)
def test_the_only_weights_of_a_repository_are_meant(
    online: Bench, origin: Origin, holds: Listing, safetensors: bytes, files: list[str], meant: str
) -> None:
    holds(files)
    fetcher = online.fetcher()
    for _ in range(2):
        path = fetcher.fetch("owner/name", Purpose.LORA, online.into()).path
        assert path.read_bytes() == safetensors
    assert asked(origin) == ["/api/models/owner/name", f"/owner/name/resolve/main/{meant}"]  # once each


def test_of_several_one_has_to_be_named(online: Bench, holds: Listing) -> None:
    holds(["b.safetensors", "a.safetensors"])
    with pytest.raises(NoHubFile, match=r"holds 2 .* Name one: owner/name/a.safetensors, owner/name/b.safetensors\."):
        online.lora("owner/name")
    holds([f"{number:02}.safetensors" for number in range(30)])
    with pytest.raises(NoHubFile, match=r"09\.safetensors, and 20 more\.$"):
        online.lora("owner/name")
    holds(["pytorch_model.bin"])
    with pytest.raises(NoHubFile, match=r"holds no \.safetensors file"):
        online.lora("owner/name")


def test_a_file_that_no_id_can_name_is_named_by_its_url(
    online: Bench, origin: Origin, holds: Listing, safetensors: bytes
) -> None:
    holds(["ink (2).safetensors", "old/ink.safetensors"])
    with pytest.raises(NoHubFile) as caught:
        online.lora("owner/name")
    url = origin.url("/owner/name/resolve/main/ink%20%282%29.safetensors")
    assert str(caught.value).endswith(f"Name one: {url}, owner/name/old/ink.safetensors.")
    origin.routes["/owner/name/resolve/main/ink%20%282%29.safetensors"] = lambda x: x.answer(safetensors)
    assert online.lora(url) == safetensors


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"siblings": 3}', b'{"siblings": [{}]}', b"[" * 100_000])
def test_a_listing_that_is_none_is_the_hubs_failure(online: Bench, origin: Origin, body: bytes) -> None:
    origin.routes["/api/models/owner/name"] = lambda x: x.answer(body)
    with pytest.raises(DownloadFailed, match=r"gave no list of files\. Name the file"):
        online.lora("owner/name")


def test_a_listing_without_end_is_cut(online: Bench, origin: Origin) -> None:
    def serve(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            exchange.send(b" " * 2**20)

    origin.routes["/api/models/owner/name"] = serve
    with pytest.raises(DownloadFailed, match="is longer than"):
        online.lora("owner/name")


# The token.


def test_the_token_is_sent_to_the_hub_and_not_to_where_it_redirects(
    online: Bench, origin: Origin, secure_origin: Origin, holds: Listing, safetensors: bytes
) -> None:
    """As hubs do: first to another path of their own, then to a store under another name."""
    online.config = replace(online.config, hub_token=TOKEN)
    holds(["x.safetensors"])
    store = origin.url("/store", host="studio.test")  # the same server, by another name
    origin.routes["/owner/name/resolve/main/x.safetensors"] = lambda x: x.answer(b"", "307 -", Location="/cache")
    origin.routes["/cache"] = lambda x: x.answer(b"", "302 Found", Location=store)
    origin.routes["/store"] = lambda x: x.answer(b"", "302 Found", Location=origin.url("/back"))
    origin.routes["/back"] = lambda x: x.answer(safetensors)
    assert online.lora("owner/name") == safetensors
    sent = {one.path: one.headers.get("authorization") for one in origin.asked}
    bearer = f"Bearer {TOKEN}"
    assert sent == {
        "/api/models/owner/name": bearer,
        "/owner/name/resolve/main/x.safetensors": bearer,
        "/cache": bearer,
        "/store": None,
        "/back": None,  # who was redirected away does not come back with it
    }


def test_a_url_at_the_hub_is_a_url_and_gets_no_token(online: Bench, origin: Origin, safetensors: bytes) -> None:
    online.config = replace(online.config, hub_token=TOKEN)
    origin.routes["/owner/name/resolve/main/x.safetensors"] = lambda x: x.answer(safetensors)
    online.lora(origin.url("/owner/name/resolve/main/x.safetensors"))
    assert "authorization" not in origin.asked[0].headers


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
@pytest.mark.parametrize("reference", ["owner/name", "owner/name/x.safetensors"])
@pytest.mark.parametrize(
    ("token", "told"), [(None, "needs a token: KONTEXTD_HUB_TOKEN"), (TOKEN, r"\(KONTEXTD_HUB_TOKEN\) may not read it")]
)
def test_a_refusal_tells_what_would_help_and_shows_no_token(
    online: Bench, origin: Origin, status: str, reference: str, token: str | None, told: str
) -> None:
    online.config = replace(online.config, hub_token=token)
    for path in ("/api/models/owner/name", "/owner/name/resolve/main/x.safetensors"):
        origin.routes[path] = lambda x: x.answer(b"", status)
    with pytest.raises(DownloadFailed, match=told) as caught:
        online.lora(reference)
    assert TOKEN not in str(caught.value)
    assert TOKEN not in repr(online.config)


def test_an_image_has_no_hub_id(online: Bench) -> None:
    with pytest.raises(InvalidReference):
        online.image("owner/name")


def test_a_broken_download_goes_on_with_the_token(online: Bench, origin: Origin, safetensors: bytes) -> None:
    online.config = replace(online.config, hub_token=TOKEN)
    online.set(attempts=2)

    def serve(exchange: Exchange) -> None:
        head = b'HTTP/1.1 %s\r\nETag: "v1"\r\nContent-Length: %d\r\n%s\r\n'
        size = len(safetensors)
        if "range" in exchange.asked.headers:
            part = b"Content-Range: bytes 2000-%d/%d\r\n" % (size - 1, size)
            exchange.send(head % (b"206 Partial Content", size - 2000, part), safetensors[2000:])
        else:
            exchange.send(head % (b"200 OK", size, b""), safetensors[:2000])

    origin.routes["/owner/name/resolve/main/x.safetensors"] = serve
    assert online.lora("owner/name/x.safetensors") == safetensors
    assert [one.headers.get("range") for one in origin.asked] == [None, "bytes=2000-"]
    assert {one.headers["authorization"] for one in origin.asked} == {f"Bearer {TOKEN}"}


def test_an_id_cannot_lead_away_from_the_hub(online: Bench, origin: Origin) -> None:
    for reference in ("owner/name@evil.test/x", "owner/..", "../name", "owner/name/../../x", "owner/name?x", "owner"):
        with pytest.raises(FetchError):
            online.lora(reference)
    assert all(re.match(r"/(api/models/)?owner", path) for path in asked(origin))
