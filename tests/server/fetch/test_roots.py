"""LoRA files where they lie: what `studio:styles/ink` finds, and that nothing outside of the folder is ever found."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kontextd_server.fetch import Fetched, Purpose, Source
from kontextd_server.fetch.errors import (
    FetchError,
    InputTooLarge,
    InvalidReference,
    NotInRoot,
    NotMirrored,
    NotWeights,
    RootUnavailable,
    UnknownRoot,
)
from kontextd_server.fetch.roots import LoraRoots, parse_roots
from loopback import Bench

Find = Callable[[str], Fetched]


@pytest.fixture
def root(tmp_path: Path, safetensors: bytes) -> Path:
    """Of the name studio: ink and a folder of styles. Beside it lies what nobody may get at."""
    folder = tmp_path / "srv" / "loras"
    (folder / "styles").mkdir(parents=True)
    (folder / "ink.safetensors").write_bytes(safetensors)
    (folder / "styles" / "grün v2.safetensors").write_bytes(safetensors + b"!")
    (tmp_path / "srv" / "secret.safetensors").write_bytes(safetensors)
    return folder


@pytest.fixture
def find(bench: Bench, root: Path) -> Find:
    bench.roots = LoraRoots({"studio": root, "library": root.parent / "nothing was added yet"})
    return lambda reference: bench.fetcher().fetch(reference, Purpose.LORA, bench.into())


@pytest.mark.parametrize("reference", ["studio:ink.safetensors", "studio:ink", " studio:ink ", "Studio:ink"])
def test_a_file_is_found_with_its_ending_and_without(find: Find, root: Path, reference: str) -> None:
    fetched = find(reference)
    assert (fetched.path, fetched.source) == (root / "ink.safetensors", Source.ROOT)
    assert fetched.size_bytes == fetched.path.stat().st_size


def test_a_file_is_read_where_it_lies_and_never_copied(find: Find, bench: Bench, root: Path) -> None:
    fetched = find("studio:styles/grün v2")
    assert fetched.path == root / "styles" / "grün v2.safetensors"
    assert fetched.path.stat().st_nlink == 1
    assert [path for path in bench.folder.iterdir() if path.name.startswith("into")] == []


def test_a_name_means_the_file_and_not_a_folder_of_the_same_name(find: Find, root: Path) -> None:
    (root / "ink").mkdir()
    assert find("studio:ink").path == root / "ink.safetensors"


def test_links_within_the_root_are_followed_and_a_root_may_be_a_link(
    find: Find, bench: Bench, root: Path, tmp_path: Path
) -> None:
    (root / "latest.safetensors").symlink_to("styles/grün v2.safetensors")
    (tmp_path / "mnt").symlink_to(root)
    bench.roots = LoraRoots({"studio": tmp_path / "mnt"})
    assert find("studio:latest").path == root / "styles" / "grün v2.safetensors"


@pytest.mark.parametrize(
    "inside",
    [
        "../secret", "../secret.safetensors", "styles/../../secret", "styles/../ink", "..", ".", "./ink", "",
        "/ink", "//ink", "/etc/passwd", "styles//ink", "ink/", "styles/", "..\\secret", "styles\\ink", "\\\\srv\\ink",
        "ink\0", "ink\0.safetensors", "\nink", "ink\x7f", ".hidden", "styles/.hidden/x", "x" * 1001,
    ],
)  # fmt: skip
def test_what_is_no_path_in_a_root_is_refused(find: Find, root: Path, inside: str) -> None:
    with pytest.raises(InvalidReference, match=r"is no path in a root\. Write ROOT:folder/name") as caught:
        find(f"studio:{inside}")
    assert str(root.parent) not in str(caught.value)


@pytest.mark.parametrize(
    "inside",
    [
        "%2e%2e/secret", "%2e%2e%2fsecret", "x..%2fsecret", "%252e%252e%252fsecret", "styles%2fink", "ink%00",
        "nothing", "nothing/at/all", "ink.safetensors/x", "styles", "INK", "x" * 1000, "x" * 300, "\udcff", chr(0xD800),
        "．．/secret", "∕etc∕passwd", "~/ink", "$HOME", "*", "ink;", "ink?v=1",
    ],
)  # fmt: skip
def test_what_is_written_is_taken_as_it_is_written(find: Find, root: Path, inside: str) -> None:
    """No escapes, no look-alikes, no patterns, no variables."""
    with pytest.raises(NotInRoot, match=r"the root 'studio' holds no such file") as caught:
        find(f"studio:{inside}")
    assert str(root.parent) not in str(caught.value)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "{outside}", "loop.safetensors", "gone"])
def test_a_link_out_of_the_root_leads_nowhere(find: Find, root: Path, target: str) -> None:
    (root / "loop.safetensors").symlink_to(target.format(outside=root.parent / "secret.safetensors"))
    with pytest.raises(NotInRoot):
        find("studio:loop")


def test_a_folder_that_is_a_link_out_of_the_root_leads_nowhere(find: Find, root: Path) -> None:
    (root / "up").symlink_to(root.parent)
    with pytest.raises(NotInRoot):
        find("studio:up/secret")
    assert find("studio:ink").path == root / "ink.safetensors"


def test_a_neighbour_whose_name_begins_alike_is_outside(find: Find, root: Path, safetensors: bytes) -> None:
    neighbour = root.parent / "loras-private"
    neighbour.mkdir()
    (neighbour / "x.safetensors").write_bytes(safetensors)
    (root / "x.safetensors").symlink_to(neighbour / "x.safetensors")
    with pytest.raises(NotInRoot):
        find("studio:x")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_what_is_no_plain_file_is_not_even_opened(
    find: Find, root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(root)  # a socket's path has 108 characters at most
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("x.safetensors")
    with pytest.raises(NotInRoot):
        find("studio:x")


def test_what_lies_in_a_root_has_the_limits_of_a_download(find: Find, bench: Bench, root: Path) -> None:
    (root / "page.safetensors").write_bytes(b"<!doctype html>")
    (root / "old.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(NotWeights, match="studio:page gave an HTML page"):
        find("studio:page")
    with pytest.raises(NotWeights, match="pickled checkpoint"):
        find("studio:old.pt")
    bench.set(max_bytes=10)
    with pytest.raises(InputTooLarge, match="studio:ink has"):
        find("studio:ink")


def test_an_unknown_root_is_told_with_those_that_exist(find: Find, bench: Bench) -> None:
    with pytest.raises(UnknownRoot, match=re.escape("no LoRA root 'studoi'; it has: library, studio.")):
        find("studoi:ink")
    bench.roots = LoraRoots()
    with pytest.raises(UnknownRoot, match="it has none"):
        find("studio:ink")


def test_an_offline_box_reads_its_roots(find: Find, bench: Bench, root: Path) -> None:
    bench.config = replace(bench.config, offline=True)
    assert find("studio:ink").path == root / "ink.safetensors"
    with pytest.raises(UnknownRoot):
        find("studoi:ink")
    assert bench.mirror.missing() == []


def test_a_path_without_its_root_is_told_how_to_write_it(find: Find) -> None:
    """It looks like the id of a repository."""
    with pytest.raises(NotMirrored, match=r"write ROOT:path; its roots: library, studio\."):
        find("styles/ink.safetensors")
    for reference in ("ink", "studio"):
        with pytest.raises(InvalidReference, match="a path in a root of this server: library, studio"):
            find(reference)


def test_a_root_whose_share_is_not_mounted_is_told_without_its_folder(find: Find, bench: Bench, root: Path) -> None:
    bench.roots = LoraRoots({"studio": root / "not mounted"})
    with pytest.raises(RootUnavailable, match=r"the root 'studio' cannot be read now\. The operator") as caught:
        find("studio:ink")
    assert "not mounted" not in str(caught.value)


def test_an_empty_library_has_no_file(find: Find) -> None:
    with pytest.raises(NotInRoot, match="the root 'library' holds no such file"):
        find("library:ink")


def test_images_come_from_no_root(find: Find, bench: Bench) -> None:
    with pytest.raises(FetchError):
        bench.fetcher().fetch("studio:ink", Purpose.IMAGE, bench.into())


@pytest.mark.parametrize(
    "parts",
    [["studio"], ["studio="], ["studio=loras"], ["=/srv"], ["a=/srv"], ["http=/srv"], ["Studio=/srv"], ["st udio=/srv"],
     ["library=/srv"], ["studio=/a", "studio=/b"], ["studio:x=/srv"], ["-studio=/srv"]],
)  # fmt: skip
def test_a_root_that_cannot_be_is_refused_at_the_start(parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"NAME=/absolute/folder|no name for a root|is taken"):
        parse_roots(parts)


def test_roots_are_named_folders() -> None:
    assert parse_roots(["studio=/srv/loras", "team-2 = /mnt/a=b"]) == {
        "studio": Path("/srv/loras"),
        "team-2": Path("/mnt/a=b"),
    }
