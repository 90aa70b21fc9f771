"""Large files over connections that break, and files that are here already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from kontextd_server.fetch import Purpose, Source
from kontextd_server.fetch.cache import Shelf
from kontextd_server.fetch.errors import DownloadFailed, DownloadTimedOut
from loopback import Bench, Exchange, Names, Origin


@dataclass
class Breaking:
    """Serves `body` with ranges, and breaks off after `pieces` bytes each time but the last."""

    body: bytes
    pieces: tuple[int, ...]
    etag: str | None = '"v1"'

    def __call__(self, exchange: Exchange) -> None:
        asked, tag = exchange.asked.headers, f"ETag: {self.etag}\r\n" if self.etag else ""
        begin = 0
        if "range" in asked and asked.get("if-range") == self.etag:
            begin = int(asked["range"].removeprefix("bytes=").removesuffix("-"))
        size = len(self.body)
        status = f"206 Partial Content\r\nContent-Range: bytes {begin}-{size - 1}/{size}" if begin else "200 OK"
        exchange.send(f"HTTP/1.1 {status}\r\n{tag}Content-Length: {size - begin}\r\n\r\n".encode())
        end = begin + self.pieces[0] if self.pieces else size
        self.pieces = self.pieces[1:]
        exchange.send(self.body[begin:end])


@pytest.fixture
def patient(bench: Bench) -> Bench:
    bench.set(attempts=4)
    return bench


def ranges(origin: Origin) -> list[str | None]:
    return [asked.headers.get("range") for asked in origin.asked]


def test_a_download_that_breaks_goes_on_where_it_broke(patient: Bench, origin: Origin, safetensors: bytes) -> None:
    origin.routes["/x"] = Breaking(safetensors, (2000, 1500))
    assert patient.lora(origin.url("/x")) == safetensors
    assert ranges(origin) == [None, "bytes=2000-", "bytes=3500-"]
    assert [asked.headers.get("if-range") for asked in origin.asked] == [None, '"v1"', '"v1"']
    assert patient.leftovers() == []


def test_another_process_takes_up_what_one_left(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    origin.routes["/x"] = Breaking(safetensors, (3000,))
    with pytest.raises(DownloadFailed):
        bench.lora(origin.url("/x"))
    assert len(bench.leftovers()) == 2
    fetched = bench.fetcher().fetch(origin.url("/x"), Purpose.LORA, bench.into())
    assert fetched.path.read_bytes() == safetensors
    assert ranges(origin) == [None, "bytes=3000-"]


def test_a_file_that_changed_meanwhile_is_begun_anew(patient: Bench, origin: Origin, safetensors: bytes) -> None:
    new = safetensors[:-1] + b"!"
    breaking = Breaking(safetensors, (2000,))

    def serve(exchange: Exchange) -> None:
        breaking(exchange)
        breaking.body, breaking.etag = new, '"v2"'

    origin.routes["/x"] = serve
    assert patient.lora(origin.url("/x")) == new
    assert ranges(origin) == [None, "bytes=2000-"]


@pytest.mark.parametrize("etag", [None, 'W/"v1"', "v1"])
def test_without_a_strong_etag_nothing_is_taken_up(
    patient: Bench, origin: Origin, safetensors: bytes, etag: str | None
) -> None:
    origin.routes["/x"] = Breaking(safetensors, (2000,), etag)
    assert patient.lora(origin.url("/x")) == safetensors
    assert ranges(origin) == [None, None]


@pytest.mark.parametrize(
    "content_range", ["bytes 0-4999/5000", "bytes 1999-4999/5000", "items 2000-1/2", "bytes 2000-4999/*", "garbage"]
)
def test_another_part_than_was_asked_for_is_not_appended(
    patient: Bench, origin: Origin, safetensors: bytes, content_range: str
) -> None:
    whole = Breaking(safetensors, (2000,))

    def serve(exchange: Exchange) -> None:
        if "range" in exchange.asked.headers:
            exchange.answer(b"x" * 100, "206 Partial Content", Content_Range=content_range, ETag='"v1"')
        else:
            whole(exchange)

    origin.routes["/x"] = serve
    assert patient.lora(origin.url("/x")) == safetensors
    assert ranges(origin) == [None, "bytes=2000-", None]


def test_a_part_that_does_not_reach_the_end_is_not_the_whole(
    patient: Bench, origin: Origin, safetensors: bytes
) -> None:
    whole = Breaking(safetensors, (2000,))

    def serve(exchange: Exchange) -> None:
        begin = exchange.asked.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        if begin == "2000":
            part = f"bytes 2000-2099/{len(safetensors)}"
            exchange.answer(safetensors[2000:2100], "206 Partial Content", Content_Range=part, ETag='"v1"')
        else:
            whole(exchange)

    origin.routes["/x"] = serve
    assert patient.lora(origin.url("/x")) == safetensors
    assert ranges(origin) == [None, "bytes=2000-", "bytes=2100-"]


def test_a_download_that_was_given_up_at_its_last_byte_is_no_dead_end(
    bench: Bench, origin: Origin, safetensors: bytes
) -> None:
    """All of it is there then, and a server has nothing to answer for what comes after it."""

    def serve(exchange: Exchange) -> None:
        if exchange.asked.headers.get("range") == f"bytes={len(safetensors)}-":
            exchange.answer(b"", "416 Range Not Satisfiable", Content_Range=f"bytes */{len(safetensors)}")
        else:
            exchange.answer(safetensors, ETag='"v1"')

    def cancelled(so_far: int, _of: int | None) -> None:
        if so_far == len(safetensors):
            raise KeyboardInterrupt

    origin.routes["/x"] = serve
    with pytest.raises(KeyboardInterrupt):
        bench.fetcher().fetch(origin.url("/x"), Purpose.LORA, bench.into(), cancelled)
    assert bench.lora(origin.url("/x")) == safetensors
    assert ranges(origin) == [None, f"bytes={len(safetensors)}-", None]
    assert bench.leftovers() == []


def test_a_file_that_is_gone_is_not_asked_for_over_and_over(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    origin.routes["/x"] = Breaking(safetensors, (3000,))
    with pytest.raises(DownloadFailed):
        bench.lora(origin.url("/x"))
    origin.routes["/x"] = lambda exchange: exchange.answer(b"", "404 Not Found")
    with pytest.raises(DownloadFailed, match="answered 404"):
        bench.lora(origin.url("/x"))
    assert ranges(origin) == [None, "bytes=3000-", None]


def test_a_torn_note_of_a_partial_download_is_ignored(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    origin.routes["/x"] = Breaking(safetensors, (3000,))
    with pytest.raises(DownloadFailed):
        bench.lora(origin.url("/x"))
    for note in bench.folder.glob("cache/lora/parts/*.json"):
        note.write_text('{"etag": ')
    assert bench.lora(origin.url("/x")) == safetensors
    assert ranges(origin) == [None, None]


def test_breaking_for_ever_comes_to_an_end(patient: Bench, origin: Origin, safetensors: bytes) -> None:
    origin.routes["/x"] = Breaking(safetensors, (100,) * 50)
    with pytest.raises(DownloadFailed):
        patient.lora(origin.url("/x"))
    assert len(origin.asked) == 4


# What is here already.


def test_a_fresh_lora_is_not_asked_for_again(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    bench.set(fresh_s=60)
    origin.routes["/x"] = Breaking(safetensors, ())
    sources = [bench.fetcher().fetch(origin.url("/x"), Purpose.LORA, bench.into()).source for _ in range(3)]
    assert sources == [Source.NETWORK, Source.CACHE, Source.CACHE]
    assert len(origin.asked) == 1


@pytest.mark.parametrize(
    ("stated", "asked"),
    [
        ({"ETag": 'W/"v1"', "Last_Modified": "Tue"}, ("if-none-match", 'W/"v1"')),
        ({"Last_Modified": "Tue, 01 Jan 2030 00:00:00 GMT"}, ("if-modified-since", "Tue, 01 Jan 2030 00:00:00 GMT")),
    ],
)
def test_an_older_one_is_asked_for_by_what_its_server_said_of_it(
    bench: Bench, origin: Origin, safetensors: bytes, stated: dict[str, str], asked: tuple[str, str]
) -> None:
    name, value = asked

    def serve(exchange: Exchange) -> None:
        if exchange.asked.headers.get(name) == value:
            exchange.send(b"HTTP/1.1 304 Not Modified\r\n\r\n")
        else:
            exchange.answer(safetensors, **stated)

    origin.routes["/x"] = serve
    for _ in range(3):
        assert bench.lora(origin.url("/x")) == safetensors
    assert [request.headers.get(name) for request in origin.asked] == [None, value, value]
    assert bench.leftovers() == []


def test_a_changed_file_replaces_the_one_in_the_cache(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    bodies = [safetensors, safetensors + b"!"]
    origin.routes["/x"] = lambda x: x.answer(bodies[len(origin.asked) - 1], ETag=f'"{len(origin.asked)}"')
    first, second = bench.into(), bench.folder / "second"
    bench.fetcher().fetch(origin.url("/x"), Purpose.LORA, first)
    bench.fetcher().fetch(origin.url("/x"), Purpose.LORA, second)
    assert [first.read_bytes(), second.read_bytes()] == bodies  # the job that has the former keeps it


def test_a_server_that_fails_is_not_covered_up_by_an_old_copy(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["/x"] = lambda x: x.answer(png) if len(origin.asked) == 1 else x.answer(b"", "500 Oops")
    assert bench.image(origin.url("/x")) == png
    with pytest.raises(DownloadFailed, match="500"):
        bench.image(origin.url("/x"))


def test_damaged_entries_are_downloaded_again(bench: Bench, origin: Origin, png: bytes) -> None:
    bench.set(fresh_s=60)
    origin.routes["/x"] = lambda x: x.answer(png)
    for damage in ("{", "[]", json.dumps({"url": 1}), None):
        assert bench.image(origin.url("/x")) == png
        (entry,) = bench.folder.glob("cache/image/entries/*.json")
        (content,) = bench.folder.glob("cache/image/contents/*")
        if damage is None:
            content.unlink()
            content.write_bytes(b"short")
        else:
            entry.write_text(damage)
    assert bench.image(origin.url("/x")) == png
    assert len(origin.asked) == 5


def test_the_cache_keeps_to_its_budget_and_forgets_what_was_used_longest_ago(
    bench: Bench, origin: Origin, safetensors: bytes
) -> None:
    bench.set(fresh_s=60)
    bench.config = type(bench.config)(bench.config.cache, cache_bytes=int(2.5 * len(safetensors)))
    for name in "abacd":  # asked for again, "a" is newer than "b"
        origin.routes[f"/{name}"] = lambda x: x.answer(safetensors)
        bench.lora(origin.url(f"/{name}"))
        for path in bench.folder.glob("cache/lora/contents/*"):
            os.utime(path, (path.stat().st_atime - 1, path.stat().st_mtime - 1))
    origin.asked.clear()
    for name in "dcb":
        bench.lora(origin.url(f"/{name}"))
    assert [asked.path for asked in origin.asked] == ["/b"]


def test_an_entry_that_is_tidied_away_at_the_last_moment_is_downloaded_again(
    bench: Bench, origin: Origin, safetensors: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.set(fresh_s=60)
    origin.routes["/x"] = lambda x: x.answer(safetensors)
    assert bench.lora(origin.url("/x")) == safetensors
    entry = Shelf.entry
    looks = 0

    def tidied(self: Shelf, name: str) -> object:
        nonlocal looks
        looks += 1
        found = entry(self, name)
        if looks == 1:
            self.forget(name)
        return found

    monkeypatch.setattr(Shelf, "entry", tidied)
    assert bench.lora(origin.url("/x")) == safetensors
    assert len(origin.asked) == 2


def test_images_do_not_stay(bench: Bench, origin: Origin, png: bytes) -> None:
    origin.routes["/x"] = lambda x: x.answer(png)
    assert bench.image(origin.url("/x")) == png
    shelf = Shelf(bench.folder / "cache/image")
    (shelf.root / "parts/stale").write_bytes(b"x")
    old = time.time() - 120
    for path in [*shelf.root.glob("contents/*"), *shelf.root.glob("parts/*")]:
        os.utime(path, (old, old))
    bench.fetcher().cache.tidy()
    assert [path for path in shelf.root.rglob("*") if path.is_file()] == []


# Across processes, and on a full disk.

CHILD = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from loopback import Bench, Names
from kontextd_models.errors import KontextdError
from kontextd_server.fetch import FetchConfig, Purpose
folder, url, room = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
bench = Bench(folder, Names(), FetchConfig(cache=folder / "cache"))
bench.set(fresh_s=60)
if room:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    print(bench.fetcher().fetch(url, Purpose.LORA, folder / f"into-{sys.argv[5]}").size_bytes)
except KontextdError as error:
    print(type(error).__name__)
"""


