"""What expires goes, what crashes leave goes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kontextd_server.files import FolderLimits, FolderStore, Label, StoredFile

PNG = Label("photo.png", "image/png")


@pytest.fixture
def hasty(tmp_path: Path, clock: Callable[[], float]) -> FolderStore:
    """A store whose leftovers are old at once."""
    return FolderStore(tmp_path / "files", FolderLimits(grace_s=0), clock)


def test_expired_files_go_and_their_room_comes_back(
    store: FolderStore, clock: Callable[[], float], everything_in: Callable[[FolderStore], list[str]]
) -> None:
    store.put([b"x" * 10], replace(PNG, lifetime_s=5))
    store.put([b"same"], replace(PNG, lifetime_s=5))
    kept = store.put([b"same"], PNG)
    clock.now += 5
    swept = store.sweep()
    assert (swept.expired, swept.leftovers, swept.freed_bytes) == (2, 0, 10)
    assert store.usage().used_bytes == 4
    assert sorted(everything_in(store)) == sorted([kept.sha256, f"{kept.key[:26]}.{kept.sha256}"])
    assert store.sweep().expired == 0


def test_what_a_crash_leaves_goes_once_it_is_old(
    hasty: FolderStore, store: FolderStore, everything_in: Callable[[FolderStore], list[str]]
) -> None:
    no_record = hasty.put([b"no record"], PNG)
    (hasty.root / f"objects/{no_record.key[:2]}/{no_record.key[:26]}.json").unlink()
    torn_record = hasty.root / f"objects/{no_record.key[:2]}/.{no_record.key[:26]}.json.0123.part"
    torn_record.write_bytes(b"{")
    (hasty.root / "tmp/0123.part").write_bytes(b"half")
    forgotten = hasty.begin_upload(PNG)
    with hasty.write_part(forgotten, 1) as writer:
        writer.write(b"part")
        writer.commit()
    (hasty.uploads.folder(forgotten) / "upload.json").unlink()
    assert store.sweep().leftovers == 0  # young: they may be somebody's work
    swept = hasty.sweep()
    assert (swept.leftovers, swept.freed_bytes) == (4, len(b"no record") + len(b"half") + len(b"part") + len(b"{"))
    assert everything_in(hasty) == []
    assert not hasty.uploads.folder(forgotten).exists()
    assert hasty.usage().used_bytes == 0


def test_a_content_that_nobody_keeps_goes(store: FolderStore) -> None:
    stored = store.put([b"x"], PNG)
    orphan = store.blobs.path("0" * 64)
    orphan.parent.mkdir()
    orphan.write_bytes(b"orphan")
    assert store.sweep().freed_bytes == 6
    assert store.blobs.path(stored.sha256).exists()


def test_the_count_is_set_right(store: FolderStore) -> None:
    store.put([b"x" * 10], PNG)
    for wrong in (b"99999999999999999999", b"garbage", b""):
        (store.root / "usage").write_bytes(wrong)
        store.sweep()
        assert store.usage().used_bytes == 10


def test_a_damaged_record_is_logged_and_left(store: FolderStore, caplog: pytest.LogCaptureFixture) -> None:
    damaged, whole = store.put([b"x"], PNG), store.put([b"y"], PNG)
    path = store.root / f"objects/{damaged.key[:2]}/{damaged.key[:26]}.json"
    path.write_text("{")
    store.sweep()
    assert "damaged" in caplog.text
    assert path.exists()
    assert store.info(whole.key) == whole


def test_a_file_being_written_during_a_sweep_is_not_lost(
    store: FolderStore, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep falls between content and record, and takes the one file that had the same content."""
    old = store.put([b"same"], replace(PNG, lifetime_s=5))
    clock.now += 5
    create = store.records.create

    def sweep_first(file: StoredFile) -> None:
        assert store.sweep().expired == 1
        create(file)

    monkeypatch.setattr(store.records, "create", sweep_first)
    new = store.put([b"same"], PNG)
    store.sweep()
    with store.open(new.key) as file:
        assert b"".join(file.chunks()) == b"same"
    assert new.sha256 == old.sha256
    assert store.usage().used_bytes == 4


def test_sweeping_an_empty_store_removes_nothing(store: FolderStore) -> None:
    swept = store.sweep()
    assert (swept.expired, swept.uploads, swept.leftovers, swept.freed_bytes) == (0, 0, 0, 0)
