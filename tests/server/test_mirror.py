"""The mirror: exactly these URLs, on as many boxes as share the folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kontextd_server.files import FolderStore, Label
from kontextd_server.files.errors import StoreUnavailable
from kontextd_server.mirror import HUB_ID, Mirror, MirrorError, add_command

URL = "https://a.test/x.safetensors?v=1"


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(tmp_path / "files", clock=lambda: 1000.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"weights")
    return path


def test_a_url_stands_for_a_file_from_then_on(mirror: Mirror, file: Path, tmp_path: Path) -> None:
    assert mirror.find(URL) is None
    assert mirror.copy_to(URL, tmp_path / "copy") is None
    entry = mirror.add(URL, file)
    assert (entry.url, entry.file_name, entry.size_bytes, entry.added_at) == (URL, "x.safetensors", 7, 1000.0)
    assert entry.sha256 == hashlib.sha256(b"weights").hexdigest()
    file.write_bytes(b"changed afterwards")
    assert mirror.find(URL) == mirror.copy_to(URL, tmp_path / "copy") == entry
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert mirror.entries() == [entry]
    assert Mirror(tmp_path / "files").find(URL) == entry


@pytest.mark.parametrize(
    "other", [URL + "&", URL.replace("https", "http"), URL.upper(), URL[:-4], URL + "#x", "a.test/x"]
)
def test_another_url_is_another_url(mirror: Mirror, file: Path, other: str) -> None:
    mirror.add(URL, file)
    assert mirror.find(other) is None


def test_equal_files_are_stored_once(mirror: Mirror, file: Path) -> None:
    for url in (URL, "owner/name", "owner/name/x.safetensors"):
        mirror.add(url, file)
    assert mirror.blobs.ledger.snapshot().total_bytes == 7
    assert len(mirror.entries()) == 3
    assert mirror.remove(URL)
    assert not mirror.remove(URL)
    assert mirror.blobs.ledger.snapshot().total_bytes == 7
    assert mirror.remove("owner/name")
    assert mirror.remove("owner/name/x.safetensors")
    assert mirror.blobs.ledger.snapshot().total_bytes == 0
    assert [path for path in mirror.root.rglob("*") if path.is_file() and path.name not in ("usage", "lock")] == []


def test_a_url_can_stand_for_another_file_later(mirror: Mirror, file: Path, tmp_path: Path) -> None:
    mirror.add(URL, file)
    mirror.copy_to(URL, tmp_path / "before")
    file.write_bytes(b"better weights")
    assert mirror.add(URL, file).size_bytes == 14
    assert mirror.add(URL, file).size_bytes == 14
    mirror.copy_to(URL, tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == b"weights"
    assert (tmp_path / "after").read_bytes() == b"better weights"
    assert mirror.sweep() == 0  # a job still holds the former
    (tmp_path / "before").unlink()
    assert mirror.sweep() == 7
    assert mirror.find(URL) is not None
    assert mirror.blobs.ledger.snapshot().total_bytes == 14


def test_what_crashes_left_goes_once_it_is_old(mirror: Mirror, file: Path) -> None:
    entry = mirror.add(URL, file)
    (mirror.root / "entries").rename(mirror.root / "gone")
    (mirror.root / "tmp/0.part").write_bytes(b"half")
    assert mirror.sweep() == 0
    assert mirror.sweep(grace_s=0) == entry.size_bytes
    left = [path for path in mirror.root.rglob("*") if path.is_file() and path.parent.name != "gone"]
    assert {path.name for path in left} == {"usage", "lock"}


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://a.test/", "data:,x", "https://a b.test/", "https://a.test/\n", "../../etc", "/etc/passwd",
     "owner/name/../../x", "owner/../x", "https://a.test/" + "x" * 9000],
)  # fmt: skip
def test_what_is_neither_url_nor_hub_id_is_refused(mirror: Mirror, file: Path, url: str) -> None:
    with pytest.raises(MirrorError, match="neither an http"):
        mirror.add(url, file)


def test_a_file_that_cannot_be_added_is_named(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for path, told in (
        (tmp_path / "nowhere", "is no file"),
        (tmp_path, "is no file"),
        (tmp_path / "empty", "is empty"),
    ):
        with pytest.raises(MirrorError, match=told):
            mirror.add(URL, path)
    assert mirror.entries() == []


def test_a_list_is_added_whole(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "usb").mkdir()
    for name in ("a.png", "b c.safetensors"):
        (tmp_path / "usb" / name).write_bytes(name.encode())
    (tmp_path / "usb/list.txt").write_text(
        "# what the clients send\n\nhttps://a.test/a.png a.png\nowner/name\tb c.safetensors\n"
        f"{URL} {tmp_path}/usb/a.png\n"
    )
    added = mirror.import_list(tmp_path / "usb/list.txt")
    assert [(entry.url, entry.file_name) for entry in added] == [
        ("https://a.test/a.png", "a.png"),
        ("owner/name", "b c.safetensors"),
        (URL, "a.png"),
    ]


def test_of_a_list_with_mistakes_nothing_is_added(mirror: Mirror, file: Path, tmp_path: Path) -> None:
    lines = [f"{URL} {file.name}", "nonsense x", f"https://a.test/b {file.name}.missing", "https://a.test/c"]
    (tmp_path / "list").write_text("\n".join(lines) + "\n" + "bad x\n" * 20)
    with pytest.raises(MirrorError, match=r"(?s)nothing of .*line 2: .*line 3: .*line 4: .*And 13 more"):
        mirror.import_list(tmp_path / "list")
    assert mirror.entries() == []
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MirrorError, match="cannot be read"):
            mirror.import_list(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MirrorError, match="cannot be read"):
        mirror.import_list(tmp_path / "binary")


def test_what_was_asked_for_is_remembered_until_it_is_added(tmp_path: Path, file: Path) -> None:
    now = 1000.0
    mirror = Mirror(tmp_path / "files", clock=lambda: now)
    mirror.note_missing(URL, "lora")
    now = 2000.0
    mirror.note_missing("owner/name", "lora")
    now = 3000.0
    mirror.note_missing(URL, "image")
    first, second = mirror.missing()
    assert (first.url, first.purpose, first.first_at, first.last_at) == (URL, "image", 1000.0, 3000.0)
    assert second.url == "owner/name"
    mirror.add(URL, file)
    assert [note.url for note in mirror.missing()] == ["owner/name"]


def test_notes_of_what_is_missing_do_not_fill_the_disk(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontextd_server.mirror._MAX_MISSING", 5)
    for number in range(12):
        mirror.note_missing(f"https://a.test/{number}", "image")
    mirror.note_missing("https://a.test/" + "x" * 10_000, "image")
    assert len(mirror.missing()) == 5


def test_a_note_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "files").write_text("no folder")
    Mirror(tmp_path / "files").note_missing(URL, "image")
    assert "could not be noted" in caplog.text


def test_a_damaged_entry_and_a_lost_file_are_named(mirror: Mirror, file: Path, tmp_path: Path) -> None:
    mirror.add(URL, file)
    (content,) = mirror.root.glob("contents/*")
    content.unlink()
    with pytest.raises(StoreUnavailable, match=r"lost.*kontextd mirror add"):
        mirror.copy_to(URL, tmp_path / "copy")
    (entry,) = mirror.root.glob("entries/*")
    entry.write_text("{")
    with pytest.raises(StoreUnavailable, match="damaged"):
        mirror.find(URL)


def test_sweeping_the_file_store_leaves_the_mirror(mirror: Mirror, file: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "files")
    store.put([b"x"], Label())
    mirror.add(URL, file)
    store.sweep()
    assert mirror.copy_to(URL, tmp_path / "copy") is not None
    assert store.usage().used_bytes == 1


def test_processes_add_and_read_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from kontextd_server.mirror import Mirror
folder, own = Path(sys.argv[1]), sys.argv[2]
mirror = Mirror(folder / "files")
for number in range(12):
    (folder / f"{own}.bin").write_bytes(f"{number % 3}".encode() * 10)
    mirror.add("https://a.test/shared", folder / f"{own}.bin")
    mirror.note_missing(f"https://a.test/{own}{number}", "image")
    entry = mirror.copy_to("https://a.test/shared", folder / f"{own}-{number}")
    assert entry and len(set((folder / f"{own}-{number}").read_bytes())) == 1
    mirror.add(f"https://a.test/own{own}", folder / f"{own}.bin")
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stderr=subprocess.PIPE) for name in "abc"
    ]
    assert [process.communicate(timeout=60)[1] for process in started] == [b"", b"", b""]
    mirror = Mirror(tmp_path / "files")
    assert len(mirror.entries()) == 4
    assert len(mirror.missing()) == 36


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=300))
def test_any_reference_may_be_looked_up(mirror: Mirror, reference: str) -> None:
    assert mirror.find(reference) is None
    mirror.note_missing(reference, "image")
    assert add_command(reference).startswith("kontextd mirror add ")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab./-_:%\\ ", max_size=40))
def test_no_hub_id_climbs(text: str) -> None:
    found = HUB_ID.fullmatch(text)
    if found:
        assert not {".", "..", ""} & set(text.split("/")[:2])
        assert ".." not in text.split("/")
        assert not set(text) & set(":%\\ ")
