"""A disk that fills up: a typed error, nothing half written, and what was there before stays readable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kontextd_server.files import FolderStore, Label
from kontextd_server.files.atomic import replace_whole
from kontextd_server.files.errors import StoreFull

# No file of this process may grow over 64 KiB: write(2) fails as on a full disk, with EFBIG in place of ENOSPC.
FULL_DISK = """
import resource, sys
from pathlib import Path
from kontextd_server.files import FolderStore, Label
from kontextd_server.files.errors import StoreFull
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
store = FolderStore(Path(sys.argv[1]))
small = store.put([b"x" * 1000], Label())
try:
    store.put([b"y" * 1000] * 100, Label())
except StoreFull as error:
    print(error)
upload = store.begin_upload(Label())
try:
    with store.write_part(upload, 1) as writer:
        writer.write(b"z" * 100_000)
        writer.commit()
except StoreFull as error:
    print(error)
print(store.info(small.key).size_bytes, store.usage().used_bytes)
print(sorted(path.stat().st_size for path in store.root.rglob("*") if path.is_file() and path.stat().st_size > 300))
"""


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""
    full_file, full_part, counts, sizes = ran.stdout.splitlines()
    assert full_file.startswith(f"there is no room left in {tmp_path}")
    assert full_part.startswith("there is no room left in")
    assert counts == "1000 1000"
    assert sizes == "[1000, 1000]"  # one content under two names


@pytest.mark.parametrize("failing", ["os.fsync", "os.link"])
def test_a_step_that_finds_no_room_takes_back_those_before(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = store.put([b"before"], Label())
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        if failing == "os.link":
            patch.setattr("os.open", fail)  # what would make the name by other means
        with pytest.raises(StoreFull, match="No space left"):
            store.put([b"new"], Label())
    assert calls
    assert store.usage().used_bytes == 6
    contents = [path for path in store.root.rglob("*") if path.is_file() and path.read_bytes() == b"new"]
    assert contents == []
    assert store.info(before.key) == before


def test_a_count_that_finds_no_room_takes_back_what_it_was_to_count(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", fail)  # the first number that is written into `usage` needs a block
        with pytest.raises(StoreFull, match="No space left"):
            store.put([b"new"], Label())
    assert [path.name for path in store.root.rglob("*") if path.is_file()] == ["usage"]
    assert store.usage().used_bytes == 0
    assert store.put([b"new"], Label()).size_bytes == store.usage().used_bytes == 3


def test_a_replaced_file_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    replace_whole(path, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
