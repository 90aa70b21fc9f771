"""The folder store through its front door: what goes in comes out, for as long as it should."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kontextd_server.files import FOR_EVER, FolderLimits, FolderStore, Label
from kontextd_server.files.errors import (
    FileNotHere,
    FileTooLarge,
    InvalidRange,
    KeyTaken,
    QuotaExceeded,
    StoreUnavailable,
)

PNG = Label("photo.png", "image/png")


def read(store: FolderStore, key: str) -> bytes:
    with store.open(key) as file:
        return b"".join(file.chunks())


def test_a_file_reads_back_byte_for_byte_with_what_was_said_of_it(
    store: FolderStore, clock: Callable[[], float]
) -> None:
    data = os.urandom(3 * 2**20 + 7)
    stored = store.put([data[:10], data[10:]], Label("a b.bin", "text/html; charset=x", lifetime_s=60))
    assert read(store, stored.key) == data
    assert store.info(stored.key) == stored
    assert (stored.file_name, stored.content_type) == ("a b.bin", "text/html; charset=x")
    assert (stored.size_bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (stored.created_at, stored.expires_at) == (clock(), clock() + 60)


def test_all_files_are_told_but_those_that_have_expired(store: FolderStore, clock: Callable[[], float]) -> None:
    assert list(store.all()) == []
    short, long = store.put([b"x"], Label(lifetime_s=60)), store.put([b"x"], Label(owner="anna"))
    assert sorted(store.all(), key=lambda file: file.key) == sorted((short, long), key=lambda file: file.key)
    clock.now += 60
    (left,) = store.all()
    assert (left, left.owner) == (long, "anna")


def test_a_record_of_a_version_that_knew_no_owners_is_read(store: FolderStore) -> None:
    stored = store.put([b"x"], PNG)
    (record,) = store.root.glob("objects/??/*.json")
    known = json.loads(record.read_text())
    del known["owner"]
    record.write_text(json.dumps(known))
    assert store.info(stored.key) == stored


def test_an_empty_file_is_a_file(store: FolderStore) -> None:
    assert read(store, store.put([], Label()).key) == b""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), ends=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_any_range_reads_as_a_slice(store: FolderStore, data: bytes, ends: tuple[int, int]) -> None:
    start, stop = sorted(min(end, len(data)) for end in ends)
    with store.open(store.put([data], Label()).key) as file:
        assert b"".join(file.chunks(start, stop)) == data[start:stop]
        assert b"".join(file.chunks(start)) == data[start:]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (3, 2), (4, None)])
def test_a_range_outside_the_file_is_refused(store: FolderStore, start: int, stop: int | None) -> None:
    with store.open(store.put([b"abc"], Label()).key) as file, pytest.raises(InvalidRange, match="3 bytes"):
        file.chunks(start, stop)


def test_a_large_file_is_read_in_chunks(store: FolderStore) -> None:
    with store.open(store.put([bytes(2**20)] * 3, Label()).key) as file:
        assert [len(chunk) for chunk in file.chunks()] == [2**20] * 3


@pytest.mark.parametrize(
    "key",
    [
        "",
        "nothing",
        "../../etc/passwd",
        "a" * 26,
        "a" * 26 + "-x/../y",
        "A" * 26 + "-x",
        "a" * 26 + "-x\n",
        "é" * 26 + "-x",
    ],
)
def test_what_is_no_key_is_no_file(store: FolderStore, key: str) -> None:
    for ask in (store.info, store.open, store.delete, lambda key: store.copy_to(key, store.root / "copy")):
        with pytest.raises(FileNotHere):
            ask(key)


def test_a_key_with_another_name_is_another_key(store: FolderStore) -> None:
    key = store.put([b"x"], PNG).key
    with pytest.raises(FileNotHere, match="may have expired"):
        store.info(key.replace("photo", "phot0"))
    assert not store.delete(key.replace("photo", "phot0"))
    assert read(store, key) == b"x"


def test_keys_are_not_to_be_guessed(store: FolderStore) -> None:
    keys = {store.new_key("a.png") for _ in range(500)}
    assert len({key[:26] for key in keys}) == 500
    assert len({character for key in keys for character in key[:26]}) == 32


def test_a_file_expires(store: FolderStore, clock: Callable[[], float]) -> None:
    short, endless = (
        store.put([b"x"], replace(PNG, lifetime_s=10)),
        store.put([b"y"], replace(PNG, lifetime_s=FOR_EVER)),
    )
    clock.now += 10
    for ask in (store.info, store.open):
        with pytest.raises(FileNotHere):
            ask(short.key)
    assert read(store, endless.key) == b"y"
    assert endless.expires_at is None


def test_lifetimes_have_a_default_and_a_ceiling(tmp_path: Path, clock: Callable[[], float]) -> None:
    store = FolderStore(tmp_path, FolderLimits(default_lifetime_s=50, max_lifetime_s=100), clock)
    asked = [
        store.put([b"x"], replace(PNG, lifetime_s=lifetime_s)).expires_at
        for lifetime_s in (None, 70, 1000, FOR_EVER, -5)
    ]
    assert [end - clock() for end in asked if end is not None] == [50, 70, 100, 100, 0]


def test_equal_contents_are_stored_once_and_counted_once(
    store: FolderStore, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    first, second = store.put([b"same"], PNG), store.put([b"same"], Label("other.txt", "text/plain"))
    assert first.key != second.key
    assert store.usage().used_bytes == 4
    blob = store.blobs.path(first.sha256)
    assert blob.stat().st_nlink == 3
    assert store.delete(first.key)
    assert read(store, second.key) == b"same"
    assert store.usage().used_bytes == 4
    assert store.delete(second.key)
    assert store.usage().used_bytes == 0
    assert everything_in(store) == []


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(store: FolderStore) -> None:
    key = store.put([bytes(2**20), b"end"], PNG).key
    with store.open(key) as file:
        chunks = file.chunks()
        next(chunks)
        assert store.delete(key)
        assert not store.delete(key)
        assert next(chunks) == b"end"


def test_a_writer_that_is_left_early_leaves_nothing(
    store: FolderStore, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    def broken() -> None:
        with store.create(PNG) as writer:
            writer.write(b"half")
            raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        broken()
    assert everything_in(store) == []
    assert store.usage().used_bytes == 0


def test_a_file_can_be_announced_before_it_comes(store: FolderStore) -> None:
    key = store.new_key("later.png")
    with pytest.raises(FileNotHere):
        store.info(key)
    assert store.put([b"x"], PNG, key).key == key
    assert read(store, key) == b"x"


def test_a_key_never_changes_its_content(store: FolderStore, everything_in: Callable[[FolderStore], list[str]]) -> None:
    first = store.put([b"x"], PNG, store.new_key("a.png"))
    kept = everything_in(store)
    assert store.put([b"x"], PNG, first.key) == first  # an upload that is repeated because its answer got lost
    with pytest.raises(KeyTaken):
        store.put([b"y"], PNG, first.key)
    assert read(store, first.key) == b"x"
    assert everything_in(store) == kept
    assert store.usage().used_bytes == 1


def test_of_many_writers_of_one_key_one_wins(
    store: FolderStore, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    key = store.new_key("a.bin")
    won: list[bytes] = []

    def write(content: bytes) -> None:
        try:
            store.put([content], Label(), key)
            won.append(content)
        except KeyTaken:
            pass

    threads = [threading.Thread(target=write, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [read(store, key)]
    assert len(everything_in(store)) == 2  # the content under its key and under its hash
    assert store.usage().used_bytes == 1


@pytest.mark.parametrize("key", ["name", "../x", "a" * 26])
def test_a_file_can_only_be_stored_under_a_key_of_ours(store: FolderStore, key: str) -> None:
    with pytest.raises(FileNotHere):
        store.create(PNG, key)


def test_a_file_over_the_limit_is_refused_as_soon_as_it_is_over(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, FolderLimits(max_file_bytes=10))
    assert store.put([b"x" * 10], PNG).size_bytes == 10
    with store.create(PNG) as writer:
        writer.write(b"x" * 10)
        with pytest.raises(FileTooLarge, match="10 bytes"):
            writer.write(b"x")


def test_the_quota_counts_what_the_disk_holds(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, FolderLimits(quota_bytes=130))
    first = store.put([b"a" * 60], PNG)
    store.put([b"a" * 60], PNG)  # the same content again costs nothing but needs room while it comes
    with pytest.raises(QuotaExceeded, match="quota"):
        store.put([b"b" * 71], PNG)
    assert store.usage().used_bytes == 60
    store.put([b"c" * 70], PNG)
    store.delete(first.key)
    assert store.usage().used_bytes == 130


def test_two_writers_cannot_share_the_last_room(
    tmp_path: Path, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    store = FolderStore(tmp_path, FolderLimits(quota_bytes=100))
    with store.create(PNG) as one, store.create(PNG) as other:
        one.write(b"a" * 60)
        other.write(b"b" * 60)
        one.commit()
        with pytest.raises(QuotaExceeded):
            other.commit()
    assert store.usage().used_bytes == 60
    assert len(everything_in(store)) == 2


def test_a_copy_is_free_and_outlives_the_file(store: FolderStore, tmp_path: Path) -> None:
    stored = store.put([b"weights"], Label("a.safetensors"))
    assert store.copy_to(stored.key, tmp_path / "copy") == stored
    assert (tmp_path / "copy").stat().st_ino == store.blobs.path(stored.sha256).stat().st_ino
    store.delete(stored.key)
    store.sweep()
    assert (tmp_path / "copy").read_bytes() == b"weights"


def test_the_folder_is_its_owners_alone(store: FolderStore) -> None:
    store.put([b"x"], PNG)
    folders = [store.root, *(path for path in store.root.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_a_file_system_without_hard_links_works_too(
    store: FolderStore,
    monkeypatch: pytest.MonkeyPatch,
    everything_in: Callable[[FolderStore], list[str]],
    tmp_path: Path,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, second = store.put([b"same"], PNG), store.put([b"same"], PNG)
    assert store.usage().used_bytes == 8
    with pytest.raises(KeyTaken):
        store.put([b"other"], PNG, first.key)
    store.copy_to(first.key, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"same"
    store.sweep()
    assert [read(store, file.key) for file in (first, second)] == [b"same"] * 2
    assert store.delete(first.key)
    assert store.delete(second.key)
    assert store.usage().used_bytes == 0
    assert everything_in(store) == []


def test_a_lost_content_and_a_damaged_record_are_named(store: FolderStore) -> None:
    lost, damaged = store.put([b"x"], PNG), store.put([b"y"], PNG)
    store.records.content(lost.key, lost.sha256).unlink()
    with pytest.raises(StoreUnavailable, match="is lost"):
        store.open(lost.key)
    for text in ("{", '{"key": 1}', '{"unknown": 1}'):
        (store.root / f"objects/{damaged.key[:2]}/{damaged.key[:26]}.json").write_text(text)
        with pytest.raises(StoreUnavailable, match="damaged"):
            store.info(damaged.key)


def test_a_folder_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="writable"):
        FolderStore(tmp_path / "file/files")
