"""Our loop is `FluxKontextPipeline.__call__`, to the bit. Everything goes through the engine's door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxKontextPipeline
from kontextd_models import Done, EditRequest, EngineConfig, ResolutionMode
from kontextd_models.encode import prepare_reference
from kontextd_models.engine import Engine
from PIL import Image

Photo = Callable[[int, int], Image.Image]
PROMPT = "make it black and white"


def result(engine: Engine, request: EditRequest) -> Done:
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def stock_pipeline(folder: Path) -> FluxKontextPipeline:
    """As any user of diffusers loads it."""
    pipeline = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_edit(pipeline: FluxKontextPipeline, request: EditRequest, done: Done) -> Image.Image:
    size = done.size
    return pipeline(
        image=prepare_reference(request.image, size.reference_width, size.reference_height),
        prompt=request.prompt,
        width=size.width,
        height=size.height,
        max_area=size.width * size.height,
        _auto_resize=False,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(done.seeds[0]),
        max_sequence_length=min(512, pipeline.tokenizer_2.model_max_length),
    ).images[0]


def assert_equal_to_the_bit(ours: Image.Image, theirs: Image.Image) -> None:
    assert ours.size == theirs.size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(
    ("size", "mode", "steps", "guidance", "prompt"),
    [
        ((64, 64), ResolutionMode.MATCH_INPUT, 1, 2.5, PROMPT),
        ((64, 64), ResolutionMode.MATCH_INPUT, 7, 0.0, ""),
        ((80, 48), ResolutionMode.MATCH_INPUT, 3, 2.5, "Make it RED!"),
        ((32, 128), ResolutionMode.MATCH_INPUT, 2, 20.0, PROMPT),
        ((100, 60), ResolutionMode.MATCH_INPUT, 2, 3.5, PROMPT),
        ((300, 170), ResolutionMode.AUTO, 2, 2.5, PROMPT),
        ((128, 72), ResolutionMode.R1_1, 3, 2.5, PROMPT),
        ((128, 72), ResolutionMode.R9_16, 3, 2.5, PROMPT),
        ((64, 64), ResolutionMode.MATCH_INPUT, 2, 2.5, "the quick brown fox jumps over the lazy dog " * 9),
    ],
)
def test_an_edit_equals_the_stock_pipeline_to_the_bit(
    tiny_folder: Path,
    photo: Photo,
    size: tuple[int, int],
    mode: ResolutionMode,
    steps: int,
    guidance: float,
    prompt: str,
) -> None:
    request = EditRequest(photo(*size), prompt, steps, 11, guidance, resolution_mode=mode, enable_safety_checker=False)
    done = result(Engine.load(EngineConfig(model=tiny_folder, device="cpu")), request)
    assert_equal_to_the_bit(done.images[0], stock_edit(stock_pipeline(tiny_folder), request, done))


def test_the_ratio_modes_above_have_a_reference_on_a_grid_of_its_own(tiny_folder: Path, photo: Photo) -> None:
    request = EditRequest(photo(128, 72), PROMPT, 1, resolution_mode=ResolutionMode.R1_1, enable_safety_checker=False)
    size = result(Engine.load(EngineConfig(model=tiny_folder, device="cpu")), request).size
    assert (size.width, size.height) != (size.reference_width, size.reference_height)


def test_a_model_without_guidance_equals_the_stock_pipeline(tmp_path: Path, photo: Photo) -> None:
    folder = tiny.build(tmp_path / "schnell-like", guidance_embeds=False)
    request = EditRequest(photo(64, 48), PROMPT, 3, 4, enable_safety_checker=False)
    done = result(Engine.load(EngineConfig(model=folder, device="cpu")), request)
    assert_equal_to_the_bit(done.images[0], stock_edit(stock_pipeline(folder), request, done))


@pytest.mark.parametrize("settings", [{"use_dynamic_shifting": False}, {"shift_terminal": 0.1}, {"max_shift": 2.0}])
def test_the_schedule_follows_the_folder_of_the_model(
    tiny_folder: Path, tmp_path: Path, photo: Photo, settings: dict[str, object]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    request = EditRequest(photo(64, 64), PROMPT, 4, 4, enable_safety_checker=False)
    done = result(Engine.load(EngineConfig(model=folder, device="cpu")), request)
    assert_equal_to_the_bit(done.images[0], stock_edit(stock_pipeline(folder), request, done))
    unchanged = result(Engine.load(EngineConfig(model=tiny_folder, device="cpu")), request)
    assert not np.array_equal(np.asarray(done.images[0]), np.asarray(unchanged.images[0]))


@pytest.mark.parametrize(
    "change",
    [{"prompt": "make it red"}, {"seed": 12}, {"guidance_scale": 9.0}, {"num_inference_steps": 5}],
    ids=lambda change: next(iter(change)),
)
def test_each_value_of_a_request_has_an_effect(tiny_folder: Path, photo: Photo, change: dict[str, object]) -> None:
    engine = Engine.load(EngineConfig(model=tiny_folder, device="cpu"))
    base = {"prompt": PROMPT, "seed": 11, "guidance_scale": 2.5, "num_inference_steps": 4}
    one = result(engine, EditRequest(photo(64, 64), enable_safety_checker=False, **base))
    other = result(engine, EditRequest(photo(64, 64), enable_safety_checker=False, **(base | change)))
    assert not np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        ((256, 256), ResolutionMode.MATCH_INPUT),
        ((320, 208), ResolutionMode.MATCH_INPUT),
        ((160, 336), ResolutionMode.MATCH_INPUT),
        ((480, 270), ResolutionMode.R1_1),
    ],
)
def test_the_embedded_model_equals_the_stock_pipeline_to_the_bit(
    embedded_folder: Path, photo: Photo, size: tuple[int, int], mode: ResolutionMode
) -> None:
    request = EditRequest(photo(*size), "make it sepia", 4, 3, resolution_mode=mode, enable_safety_checker=False)
    done = result(Engine.load(EngineConfig(model=embedded_folder, device="cpu")), request)
    assert_equal_to_the_bit(done.images[0], stock_edit(stock_pipeline(embedded_folder), request, done))
