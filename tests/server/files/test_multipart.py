"""Uploads in parts: the two clients' order of calls, and every way to get it wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from kontextd_server.files import FolderLimits, FolderStore, Label, Part, PartLimits, StoredFile, locks, multipart
from kontextd_server.files.errors import (
    FileNotHere,
    FileTooLarge,
    InvalidPart,
    QuotaExceeded,
    StoreUnavailable,
    UploadNotFound,
)
from kontextd_server.files.folder import FolderFileWriter

LABEL = Label("big.safetensors", "application/x-big")


def send(store: FolderStore, upload_id: str, number: int, data: bytes) -> Part:
    with store.write_part(upload_id, number) as writer:
        writer.write(data)
        return writer.commit()


def read(store: FolderStore, key: str) -> bytes:
    with store.open(key) as file:
        return b"".join(file.chunks())


def test_parts_sent_and_listed_in_any_order_are_joined_by_number(
    store: FolderStore, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    pieces = [os.urandom(size) for size in (2**20 + 1, 0, 5)]
    key = store.new_key(LABEL.file_name)
    upload_id = store.begin_upload(LABEL, key)
    parts = {number: send(store, upload_id, number, pieces[number - 1]) for number in (3, 1, 2)}
    with pytest.raises(FileNotHere):
        store.info(key)
    stored = store.complete_upload(upload_id, [parts[2], parts[3], parts[1]])
    assert read(store, key) == b"".join(pieces)
    assert (stored.key, stored.file_name, stored.content_type) == (key, LABEL.file_name, LABEL.content_type)
    assert stored.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert len(everything_in(store)) == 2  # the parts are gone
    assert store.usage().used_bytes == stored.size_bytes


def test_completing_twice_answers_twice(store: FolderStore) -> None:
    upload_id = store.begin_upload(LABEL)
    parts = [send(store, upload_id, 1, b"x")]
    assert store.complete_upload(upload_id, parts) == store.complete_upload(upload_id, parts)


def test_whoever_completes_while_another_does_gets_the_same_file(
    store: FolderStore, everything_in: Callable[[FolderStore], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first joins: it waits, and joins nothing."""
    upload_id = store.begin_upload(LABEL)
    parts = [send(store, upload_id, number, b"%d" % number) for number in (1, 2, 3)]
    is_waiting, second = threading.Event(), list[Future[StoredFile]]()
    create = store.create

    def sleep(seconds: float) -> None:
        is_waiting.set()
        time.sleep(seconds)

    class Slow(FolderFileWriter):
        def write(self, chunk: bytes) -> None:
            super().write(chunk)
            if not second:
                second.append(pool.submit(FolderStore(store.root, clock=store.clock).complete_upload, upload_id, parts))
                until = time.monotonic() + 60
                while not (is_waiting.is_set() or second[0].done()) and time.monotonic() < until:
                    time.sleep(0.005)

    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    monkeypatch.setattr(store, "create", lambda label, key: Slow(store, label, key))
    with ThreadPoolExecutor(1) as pool:
        first = store.complete_upload(upload_id, parts)
        assert second[0].result() == first
    assert is_waiting.is_set()
    monkeypatch.setattr(store, "create", create)
    assert read(store, first.key) == b"123"
    assert len(everything_in(store)) == 2  # neither parts nor the lock
    assert store.complete_upload(upload_id, parts) == first


