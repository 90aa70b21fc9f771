"""`kontextd files` as an operator meets it: files of several owners and ages, in a real folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kontextd_server.cli import main
from kontextd_server.files import FolderStore, Label
from kontextd_server.mirror import Mirror

DAY_S = 86400.0
Files = Callable[..., int]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return lambda action, *arguments: main(["files", action, "--data", str(tmp_path), *arguments])


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """The file store of the data folder `tmp_path`."""
    return FolderStore(tmp_path / "files")


def kept(store: FolderStore, content: bytes, *, days_ago: float = 0, **label: object) -> str:
    """The key of a file that was stored then."""
    store.clock = lambda: time.time() - days_ago * DAY_S
    key = store.put([content], Label(**{"file_name": "cat.png", "content_type": "image/png", "owner": "anna"} | label))
    store.clock = time.time
    return key.key


def listed(files: Files, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert files("list", "--json", *arguments) == 0
    return [file["key"] for file in json.loads(capsys.readouterr().out)]


def test_list_shows_the_newest_first_with_owner_size_age_and_end(
    store: FolderStore, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    old = kept(store, b"old", days_ago=10, owner=None)
    new = kept(store, b"newer", days_ago=1, owner="bert", lifetime_s=3.5 * DAY_S)
    kept(store, b"expired", days_ago=2, lifetime_s=DAY_S)
    assert files("list") == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["owner", "bytes", "age", "expires", "file"]
    assert first.split() == ["bert", "5", "1.0", "d", "2.5", "d", new]
    assert second.split() == ["-", "3", "10.0", "d", "never", old]


def test_list_can_be_narrowed(store: FolderStore, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {days: kept(store, b"x" * (days + 1), days_ago=days, owner=f"of-{days % 2}") for days in range(4)}
    assert listed(files, capsys) == list(keys.values())
    assert listed(files, capsys, "--limit", "2") == [keys[0], keys[1]]
    assert listed(files, capsys, "--owner", "of-1") == [keys[1], keys[3]]
    assert listed(files, capsys, "--older-than", "36h") == [keys[2], keys[3]]
    assert listed(files, capsys, "--older-than", "36h", "--owner", "of-0") == [keys[2]]
    assert listed(files, capsys, "--owner", "nobody") == []


@pytest.mark.parametrize("limit", ["0", "-1", "100001"])
def test_a_limit_that_cannot_be_is_refused(
    store: FolderStore, files: Files, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    assert files("list", "--limit", limit) == 2
    assert f"--limit is {limit}; use 1 to 100000." in capsys.readouterr().err


@pytest.mark.parametrize("front", ["", "http://box:8000/files/", "https://v3.fal.media/files/"])
def test_show_tells_all_of_a_file_by_its_key_or_any_url(
    store: FolderStore, files: Files, capsys: pytest.CaptureFixture[str], front: str
) -> None:
    key = kept(store, b"abc", file_name="mein bild.png")
    assert files("show", front + key, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("created_at") <= time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    assert told == {
        "key": key,
        "owner": "anna",
        "file_name": "mein bild.png",
        "content_type": "image/png",
        "size_bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "expires_at": None,
    }
    assert files("show", front + key) == 0
    assert "size_bytes   3" in capsys.readouterr().out.splitlines()


def test_delete_removes_each_that_it_is_told_and_frees_its_bytes(
    store: FolderStore, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, left = (kept(store, content) for content in (b"one", b"two", b"left"))
    assert files("delete", one, f"http://box/files/{two}", one) == 0
    assert capsys.readouterr().out == f"{one} deleted\n{two} deleted\n"
    assert [file.key for file in store.all()] == [left]
    assert store.usage().used_bytes == 4
    assert files("delete", left, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"key": left, "status": "deleted"}]


@pytest.mark.parametrize("action", ["show", "delete"])
@pytest.mark.parametrize("wrong", ["nope", "../jobs.sqlite", "https://cdn.example/cat.png", ""])
def test_of_a_file_that_is_not_there_nothing_else_goes_either(
    store: FolderStore, files: Files, capsys: pytest.CaptureFixture[str], action: str, wrong: str
) -> None:
    key = kept(store, b"x")
    assert files(action, *([key] if action == "delete" else []), wrong) == 2
    assert capsys.readouterr().err == f"kontextd: there is no file {wrong!r}; see kontextd files list.\n"
    assert store.info(key)


def test_prune_removes_what_is_older_and_leaves_the_mirror(
    store: FolderStore, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "old.png"
    picture.write_bytes(b"old")
    Mirror(store.root).add("https://cdn.example/old.png", picture)
    old = kept(store, b"old", days_ago=31)  # the same bytes as the mirror's
    other, young = kept(store, b"other", days_ago=31, owner="bert"), kept(store, b"young", days_ago=29)
    assert files("prune", "--older-than", "30d", "--dry-run") == 0
    assert capsys.readouterr().out == "would delete 2 files of 8 bytes\n"
    assert {file.key for file in store.all()} == {old, other, young}
    assert files("prune", "--older-than", "30d", "--owner", "bert", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"files": 1, "size_bytes": 5, "dry_run": False}
    assert files("prune", "--older-than", "30d") == 0
    assert capsys.readouterr().out == "deleted 1 files of 3 bytes\n"
    assert [file.key for file in store.all()] == [young]
    assert Mirror(store.root).copy_to("https://cdn.example/old.png", tmp_path / "copy") is not None


def test_prune_wants_to_be_told_an_age(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--older-than", "30"]):
        with pytest.raises(SystemExit) as ended:
            files("prune", *arguments)
        assert ended.value.code == 2
        assert "--older-than" in capsys.readouterr().err


@pytest.mark.parametrize("action", [["list"], ["show", "x"], ["delete", "x"], ["prune", "--older-than", "1d"]])
def test_where_there_is_no_store_none_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    data = tmp_path / "mistyped"
    assert main(["files", *action, "--data", str(data)]) == 2
    assert f"there is no file store at {data / 'files'}: check --data or --files." in capsys.readouterr().err
    assert not data.exists()