def child(folder: Path, url: str, name: str, room: int = 0) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", CHILD, tests, str(folder), url, str(room), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_one_download(tmp_path: Path, origin: Origin, safetensors: bytes) -> None:
    def serve(exchange: Exchange) -> None:
        exchange.pause(0.3)
        exchange.answer(safetensors)

    origin.routes["/x"] = serve
    children = [child(tmp_path, origin.url("/x"), name) for name in "abc"]
    assert [process.communicate(timeout=60) for process in children] == [(f"{len(safetensors)}\n", "")] * 3
    assert len(origin.asked) == 1
    assert [path.name for path in (tmp_path / "cache/lora/locks").iterdir()] == []


def test_a_full_disk_is_this_boxs_fault_and_not_the_urls(tmp_path: Path, origin: Origin, names: Names) -> None:
    from loopback import weights

    body = weights(200_000)
    origin.routes["/x"] = Breaking(body, ())
    printed, errors = child(tmp_path, origin.url("/x"), "a", room=65536).communicate(timeout=60)
    assert (printed, errors) == ("StoreFull\n", "")
    assert child(tmp_path, origin.url("/x"), "b").communicate(timeout=60)[0] == f"{len(body)}\n"
    assert (tmp_path / "into-b").read_bytes() == body


def test_the_time_for_waiting_counts(bench: Bench, origin: Origin, safetensors: bytes) -> None:
    """A second request does not wait longer for the first one's download than it may take for its own."""
    import threading

    begun, given_up = threading.Event(), threading.Event()

    def serve(exchange: Exchange) -> None:
        begun.set()
        given_up.wait(60)
        exchange.answer(safetensors)

    origin.routes["/x"] = serve
    first = threading.Thread(target=lambda: bench.lora(origin.url("/x")))
    patient_rules = bench.rules
    first.start()
    assert begun.wait(60)
    bench.set(total_s=0.3)
    with pytest.raises(DownloadTimedOut, match="somebody else's download"):
        bench.lora(origin.url("/x"))
    bench.rules = patient_rules
    given_up.set()
    first.join(60)
