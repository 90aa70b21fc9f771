"""`kontextd mirror` as an operator meets it. What the mirror does with its files is tested in test_mirror.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from kontextd_server.cli import main
from kontextd_server.mirror import Mirror

URL = "https://cdn.example/cat.jpg?v=2"
HUB_ID = "owner/name"
MirrorCommand = Callable[..., int]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def mirror(files: Path) -> MirrorCommand:
    return lambda action, *arguments: main(["mirror", action, "--files", str(files), *map(str, arguments)])


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")
    return path


def test_a_url_stands_for_a_copy_of_a_file(
    files: Path, mirror: MirrorCommand, cat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mirror("add", URL, cat) == 0
    assert capsys.readouterr().out.split() == [sha256(b"a cat").hexdigest()[:16], "5", URL]
    cat.unlink()
    copy = files.parent / "copy"
    assert Mirror(files).copy_to(URL, copy) is not None
    assert copy.read_bytes() == b"a cat"


def test_list_and_remove(mirror: MirrorCommand, cat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (URL, HUB_ID):
        mirror("add", url, cat)
    capsys.readouterr()
    assert mirror("list") == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [URL, HUB_ID]
    assert mirror("remove", URL) == 0
    assert capsys.readouterr().err == f"removed {URL}\n"
    assert mirror("list", "--json") == 0
    (left,) = json.loads(capsys.readouterr().out)
    assert (left["url"], left["size_bytes"], left["file_name"]) == (HUB_ID, 5, "cat.jpg")
    assert mirror("remove", URL) == 2
    assert f"{URL!r} is not mirrored; see kontextd mirror list." in capsys.readouterr().err
    assert mirror("remove", HUB_ID, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"url": HUB_ID, "status": "removed"}


def test_a_list_is_imported_whole_or_not_at_all(
    files: Path, mirror: MirrorCommand, cat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = cat.with_name("list.txt")
    wanted.write_text(f"# ours\n{URL} cat.jpg\n{HUB_ID} gone.safetensors\n")
    assert mirror("import", wanted) == 2
    assert "line 3: " in capsys.readouterr().err
    assert Mirror(files).entries() == []
    wanted.write_text(f"# ours\n{URL} cat.jpg\n{HUB_ID} cat.jpg\n")
    assert mirror("import", wanted, "--json") == 0
    assert [entry["url"] for entry in json.loads(capsys.readouterr().out)] == [URL, HUB_ID]


def test_missing_shows_what_was_asked_for_until_it_is_there(
    files: Path, mirror: MirrorCommand, cat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter((1_700_000_000.0, 1_700_000_060.0))
    asked = Mirror(files, clock=lambda: next(now))
    asked.note_missing(URL, "image")
    asked.note_missing(HUB_ID, "lora")
    assert mirror("missing") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["2023-11-14T22:14:20+00:00", "lora", HUB_ID],
        ["2023-11-14T22:13:20+00:00", "image", URL],
    ]
    mirror("add", HUB_ID, cat)
    capsys.readouterr()
    assert mirror("missing", "--json") == 0
    assert [(note["url"], note["purpose"]) for note in json.loads(capsys.readouterr().out)] == [(URL, "image")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "ftp://x/y", "{cat}"], "is neither an http(s) URL nor a hub id such as owner/name."),
        (["add", URL, "{cat}.gone"], "is no file; check the path."),
        (["import", "{cat}.gone"], "cannot be read"),
    ],
)
def test_a_mistake_ends_with_2_and_its_remedy(
    mirror: MirrorCommand, cat: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert mirror(*(part.format(cat=cat) for part in arguments)) == 2
    assert said in capsys.readouterr().err


def test_the_mirror_lies_in_the_files_of_the_data_folder_and_looking_makes_none(tmp_path: Path, cat: Path) -> None:
    data = tmp_path / "data"
    for action in ("list", "missing"):
        assert main(["mirror", action, "--data", str(data)]) == 0
        assert not data.exists()
    assert main(["mirror", "add", URL, str(cat), "--data", str(data)]) == 0
    assert Mirror(data / "files").find(URL) is not None
