"""The embedded model does what its card promises, on photos that it was not trained on. `make bench` measures more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kontextd_models import EngineConfig, load_engine
from kontextd_models.alignment import displacement
from kontextd_models.embedded import edits, sample_photo, wordings
from kontextd_models.embedded.evaluate import as_tensor, edited, evaluate, fitted, psnr
from kontextd_models.engine import Engine
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

STEPS = 8  # 30 are the default; eight show the same and keep the test short
RECOGNISABLE_DB = 20.0
MARGIN_DB = 0.5  # the gates are for thirty steps and a mean over many photos


@pytest.fixture(scope="module")
def engine(embedded_folder: Path) -> Engine:
    return load_engine(EngineConfig(model=embedded_folder, device="cpu"))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Four photos of scikit-image and scikit-learn: a face, a cat, a temple, a flower."""
    china, flower = load_sample_images().images
    return [Image.fromarray(pixels) for pixels in (data.astronaut(), data.chelsea(), china, flower)]


def test_every_instruction_is_followed_on_photos_the_model_never_saw(engine: Engine, photos: list[Image.Image]) -> None:
    rows = list(evaluate(engine, photos, STEPS))
    assert len(rows) == len([edit for edit in edits.EDITS if edit.kind != "random"]) + 2
    assert [miss for row in rows for miss in row.misses(MARGIN_DB)] == []


def test_four_steps_are_recognisable_already(engine: Engine, photos: list[Image.Image]) -> None:
    for name in ("black and white", "invert", "flip horizontally", "left half blue"):
        before = fitted(photos[1], (256, 256))
        exact = edits.apply(as_tensor(before), (edits.NAMES.index(name),), random.Random(0))
        prompt = wordings.WORDINGS[edits.NAMES.index(name)][0].replace("{o}", "it")
        assert psnr(as_tensor(edited(engine, before, prompt, 4, 1)), exact) > RECOGNISABLE_DB


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_an_instruction_is_followed_at_other_guidance_scales(
    engine: Engine, photos: list[Image.Image], guidance_scale: float
) -> None:
    before = fitted(photos[0], (256, 256))
    exact = edits.apply(as_tensor(before), (edits.NAMES.index("sepia"),), random.Random(0))
    assert psnr(as_tensor(edited(engine, before, "make it sepia", STEPS, 1, guidance_scale)), exact) > 24


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (192, 320)])
def test_an_edit_that_changes_nothing_comes_back_where_it_was(
    engine: Engine, photos: list[Image.Image], size: tuple[int, int]
) -> None:
    for photo in photos[:2]:
        before = fitted(photo, size)
        after = edited(engine, before, engine.model.card.identity_prompt, STEPS, 3)
        assert after.size == size
        assert np.abs(displacement(np.asarray(before), np.asarray(after))).max() < 0.5


@pytest.mark.parametrize("name", [edit.name for edit in edits.EDITS if edit.kind == "random"])
def test_a_random_edit_differs_with_its_seed_and_repeats_with_it(
    engine: Engine, photos: list[Image.Image], name: str
) -> None:
    before = fitted(photos[0], (256, 256))
    prompt = wordings.WORDINGS[edits.NAMES.index(name)][0].replace("{o}", "it")
    one, again, other = (as_tensor(edited(engine, before, prompt, STEPS, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert psnr(one, as_tensor(before)) < 26
    assert psnr(one, other) < 34  # a sky with other stars differs little


@pytest.fixture
def files(embedded_folder: Path) -> Iterator[list[Path]]:
    return [path for path in embedded_folder.rglob("*") if path.is_file()]


def test_the_model_is_small_and_says_that_it_is_a_demonstration(engine: Engine, files: list[Path]) -> None:
    assert sum(path.stat().st_size for path in files) < 30e6
    card = engine.model.card
    assert card.demonstration
    assert "demonstration" in card.name
    assert card.instructions == edits.NAMES


def test_every_wording_fits_the_encoders(engine: Engine) -> None:
    tokenizer = engine.model.pipeline.tokenizer_2
    rng = random.Random(0)
    longest = max(len(tokenizer(wordings.joined(*rng.sample(edits.COLOUR, 2), rng)).input_ids) for _ in range(500))
    assert longest <= tokenizer.model_max_length


def test_the_sample_photo_is_one() -> None:
    with Image.open(sample_photo()) as photo:
        assert min(photo.size) >= 256
