"""Memory modes, out of memory and pace on a real CUDA device, with a tiny model: what no CPU can show."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kontextd_models import Done, EditRequest, EngineConfig, MemoryMode, Step, load_engine
from kontextd_models.engine import Engine
from kontextd_models.errors import OutOfMemory
from PIL import Image

Photo = Callable[[int, int], Image.Image]
OFFLOADING = [MemoryMode.ENCODERS_OFF, MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def load(folder: Path, mode: MemoryMode) -> Engine:
    config = EngineConfig(model=folder, device="cuda", memory_mode=mode, prompt_cache_bytes=0, reference_cache_bytes=0)
    return load_engine(config)


def edited(engine: Engine, image: Image.Image) -> np.ndarray:
    *_, done = engine.edit(EditRequest(image, "make it red", 3, 5, enable_safety_checker=False))
    assert isinstance(done, Done)
    return np.asarray(done.images[0])


def where(module: torch.nn.Module) -> set[str]:
    return {weight.device.type for weight in module.parameters()}


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_streamed_model_gives_the_same_bits_and_rests_in_host_memory(
    tiny_folder: Path, photo: Photo, mode: MemoryMode
) -> None:
    expected = edited(load(tiny_folder, MemoryMode.RESIDENT), photo(64, 64))
    engine = load(tiny_folder, mode)
    assert engine.model.memory_mode is mode
    for _ in range(3):  # the first forward pass traces the order of the layers, the later ones fetch ahead
        assert np.array_equal(edited(engine, photo(64, 64)), expected)
        pipeline = engine.model.pipeline
        assert where(pipeline.text_encoder) == where(pipeline.text_encoder_2.encoder) == {"cpu"}
        assert where(pipeline.vae) == {"cuda"}
        assert where(pipeline.transformer) == ({"cuda"} if mode is MemoryMode.ENCODERS_OFF else {"cpu"})


@pytest.mark.parametrize("mode", [MemoryMode.RESIDENT, *OFFLOADING])
@pytest.mark.parametrize("edits_before", [0, 1])
def test_after_a_real_out_of_memory_the_device_is_as_free_as_before_and_the_engine_works(
    tiny_folder: Path, photo: Photo, mode: MemoryMode, edits_before: int
) -> None:
    engine = load(tiny_folder, mode)
    expected = edited(load(tiny_folder, MemoryMode.RESIDENT), photo(64, 64))
    for _ in range(edits_before):
        edited(engine, photo(64, 64))

    def exhaust(*_: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    gc.collect()
    before = torch.cuda.memory_allocated()
    block = engine.model.pipeline.transformer.single_transformer_blocks[1]
    handle = block.register_forward_pre_hook(exhaust)
    with pytest.raises(OutOfMemory):
        edited(engine, photo(64, 64))
    handle.remove()
    assert torch.cuda.memory_allocated() <= before
    assert np.array_equal(edited(engine, photo(64, 64)), expected)


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_weight_written_between_two_edits_takes_effect(tiny_folder: Path, photo: Photo, mode: MemoryMode) -> None:
    engine = load(tiny_folder, mode)
    before = edited(engine, photo(64, 64))
    weight = engine.model.pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    pristine = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
    assert not np.array_equal(edited(engine, photo(64, 64)), before)
    with torch.no_grad():
        weight.copy_(pristine)
    assert np.array_equal(edited(engine, photo(64, 64)), before)


def test_a_seed_draws_the_same_noise_as_on_the_cpu_and_an_edit_closed_early_leaves_the_engine_as_new(
    tiny_folder: Path, photo: Photo
) -> None:
    engine = load(tiny_folder, MemoryMode.RESIDENT)
    expected = edited(engine, photo(64, 64))
    edit = engine.edit(EditRequest(photo(96, 64), "", 20, enable_safety_checker=False))
    assert isinstance(next(edit), Step)
    edit.close()
    assert np.array_equal(edited(engine, photo(64, 64)), expected)
    on_cpu = edited(load_engine(EngineConfig(model=tiny_folder, device="cpu", dtype="bfloat16")), photo(64, 64))
    apart = np.abs(expected.astype(float) - on_cpu).mean()
    assert apart < 8  # of 255: rounding alone; another noise would be tens
