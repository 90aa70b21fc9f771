"""Names of results, and what is never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from kontextd_server.picture_files import UsageError, save, targets
from PIL import Image


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64), (200, 100, 50)).save(path)
    return path


def test_without_a_name_the_result_lies_beside_the_input(photo: Path) -> None:
    assert targets(photo, None, 1) == [photo.with_name("photo.edited.png")]


def test_several_pictures_are_numbered(photo: Path) -> None:
    assert [path.name for path in targets(photo, photo.with_name("a.jpg"), 3)] == ["a-0.jpg", "a-1.jpg", "a-2.jpg"]


def test_the_input_is_never_the_output_whatever_it_is_called(photo: Path) -> None:
    link = photo.with_name("link.jpg")
    link.symlink_to(photo)
    for name in (photo, link, photo.parent / "." / "photo.jpg"):
        with pytest.raises(UsageError, match="the input itself"):
            targets(photo, name, 1)
    numbered = photo.rename(photo.with_name("a-1.png"))
    with pytest.raises(UsageError, match=r"a-1\.png is the input itself"):
        targets(numbered, photo.with_name("a.png"), 2)


@pytest.mark.parametrize("name", ["out.bmp", "out", "out.png.webp"])
def test_a_name_of_another_format_is_refused(photo: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"name it \.png, \.jpg or \.jpeg"):
        targets(photo, photo.with_name(name), 1)


def test_a_folder_that_does_not_exist_is_refused(photo: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        targets(photo, photo.parent / "nowhere/out.png", 1)


def test_a_folder_in_the_place_of_the_file_is_refused(photo: Path) -> None:
    (photo.parent / "out.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        targets(photo, photo.parent / "out.png", 1)


def test_a_picture_that_cannot_be_written_leaves_the_old_one_whole(photo: Path) -> None:
    before = photo.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):  # JPEG takes no RGBA: the write fails half way
        save(Image.new("RGBA", (64, 64)), photo)
    assert photo.read_bytes() == before
    assert list(photo.parent.iterdir()) == [photo]


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG")])
def test_the_ending_decides_the_format(tmp_path: Path, name: str, kind: str) -> None:
    save(Image.new("RGB", (64, 64), (1, 2, 3)), tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.format == kind
