"""What is edited: photos × prompts × sets of LoRAs, each at the size of its output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kontextd_models import LoraWeight
from kontextd_models.errors import ImageLoadError, InputError, InvalidValue
from kontextd_models.intake import open_image
from kontextd_models.limits import ModelLimits
from kontextd_models.trials.cases import Case, LoraSet, cases, photos, thinned
from PIL import Image

LIMITS = ModelLimits(
    preferred_sizes=((64, 64), (80, 48), (48, 80)),
    native_area=64 * 64,
    max_area=128 * 128,
    min_area=32 * 32,
    min_input_side=16,
)
INK = LoraSet((LoraWeight(Path("ink.safetensors"), 0.5), LoraWeight(Path("/x/y.safetensors"), 1.0, "library:wash")))


@pytest.fixture
def folder(tmp_path: Path, photo: Callable[[int, int], Image.Image]) -> Path:
    for name, size in (("b.png", (100, 60)), ("a.jpg", (64, 64)), ("c.png", (90, 54))):
        photo(*size).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    return tmp_path


def test_a_folder_gives_its_photos_in_the_order_of_their_names_and_passes_other_files_by(folder: Path) -> None:
    assert [photo.name for photo in photos([folder], LIMITS)] == ["a", "b", "c"]


def test_photos_of_one_name_are_told_apart(folder: Path) -> None:
    assert [photo.name for photo in photos([folder / "a.jpg", folder / "a.jpg"], LIMITS)] == ["a 1", "a 2"]


def test_a_number_that_is_another_photo_s_name_is_passed_over(
    tmp_path: Path, photo: Callable[[int, int], Image.Image]
) -> None:
    for name in ("cat 2.jpg", "cat.jpg", "cat.png"):
        photo(64, 64).save(tmp_path / name)
    assert [photo.name for photo in photos([tmp_path], LIMITS)] == ["cat 2", "cat 1", "cat 3"]


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageLoadError, match="holds no photo; name a file, or a folder"):
        photos([tmp_path], LIMITS)


def test_a_file_that_is_no_photo_is_named_among_several(folder: Path) -> None:
    """As it would be alone, and once."""
    for name in ("notes.txt", "absent.png", "broken.png"):
        bad = folder / name
        if name == "broken.png":
            bad.write_bytes((folder / "c.png").read_bytes()[:200])
        with pytest.raises(InputError) as alone:
            open_image(bad)
        with pytest.raises(type(alone.value)) as caught:
            photos([folder / "a.jpg", bad, folder / "b.png"], LIMITS)
        assert str(caught.value).startswith(str(bad))
        assert str(caught.value).count(str(bad)) == 1
        assert str(caught.value).endswith(str(alone.value))
        assert caught.value.field == alone.value.field


def test_every_combination_is_there_ordered_by_loras_and_then_by_size(folder: Path) -> None:
    found = cases(photos([folder], LIMITS), ["x", "y"], [LoraSet(), INK], LIMITS)
    assert [(case.loras.name, case.size, case.photo, case.prompt) for case in found[:6]] == [
        ("no LoRA", (64, 64), "a", "x"),
        ("no LoRA", (64, 64), "a", "y"),
        ("no LoRA", (80, 48), "b", "x"),
        ("no LoRA", (80, 48), "b", "y"),
        ("no LoRA", (80, 48), "c", "x"),
        ("no LoRA", (80, 48), "c", "y"),
    ]
    assert {case.loras.name for case in found[6:]} == {"ink:0.5 + library:wash:1"}
    assert len(found) == 12


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        (["a/ink.safetensors", "b/wash.safetensors"], ["ink:1", "wash:1"]),
        (["a/ink.safetensors", "b/ink.safetensors"], ["a/ink:1", "b/ink:1"]),
        (["/x/a/ink.safetensors", "/y/a/ink.safetensors", "b/ink.safetensors"], ["x/a/ink:1", "y/a/ink:1", "b/ink:1"]),
        (["ink.safetensors", "x/ink.safetensors"], ["ink:1", "x/ink:1"]),
        (["a/ink.safetensors", "a/ink"], ["a/ink.safetensors:1", "a/ink:1"]),
        (["a/ink.safetensors", "a/ink.safetensors"], ["ink:1"]),
    ],
)
def test_sets_of_loras_are_told_apart_by_the_shortest_end_of_their_paths(
    folder: Path, typed: list[str], names: list[str]
) -> None:
    sets = [LoraSet((LoraWeight(Path(text), 1.0, text),)) for text in typed]
    found = cases(photos([folder / "a.jpg"], LIMITS), ["x"], sets, LIMITS)
    assert [case.loras.name for case in found] == names
    assert [case.loras.loras for case in found] == [one.loras for one in sets[: len(names)]]


def test_scales_that_differ_in_a_late_digit_only_are_told_apart(folder: Path) -> None:
    sets = [LoraSet((LoraWeight(Path("ink.safetensors"), scale),)) for scale in (0.5, 0.50000001)]
    found = cases(photos([folder / "a.jpg"], LIMITS), ["x"], sets, LIMITS)
    assert [case.loras.name for case in found] == ["ink:0.5", "ink:0.50000001"]


def test_a_size_is_made_of_the_middle_of_the_photo(folder: Path) -> None:
    found = cases(photos([folder / "b.png"], LIMITS), ["x"], [LoraSet()], LIMITS, [(64, 64), (96, 96)])
    assert [case.size for case in found] == [(64, 64), (96, 96)]


def test_a_size_that_the_model_would_change_is_refused_with_what_it_would_make(folder: Path) -> None:
    with pytest.raises(InvalidValue, match=r"sizes holds 70x70, which the model makes as 64x64; give that") as caught:
        cases(photos([folder / "b.png"], LIMITS), ["x"], [LoraSet()], LIMITS, [(70, 70)])
    assert caught.value.field == "sizes"


def test_thinned_cases_keep_as_many_of_each_set_of_loras_spread_over_photos_and_prompts(folder: Path) -> None:
    found = cases(photos([folder], LIMITS), ["x", "y"], [LoraSet(), INK], LIMITS)
    kept = thinned(found, 7)
    assert [(case.loras.name, case.photo, case.prompt) for case in kept if not case.loras.loras] == [
        ("no LoRA", "a", "x"),
        ("no LoRA", "b", "x"),
        ("no LoRA", "c", "x"),
    ]
    assert len(kept) == 6
    assert thinned(found, 99) == found


def test_sets_of_one_name_are_thinned_each_for_itself() -> None:
    """Whoever makes cases by hand gives names that are not told apart."""
    image = Image.new("RGB", (64, 64))
    sets = [LoraSet((LoraWeight(Path(place) / "ink.safetensors"),)) for place in ("a", "b")]
    found = [Case("photo", image, prompt, loras) for loras in sets for prompt in ("x", "y")]
    assert thinned(found, 2) == [found[0], found[2]]
