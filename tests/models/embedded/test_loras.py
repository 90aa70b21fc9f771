"""The LoRAs that ship do what their names say, on photos they were not trained on. `make bench` measures more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kontextd_models import EngineConfig, load_engine
from kontextd_models.embedded import lora_file
from kontextd_models.embedded.evaluate_styles import evaluate_pairs, evaluate_styles
from kontextd_models.embedded.export_loras import DIALECTS
from kontextd_models.embedded.styles import STYLES
from kontextd_models.engine import Engine
from kontextd_models.lora.layout import layout_of
from kontextd_models.lora.reading import read_adapter
from kontextd_models.records import LoraLimits
from PIL import Image
from skimage import data

STEPS = 8  # 30 are the default
MARGIN_DB = 1.0  # the gates are for thirty steps and a mean over many photos


@pytest.fixture(scope="module")
def engine(embedded_folder: Path) -> Engine:
    return load_engine(EngineConfig(model=embedded_folder, device="cpu"))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in (data.astronaut(), data.chelsea())]


def test_every_lora_draws_its_style_and_half_of_it_at_half_its_scale(engine: Engine, photos: list[Image.Image]) -> None:
    rows = list(evaluate_styles(engine, photos, STEPS))
    assert {row.style for row in rows} == set(STYLES)
    assert [miss for row in rows for miss in row.misses(MARGIN_DB)] == []


def test_two_loras_at_once_are_nearer_to_both_styles_than_either_alone(
    engine: Engine, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {style: STYLES[style] for style in ("duotone", "vignette")}
    monkeypatch.setattr("kontextd_models.embedded.evaluate_styles.STYLES", pair)
    assert [miss for row in evaluate_pairs(engine, photos, STEPS) for miss in row.misses()] == []


@pytest.mark.parametrize("style", STYLES)
def test_each_is_in_another_dialect_and_fits_the_model_whole(engine: Engine, style: str) -> None:
    adapter = read_adapter(lora_file(style), layout_of(engine.model.pipeline), LoraLimits())
    assert adapter.coverage.is_whole
    assert adapter.coverage.dialects == (
        {"duotone": "diffusers", "vignette": "kohya", "pixelate": "ComfyUI", "line-drawing": "OneTrainer"}[style],
    )
    assert len(set(DIALECTS.values())) == len(STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_an_exact_style_stays_within_the_range_of_colours(style: str) -> None:
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    styled = STYLES[style](image)
    assert styled.shape == image.shape
    assert styled.min() >= 0
    assert styled.max() <= 1
    assert not torch.equal(styled, image)
