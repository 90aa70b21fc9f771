"""The one way to an input: which source answers, and what each does with what it should not give."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import shlex
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from kontextd_models.errors import ImageLoadError, UnsupportedImageFormat
from kontextd_server.fetch import FetchConfig, Purpose, Source
from kontextd_server.fetch.errors import (
    AddressDenied,
    FetchError,
    InputTooLarge,
    InvalidDataUri,
    InvalidReference,
    NotMirrored,
    NotWeights,
    OwnFileGone,
)
from kontextd_server.files import Label
from loopback import Bench, Origin, weights

OURS = "http://ours.test/files/"


@pytest.fixture
def offline(bench: Bench) -> Bench:
    bench.config = replace(bench.config, offline=True)
    return bench


def test_a_data_uri_is_an_image(offline: Bench, png: bytes) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    fetched = offline.fetcher().fetch(uri, Purpose.IMAGE, offline.into())
    assert fetched.path.read_bytes() == png
    assert (fetched.source, fetched.content_type) == (Source.DATA_URI, "image/png")
    assert (fetched.sha256, fetched.size_bytes) == (hashlib.sha256(png).hexdigest(), len(png))


def test_a_data_uri_has_the_limits_of_a_download(bench: Bench) -> None:
    bench.set(max_bytes=10)
    with pytest.raises(InputTooLarge):
        bench.image("data:;base64," + "A" * 1000)
    with pytest.raises(ImageLoadError, match="the data URI: the file is an HTML page"):
        bench.image("data:,<html>")
    with pytest.raises(InvalidDataUri):
        bench.image("data:;base64,???")


@pytest.mark.parametrize("purpose", [Purpose.IMAGE, Purpose.LORA])
def test_a_data_uri_is_refused_by_its_head_before_the_rest_is_decoded(bench: Bench, purpose: Purpose) -> None:
    bench.set(max_bytes=2**25)
    told: list[int] = []
    with pytest.raises((ImageLoadError, UnsupportedImageFormat, NotWeights), match="the data URI"):
        bench.fetcher().fetch("data:,%" + "%" * 4_000_000, purpose, bench.into(), lambda done, _: told.append(done))
    assert len(told) == 1
    assert 0 < told[0] < 100_000


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png,"])
def test_the_decoding_of_a_data_uri_is_told_of_and_can_be_ended(bench: Bench, png: bytes, head: str) -> None:
    bench.set(max_bytes=2**25)
    data, told = png + b"\0" * 1_000_000, list[int]()

    def progress(done: int, of: int | None) -> None:
        told.append(done)
        if stop_at is not None and done > stop_at:
            raise KeyboardInterrupt

    body = base64.b64encode(data).decode() if "base64" in head else "".join(f"%{byte:02x}" for byte in data)
    stop_at: int | None = None
    fetched = bench.fetcher().fetch(head + body, Purpose.IMAGE, bench.into(), progress)
    assert (fetched.path.read_bytes(), fetched.sha256) == (data, hashlib.sha256(data).hexdigest())
    assert told == sorted(told)
    assert told[-1] == fetched.size_bytes == len(data)
    assert max(later - earlier for earlier, later in pairwise([0, *told])) < 100_000
    stop_at = 300_000
    with pytest.raises(KeyboardInterrupt):
        bench.fetcher().fetch(head + body, Purpose.IMAGE, bench.into(), progress)
    assert told[-1] < 400_000


def test_a_file_of_ours_is_read_without_http(offline: Bench, png: bytes) -> None:
    stored = offline.files.put([png], Label("a.png", "image/png"))
    fetched = offline.fetcher().fetch(OURS + stored.key, Purpose.IMAGE, offline.into())
    assert fetched.path.read_bytes() == png
    assert (fetched.source, fetched.content_type, fetched.sha256) == (Source.OWN_FILE, "image/png", stored.sha256)
    assert offline.names.asked == []


class Cancelled(Exception):
    """What a job raises that is not wanted any more."""


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the two names are on different file systems."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("source", [Source.OWN_FILE, Source.MIRROR, Source.CACHE])
def test_a_copy_from_another_file_system_tells_how_far_it_is_and_can_be_ended(
    bench: Bench, origin: Origin, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, url = weights(3 * 2**20 + 5), origin.url("/w")
    bench.set(max_bytes=2**23, fresh_s=3600.0)
    if source is Source.OWN_FILE:
        url = OURS + bench.files.put([data], Label("w.safetensors")).key
    elif source is Source.MIRROR:
        (bench.folder / "w").write_bytes(data)
        bench.mirror.add(url, bench.folder / "w")
    else:
        origin.routes["/w"] = lambda x: x.answer(data)
        bench.lora(url)
    refuse_links(monkeypatch)
    told: list[tuple[int, int | None]] = []

    def note(done: int, of: int | None) -> None:
        told.append((done, of))

    fetched = bench.fetcher().fetch(url, Purpose.LORA, bench.into(), note)
    assert fetched.source is source
    assert fetched.path.read_bytes() == data
    size = len(data)
    assert [x for x in told if x[1]] == [(2**20, size), (2 * 2**20, size), (3 * 2**20, size), (size, size)]

    def end(done: int, _: int | None) -> None:
        if done:
            told.append((done, None))
            raise Cancelled

    told.clear()
    with pytest.raises(Cancelled):
        bench.fetcher().fetch(url, Purpose.LORA, bench.into(), end)
    assert told == [(2**20, None)]


@pytest.mark.parametrize("key", ["a" * 26 + "-x.png", "../../etc/passwd", ""])
def test_a_file_of_ours_that_is_gone_is_said_so(bench: Bench, key: str) -> None:
    with pytest.raises(OwnFileGone, match="Upload it again"):
        bench.image(OURS + key)


def test_a_file_of_ours_has_the_limits_of_a_download(bench: Bench, png: bytes) -> None:
    page = bench.files.put([b"<html>"], Label("a.safetensors"))
    with pytest.raises(NotWeights, match="an HTML page"):
        bench.lora(OURS + page.key)
    large = bench.files.put([png + bytes(2**20)], Label("a.png"))
    with pytest.raises(InputTooLarge, match="1048576"):
        bench.image(OURS + large.key)


def test_the_mirror_answers_before_the_network(bench: Bench, origin: Origin, png: bytes) -> None:
    (bench.folder / "a.png").write_bytes(png)
    url = origin.url("/a.png?v=1")
    bench.mirror.add(url, bench.folder / "a.png")
    fetched = bench.fetcher().fetch(f" {url} ", Purpose.IMAGE, bench.into())
    assert fetched.path.read_bytes() == png
    assert (fetched.source, fetched.sha256) == (Source.MIRROR, hashlib.sha256(png).hexdigest())
    assert origin.asked == []
    origin.routes["/a.png"] = lambda x: x.answer(png)
    bench.image(origin.url("/a.png?v=2"))  # another URL
    assert len(origin.asked) == 1


def test_the_mirror_serves_hub_ids_and_denied_addresses(offline: Bench, safetensors: bytes) -> None:
    (offline.folder / "w").write_bytes(safetensors)
    for reference in ("owner/name", "owner/name/style.safetensors", "http://10.0.0.1/x.safetensors"):
        offline.mirror.add(reference, offline.folder / "w")
        assert offline.lora(reference) == safetensors


@pytest.mark.parametrize(
    "reference", ["https://a.test/x.safetensors?sig='1'&b=2", "owner/name", "http://10.0.0.1/", "no url at all", ""]
)
def test_a_miss_off_line_names_url_and_command_at_once(offline: Bench, reference: str) -> None:
    began = time.monotonic()
    with pytest.raises(NotMirrored) as caught:
        offline.lora(reference)
    assert time.monotonic() - began < offline.rules.connect_s
    assert reference in str(caught.value)
    assert f"kontextd mirror add {shlex.quote(reference)} FILE" in str(caught.value)
    assert [note.url for note in offline.mirror.missing()] == [reference]
    assert offline.names.asked == []


def test_on_line_a_miss_is_no_note(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["/x"] = lambda x: x.answer(png)
    bench.image(origin.url("/x"))
    assert bench.mirror.missing() == []


def test_what_lies_in_the_mirror_must_be_what_it_is_used_as(offline: Bench) -> None:
    (offline.folder / "page").write_bytes(b"<!doctype html>")
    offline.mirror.add("https://a.test/x", offline.folder / "page")
    with pytest.raises(NotWeights, match="an HTML page"):
        offline.lora("https://a.test/x")
    with pytest.raises(ImageLoadError, match="an HTML page"):
        offline.image("https://a.test/x")


@pytest.mark.parametrize(
    "reference",
    ["", "photo.png", "/etc/passwd", "../x", "owner/name/../../x", "studio:ink", "file:///etc/passwd", "ftp://a.test/x",
     "C:\\x.png", "blob:http://a.test/1", "owner/na me", "a" * 10_000],
)  # fmt: skip
def test_what_names_nothing_is_refused(bench: Bench, reference: str) -> None:
    for purpose in (Purpose.IMAGE, Purpose.LORA):
        with pytest.raises(InvalidReference):
            bench.fetcher().fetch(reference, purpose, bench.into())


def test_a_denied_address_names_address_purpose_and_setting(bench: Bench) -> None:
    bench.names.answers["nas.studio.lan"] = [["10.0.0.5"]]
    with pytest.raises(AddressDenied) as caught:
        bench.image("http://nas.studio.lan/photo.png")
    told = str(caught.value)
    assert "nas.studio.lan" in told
    assert "10.0.0.5" in told
    assert "'image'" in told
    assert "KONTEXTD_FETCH_ALLOW_IMAGE" in told


def test_errors_of_fetching_are_one_tree() -> None:
    from kontextd_models.errors import KontextdError
    from kontextd_server.fetch import errors

    classes = [each for each in vars(errors).values() if isinstance(each, type) and each is not KontextdError]
    assert all(issubclass(each, FetchError) for each in classes)
    for each in classes:
        assert f" {each.__name__} " in f"{errors.__doc__} ".replace("\n", " ")


def test_a_ca_bundle_that_is_not_there_is_said_at_the_start(bench: Bench) -> None:
    with pytest.raises(ValueError, match="holds certificates in PEM"):
        FetchConfig(cache=bench.folder, ca_bundle=bench.folder / "nowhere.pem")
