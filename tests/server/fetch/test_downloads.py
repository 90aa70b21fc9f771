"""Downloads from servers that behave, that do not know how, and that mean harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from kontextd_models.errors import ImageLoadError, UnsupportedImageFormat
from kontextd_server.fetch import Purpose, Source
from kontextd_server.fetch.errors import (
    AddressDenied,
    DownloadFailed,
    DownloadTimedOut,
    FetchError,
    InputTooLarge,
    InvalidReference,
    NotWeights,
)
from kontextd_server.files.errors import StoreUnavailable
from loopback import Bench, Exchange, Origin

OK = b"HTTP/1.1 200 OK\r\n"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>" + b" " * 3000


def test_an_image_is_downloaded_with_what_its_server_says(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["/a b.png"] = origin.routes["/a%20b.png"] = lambda x: x.answer(png, Content_Type="image/png")
    into = bench.into()
    told: list[tuple[int, int | None]] = []
    fetched = bench.fetcher().fetch(
        origin.url("/a b.png?x=1"), Purpose.IMAGE, into, lambda *numbers: told.append(numbers)
    )
    seen = [numbers for numbers in told if numbers != (0, None)]  # which is told while the server takes its time
    assert into.read_bytes() == png
    assert (fetched.path, fetched.size_bytes, fetched.content_type) == (into, len(png), "image/png")
    assert fetched.source is Source.NETWORK
    assert seen[0] == (0, len(png))
    assert seen[-1] == (len(png), len(png))
    assert origin.asked[0].path == "/a%20b.png?x=1"
    assert bench.leftovers() == []


def test_nothing_of_ours_is_sent_along(
    bench: Bench, origin: Origin, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cookies, though the server sets one; no credentials; no proxy, though the environment names one."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", "/dev/null")
    origin.routes["/set"] = lambda x: x.answer(b"", "302 Found", Location="/a.png", Set_Cookie="id=1; Path=/")
    origin.routes["/a.png"] = lambda x: x.answer(png)
    assert bench.image(origin.url("/set")) == png
    for asked in origin.asked:
        assert set(asked.headers) == {"host", "user-agent", "accept", "accept-encoding"}
        assert asked.headers["accept-encoding"] == "identity"
        assert asked.headers["host"] == f"127.0.0.1:{origin.port}"


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream", "video/mp4", None])
def test_a_lying_content_type_proves_nothing(bench: Bench, origin: Origin, png: bytes, kind: str | None) -> None:
    origin.routes["/x"] = lambda x: x.answer(png, **({"Content_Type": kind} if kind else {}))
    assert bench.image(origin.url("/x")) == png


def test_a_body_in_chunks_and_one_that_ends_with_the_connection(bench: Bench, origin: Origin, png: bytes) -> None:
    half = len(png) // 2
    origin.routes["/chunks"] = lambda x: x.send(
        OK + b"Transfer-Encoding: chunked\r\n\r\n",
        *(b"%x\r\n%b\r\n" % (len(part), part) for part in (png[:half], png[half:])),
        b"0\r\n\r\n",
    )
    origin.routes["/close"] = lambda x: x.send(OK + b"\r\n", png)
    assert bench.image(origin.url("/chunks")) == bench.image(origin.url("/close")) == png


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        (PAGE, ImageLoadError, "is an HTML page, not an image"),
        (b"<html>", ImageLoadError, "is an HTML page, not an image"),
        (b'{"detail": "no"}', ImageLoadError, "is JSON text"),
        (b"", ImageLoadError, "empty"),
        (b"%PDF-1.7 ...", UnsupportedImageFormat, "PDF"),
        (b"<svg xmlns='x'></svg>", UnsupportedImageFormat, "SVG"),
        (b"\x00" * 2000, ImageLoadError, "not an image"),
        (b"PK\x03\x04" + bytes(5000), UnsupportedImageFormat, "ZIP"),
    ],
)
def test_what_is_no_image_is_said_to_be_what_it_is(
    bench: Bench, origin: Origin, body: bytes, error: type[Exception], told: str
) -> None:
    origin.routes["/x.png"] = lambda x: x.answer(body, Content_Type="image/png")
    with pytest.raises(error, match=told) as caught:
        bench.image(origin.url("/x.png?sig=secret"))
    assert origin.url("/x.png") in str(caught.value)
    assert "secret" not in str(caught.value)
    assert bench.leftovers() == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (PAGE, "an HTML page, not a safetensors file.*/resolve/"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(2000), "pickled checkpoint"),
        (b"\x80\x02}q\x00", "pickled checkpoint"),
        (b'{"error": "gated"}', "JSON text"),
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n", "begins with 89 50"),
    ],
)
def test_what_are_no_weights_is_said_to_be_what_it_is(bench: Bench, origin: Origin, body: bytes, told: str) -> None:
    origin.routes["/x.safetensors"] = lambda x: x.answer(body, ETag='"1"')
    with pytest.raises(NotWeights, match=told):
        bench.lora(origin.url("/x.safetensors"))
    assert bench.leftovers() == []


def test_a_page_is_not_read_to_its_end(bench: Bench, origin: Origin) -> None:
    """The first kilobyte says what it is; the rest of what claims to be a gigabyte never comes."""
    bench.set(max_bytes=2**31)

    def serve(x: Exchange) -> None:
        x.send(OK + b"Content-Length: 1000000000\r\n\r\n" + PAGE)
        x.pause(x.for_ever_s)

    origin.routes["/x"] = serve
    began = time.monotonic()
    with pytest.raises(NotWeights):
        bench.lora(origin.url("/x"))
    assert time.monotonic() - began < bench.rules.idle_s


# Size.


def test_a_file_that_says_it_is_too_large_is_not_begun(bench: Bench, origin: Origin, png: bytes) -> None:
    def serve(x: Exchange) -> None:
        x.send(OK + b"Content-Length: 2000000\r\n\r\n" + png)
        x.pause(x.for_ever_s)

    origin.routes["/x"] = serve
    began = time.monotonic()
    with pytest.raises(InputTooLarge, match="has 2000000 bytes; at most 1048576"):
        bench.image(origin.url("/x"))
    assert time.monotonic() - began < bench.rules.idle_s


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked\r\n", b""])
def test_a_file_that_does_not_end_is_cut(bench: Bench, origin: Origin, png: bytes, head: bytes) -> None:
    def serve(x: Exchange) -> None:
        x.send(OK + head + b"\r\n")
        block = png + bytes(65536 - len(png))
        for _ in range(100):  # the client goes after a mebibyte
            x.send(b"%x\r\n%b\r\n" % (len(block), block) if head else block)

    origin.routes["/x"] = serve
    with pytest.raises(InputTooLarge, match="at most 1048576 bytes"):
        bench.image(origin.url("/x"))
    assert bench.leftovers() == []


def test_a_compressed_body_is_refused_rather_than_unpacked(bench: Bench, origin: Origin) -> None:
    """Where a bomb would go off; nothing asked for compression."""
    origin.routes["/x"] = lambda x: x.answer(b"\x1f\x8b" + bytes(100), Content_Encoding="gzip")
    with pytest.raises(DownloadFailed, match="compressed"):
        bench.image(origin.url("/x"))


def test_headers_without_end_are_cut(bench: Bench, origin: Origin) -> None:
    def serve(x: Exchange) -> None:
        x.send(OK)
        for number in range(4000):
            x.send(b"X-%d: " % number + b"x" * 100 + b"\r\n")

    origin.routes["/x"] = serve
    with pytest.raises(DownloadFailed):
        bench.image(origin.url("/x"))


def test_provisional_answers_without_end_run_into_the_deadline(bench: Bench, origin: Origin) -> None:
    bench.set(total_s=0.6)

    def serve(x: Exchange) -> None:
        while not x.stopped.is_set():
            x.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            x.pause(0.02)

    origin.routes["/x"] = serve
    with pytest.raises(DownloadTimedOut, match=r"longer than the 0\.6 s"):
        bench.image(origin.url("/x"))


# Length.


@pytest.mark.parametrize(
    "head", [b"Content-Length: 9000\r\n", b"Transfer-Encoding: chunked\r\n", b'Content-Length: 9000\r\nETag: W/"1"\r\n']
)
def test_a_truncated_body_is_no_file(bench: Bench, origin: Origin, png: bytes, head: bytes) -> None:
    origin.routes["/x"] = lambda x: x.send(OK + head + b"\r\n", b"2000\r\n" * (b"chunked" in head) + png[:4000])
    with pytest.raises(DownloadFailed, match="cannot be read"):
        bench.image(origin.url("/x"))


def test_a_length_that_is_too_short_cuts_the_file(bench: Bench, origin: Origin, png: bytes) -> None:
    """What comes after it is not of this answer; that the picture is half a picture, its reader says."""
    origin.routes["/x"] = lambda x: x.send(OK + b"Content-Length: 2000\r\n\r\n" + png)
    assert bench.image(origin.url("/x")) == png[:2000]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e3\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_an_error_of_the_download(bench: Bench, origin: Origin, answer: bytes) -> None:
    origin.routes["/x"] = lambda x: x.send(answer)
    with pytest.raises(DownloadFailed):
        bench.image(origin.url("/x"))


# Time.


def test_a_server_that_says_nothing_is_given_up(bench: Bench, origin: Origin) -> None:
    bench.set(idle_s=0.3)
    origin.routes["/x"] = lambda x: x.pause(x.for_ever_s)
    with pytest.raises(DownloadTimedOut, match=r"did not answer for 0\.3 s"):
        bench.image(origin.url("/x"))


def test_a_server_that_drips_is_given_up(bench: Bench, origin: Origin, png: bytes) -> None:
    """Each byte comes in time, and the whole would take minutes."""
    bench.set(total_s=0.7)

    def serve(x: Exchange) -> None:
        x.send(OK + b"Content-Length: %d\r\n\r\n" % len(png))
        for at in range(len(png)):
            x.send(png[at : at + 1])
            x.pause(0.02)

    origin.routes["/x"] = serve
    began = time.monotonic()
    with pytest.raises(DownloadTimedOut, match=r"longer than the 0\.7 s allowed"):
        bench.image(origin.url("/x"))
    assert time.monotonic() - began < bench.rules.idle_s


def test_redirects_and_repetitions_share_one_deadline(bench: Bench, origin: Origin) -> None:
    bench.set(total_s=0.8, attempts=500, max_redirects=500)

    def serve(x: Exchange) -> None:
        x.pause(0.1)
        x.answer(b"", "302 Found", Location=f"/x?{len(origin.asked)}")

    origin.routes["/x"] = serve
    began = time.monotonic()
    with pytest.raises(DownloadTimedOut):
        bench.image(origin.url("/x"))
    assert time.monotonic() - began < bench.rules.idle_s


def test_nobody_listens(bench: Bench, origin: Origin) -> None:
    origin.close()
    with pytest.raises(DownloadFailed, match="refused"):
        bench.image(origin.url("/x"))


# Redirects.


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed(bench: Bench, origin: Origin, png: bytes, status: str) -> None:
    origin.routes["/from"] = lambda x: x.answer(b"go on", status, Location="to?x=1")
    origin.routes["/to"] = lambda x: x.answer(png)
    assert bench.image(origin.url("/from")) == png
    assert [asked.path for asked in origin.asked] == ["/from", "/to?x=1"]


def test_redirects_come_to_an_end(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["/loop"] = lambda x: x.answer(b"", "302 Found", Location="/loop")
    with pytest.raises(DownloadFailed, match="more than 5 redirects"):
        bench.image(origin.url("/loop"))
    assert len(origin.asked) == 6


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/x",
        "http://192.168.1.1:8080/",
        "http://[::1]/",
        "http://[::ffff:192.168.0.1]/",
        "http://0/",
        "http://0x0a000001/",
        "http://167772161/",
        "http://012.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://metadata.google.internal/",
        "http://inside.test/",
        "//10.0.0.1/x",
    ],
)
def test_a_redirect_into_private_space_is_refused(bench: Bench, origin: Origin, location: str) -> None:
    bench.names.answers["inside.test"] = [["10.0.0.7"]]
    # inet_aton(3) reads these as addresses, and so does getaddrinfo(3).
    bench.names.answers["0"] = [["0.0.0.0"]]
    bench.names.answers |= {host: [["10.0.0.1"]] for host in ("0x0a000001", "167772161", "012.0.0.1")}
    origin.routes["/x"] = lambda x: x.answer(b"", "302 Found", Location=location)
    with pytest.raises(AddressDenied):
        bench.image(origin.url("/x"))
    assert len(origin.asked) == 1


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "http://[", "x:y"]
)
def test_a_redirect_to_another_scheme_is_refused(bench: Bench, origin: Origin, location: str) -> None:
    origin.routes["/x"] = lambda x: x.answer(b"", "302 Found", Location=location)
    with pytest.raises(InvalidReference):
        bench.image(origin.url("/x"))


def test_a_redirect_without_a_target_is_an_error(bench: Bench, origin: Origin) -> None:
    origin.routes["/x"] = lambda x: x.answer(b"", "302 Found")
    with pytest.raises(DownloadFailed, match="302"):
        bench.image(origin.url("/x"))


# Answers that are no file.


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("404 Not Found", "answered 404 Not Found. Check the address"),
        ("401 Unauthorized", "No credentials are sent"),
        ("403 Forbidden", "presigned"),
        ("418 I'm a Teapot", "418"),
        ("599 Strange", "answered 599"),
        ("204 No Content", "204"),
        ("206 Partial Content", "206"),
        ("304 Not Modified", "304"),
    ],
)
def test_an_answer_that_is_no_file_is_told(bench: Bench, origin: Origin, status: str, told: str) -> None:
    origin.routes["/x"] = lambda x: x.answer(b"" if status[0] == "3" or status[:3] == "204" else b"nothing", status)
    with pytest.raises(DownloadFailed, match=told):
        bench.image(origin.url("/x"))
    assert len(origin.asked) == 1


def test_a_busy_server_is_asked_again_and_not_for_ever(bench: Bench, origin: Origin, png: bytes) -> None:
    bench.set(attempts=3)
    origin.routes["/x"] = lambda x: x.answer(png) if len(origin.asked) == 3 else x.answer(b"", "503 Busy")
    assert bench.image(origin.url("/x")) == png
    origin.asked.clear()
    origin.routes["/y"] = lambda x: x.answer(b"", "502 Bad Gateway")
    with pytest.raises(DownloadFailed, match="502"):
        bench.image(origin.url("/y"))
    assert len(origin.asked) == 3


# Who asks at the same time.


def together(work: Callable[[], object], count: int) -> list[object]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except FetchError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_who_ask_for_one_url_at_once_share_one_download(bench: Bench, origin: Origin, png: bytes) -> None:
    waiting: set[int] = set()

    def serve(x: Exchange) -> None:
        while len(waiting) < 7 and not x.stopped.is_set():
            x.pause(0.01)
        x.answer(png)

    def note(*_: object) -> None:
        waiting.add(threading.get_ident())

    def ask() -> bytes:
        return bench.fetcher().fetch(origin.url("/x"), Purpose.IMAGE, bench.into(), note).path.read_bytes()

    origin.routes["/x"] = serve
    assert together(ask, 7) == [png] * 7
    assert len(origin.asked) == 1
    assert bench.image(origin.url("/x")) == png  # but an image is never older than the request
    assert len(origin.asked) == 2


def test_whoever_waits_for_a_download_can_give_up(bench: Bench, origin: Origin, png: bytes) -> None:
    begun, given_up = threading.Event(), threading.Event()

    def serve(x: Exchange) -> None:
        begun.set()
        given_up.wait(60)
        x.answer(png)

    class Cancelled(Exception):
        pass

    def cancel(received: int, total: int | None) -> None:
        raise Cancelled

    origin.routes["/x"] = serve
    first = threading.Thread(target=lambda: bench.image(origin.url("/x")))
    first.start()
    assert begun.wait(60)
    with pytest.raises(Cancelled):
        bench.fetcher().fetch(origin.url("/x"), Purpose.IMAGE, bench.into(), cancel)
    given_up.set()
    first.join(60)
    assert len(origin.asked) == 1


def test_a_cancelled_download_stops_and_leaves_the_url_free(bench: Bench, origin: Origin, png: bytes) -> None:
    class Cancelled(Exception):
        pass

    def cancel(received: int, total: int | None) -> None:
        if received:
            raise Cancelled

    origin.routes["/x"] = lambda x: x.answer(png)
    with pytest.raises(Cancelled):
        bench.fetcher().fetch(origin.url("/x"), Purpose.IMAGE, bench.into(), cancel)
    assert bench.image(origin.url("/x")) == png


def test_a_download_can_be_cancelled_while_its_server_says_nothing(bench: Bench, origin: Origin) -> None:
    class Cancelled(Exception):
        pass

    def cancel(received: int, total: int | None) -> None:
        raise Cancelled

    origin.routes["/x"] = lambda x: x.pause(x.for_ever_s)
    began = time.monotonic()
    with pytest.raises(Cancelled):
        bench.fetcher().fetch(origin.url("/x"), Purpose.IMAGE, bench.into(), cancel)
    assert time.monotonic() - began < bench.rules.idle_s


def test_purposes_do_not_share(bench: Bench, origin: Origin, png: bytes) -> None:
    """An image that was let in as an image is no LoRA."""
    origin.routes["/x"] = lambda x: x.answer(png)
    assert bench.image(origin.url("/x")) == png
    with pytest.raises(NotWeights):
        bench.lora(origin.url("/x"))


def test_a_disk_that_cannot_be_written_is_not_the_callers_fault(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["/x"] = lambda x: x.answer(png)
    with pytest.raises(StoreUnavailable):
        bench.fetcher().fetch(origin.url("/x"), Purpose.IMAGE, bench.folder / "nowhere/into")