def test_the_record_is_looked_at_by_whoever_may_join(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record read before is of no use: the first may have been done in between."""
    upload_id = store.begin_upload(LABEL)
    parts = [send(store, upload_id, 1, b"x")]
    other, looks = FolderStore(store.root, clock=store.clock), list[str]()
    read_record = store.records.read

    def read_and_lose(key: str) -> StoredFile | None:
        found = read_record(key)
        looks.append(key)
        if found is None and not (store.uploads.folder(upload_id) / "lock").exists():
            other.complete_upload(upload_id, parts)
        return found

    monkeypatch.setattr(store.records, "read", read_and_lose)
    assert store.complete_upload(upload_id, parts) == other.info(looks[0])


def test_an_upload_that_is_aborted_before_it_is_joined_is_not_found(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = store.begin_upload(LABEL)
    upload = store.uploads.find(upload_id)
    store.abort_upload(upload_id)
    monkeypatch.setattr(store.uploads, "find", lambda _: upload)
    with pytest.raises(UploadNotFound, match="aborted"):
        store.complete_upload(upload_id, [Part(1, "0" * 64)])


def test_whoever_waits_too_long_for_another_to_complete_is_told_to_ask_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = store.begin_upload(LABEL)
    parts = [send(store, upload_id, 1, b"x")]
    monkeypatch.setattr(multipart, "_JOIN_TIMEOUT_S", 0.05)
    with store.uploads.joining(store.uploads.find(upload_id)), pytest.raises(StoreUnavailable, match="Ask again"):
        store.complete_upload(upload_id, parts)
    assert store.complete_upload(upload_id, parts).size_bytes == 1


def test_a_part_sent_again_takes_the_place_of_the_former(store: FolderStore) -> None:
    upload_id = store.begin_upload(LABEL)
    first = send(store, upload_id, 1, b"torn")
    assert send(store, upload_id, 1, b"torn") == first
    second = send(store, upload_id, 1, b"whole")
    assert first.etag != second.etag
    assert read(store, store.complete_upload(upload_id, [second]).key) == b"whole"


def test_numbers_may_have_gaps(store: FolderStore) -> None:
    upload_id = store.begin_upload(LABEL)
    parts = [send(store, upload_id, number, b"%d" % number) for number in (2, 5, 10_000)]
    assert read(store, store.complete_upload(upload_id, parts).key) == b"2510000"


@pytest.mark.parametrize("number", [0, -1, 10_001, 10**9])
def test_a_part_number_outside_the_limits_is_refused(store: FolderStore, number: int) -> None:
    with pytest.raises(InvalidPart, match="1 to 10000"):
        store.write_part(store.begin_upload(LABEL), number)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda one, two: [],
        lambda one, two: [one, one],
        lambda one, two: [one, Part(3, two.etag)],
        lambda one, two: [one, Part(2, one.etag)],
        lambda one, two: [Part(1, "../upload.json")],
        lambda one, two: [Part(1, "")],
        lambda one, two: [Part(1, one.etag.upper())],
        lambda one, two: [one] * 10_001,
        lambda one, two: [Part(-1, one.etag)],
    ],
)
def test_a_list_that_does_not_fit_the_parts_is_refused(
    store: FolderStore, wrong: Callable[[Part, Part], list[Part]]
) -> None:
    upload_id = store.begin_upload(LABEL)
    one, two = send(store, upload_id, 1, b"x"), send(store, upload_id, 2, b"y")
    with pytest.raises(InvalidPart):
        store.complete_upload(upload_id, wrong(one, two))
    assert read(store, store.complete_upload(upload_id, [one, two]).key) == b"xy"  # and nothing is lost


@pytest.mark.parametrize("upload_id", ["", "x", "../objects", "a" * 26, "a" * 26 + "/..", "é" * 26])
def test_an_upload_that_was_never_begun_is_not_found(store: FolderStore, upload_id: str) -> None:
    for ask in (
        lambda: store.write_part(upload_id, 1),
        lambda: store.complete_upload(upload_id, []),
        lambda: store.abort_upload(upload_id),
    ):
        with pytest.raises(UploadNotFound):
            ask()


def test_an_aborted_upload_leaves_nothing(
    store: FolderStore, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    upload_id = store.begin_upload(LABEL)
    send(store, upload_id, 1, b"x" * 50)
    assert store.usage().used_bytes == 50
    store.abort_upload(upload_id)
    assert everything_in(store) == []
    assert store.usage().used_bytes == 0
    with pytest.raises(UploadNotFound):
        store.write_part(upload_id, 2)


def test_a_part_whose_upload_is_aborted_meanwhile_says_so(store: FolderStore) -> None:
    upload_id = store.begin_upload(LABEL)
    with store.write_part(upload_id, 1) as writer:
        writer.write(b"x")
        store.abort_upload(upload_id)
        with pytest.raises(UploadNotFound, match="aborted"):
            writer.commit()
    assert store.usage().used_bytes == 0


def test_an_upload_that_nobody_completes_expires(
    store: FolderStore, clock: Callable[[], float], everything_in: Callable[[FolderStore], list[str]]
) -> None:
    upload_id = store.begin_upload(LABEL)
    part = send(store, upload_id, 1, b"x" * 50)
    clock.now += store.limits.parts.lifetime_s
    with pytest.raises(UploadNotFound, match="expired"):
        store.complete_upload(upload_id, [part])
    swept = store.sweep()
    assert (swept.uploads, swept.freed_bytes) == (1, 50)
    assert everything_in(store) == []
    assert store.usage().used_bytes == 0


def test_parts_and_their_sum_have_limits(tmp_path: Path) -> None:
    limits = FolderLimits(max_file_bytes=15, parts=PartLimits(max_part_bytes=10))
    store = FolderStore(tmp_path, limits)
    upload_id = store.begin_upload(LABEL)
    parts = [send(store, upload_id, number, b"x" * 10) for number in (1, 2)]
    with pytest.raises(FileTooLarge, match="10 bytes"):
        send(store, upload_id, 3, b"x" * 11)
    with pytest.raises(FileTooLarge, match="20 bytes together; 15"):
        store.complete_upload(upload_id, parts)


def test_parts_count_against_the_quota(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, FolderLimits(quota_bytes=100))
    upload_id = store.begin_upload(LABEL)
    send(store, upload_id, 1, b"x" * 60)
    with pytest.raises(QuotaExceeded):
        send(store, upload_id, 2, b"y" * 60)
    assert store.usage().used_bytes == 60


def test_a_large_upload_never_lies_in_memory(tmp_path: Path) -> None:
    """96 MiB in parts of 32, in a process that may have little more than Python itself.

    By proc(5), VmHWM: the `ru_maxrss` of a process begins with the peak of the one that started it.
    """
    code = r"""
import re, sys
from pathlib import Path
from kontextd_server.files import FolderStore, Label
def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
store = FolderStore(Path(sys.argv[1]))
upload = store.begin_upload(Label())
before = peak_mib()
parts = []
for number in (1, 2, 3):
    with store.write_part(upload, number) as writer:
        for _ in range(32):
            writer.write(b"x" * 2**20)
        parts.append(writer.commit())
with store.open(store.complete_upload(upload, parts).key) as file:
    assert sum(map(len, file.chunks())) == 96 * 2**20
print(peak_mib() - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(ran.stdout) < 12  # MiB
