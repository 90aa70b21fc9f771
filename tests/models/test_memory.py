"""Memory modes: which one is chosen, and that none of them changes a bit. What needs a GPU is in tests/gpu."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models import Acceleration, Done, EditRequest, EngineConfig, MemoryMode, load_engine, memory
from kontextd_models.acceleration.preset import Preset
from kontextd_models.acceleration.table import PresetTable, presets_of
from kontextd_models.engine import Engine
from kontextd_models.folder import ModelCard, ModelFolder, check_folder
from kontextd_models.loading import LoadedModel, load_pipeline
from kontextd_models.memory import ModelSizes, choose, host_needs, needs, sizes_of
from kontextd_models.weight_files import TensorInfo
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

Photo = Callable[[int, int], Image.Image]


def test_what_an_engine_has_left_is_forgotten_once_nobody_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled functions hold tensors, and what is collected afterwards only is what torch can give back to CUDA."""
    done: list[str] = []
    monkeypatch.setattr("torch._dynamo.reset", lambda: done.append("reset"))
    monkeypatch.setattr("gc.collect", lambda: done.append("collected"))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("given back"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    memory.forget()
    assert done == ["reset", "collected", "given back"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    memory.forget()
    assert done[3:] == ["reset", "collected"]


def test_where_nothing_was_compiled_the_compiler_is_not_loaded_to_forget_it() -> None:
    code = "import sys\nfrom kontextd_models.memory import forget\nforget()\nprint('torch._dynamo' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


CPU = torch.device("cpu")
OFFLOADING = [MemoryMode.ENCODERS_OFF, MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL]
MEGAPIXEL = 1024 * 1024


@pytest.fixture(scope="module")
def kontext() -> ModelFolder:
    """FLUX.1 Kontext [dev] at its full size, without its weights: shapes from diffusers' and transformers' classes."""
    with torch.device("meta"):
        parts = {
            "transformer": FluxTransformer2DModel(guidance_embeds=True),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
            "text_encoder_2": T5EncoderModel(
                T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
            ),
        }
    tensors = {
        part: {name: TensorInfo("BF16", tuple(weight.shape), 0, 0) for name, weight in module.named_parameters()}
        for part, module in parts.items()
    }
    return ModelFolder(Path("kontext"), ModelCard("kontext"), tensors, token_width=3072, pixel_width=256)


def test_the_figures_in_the_docstring_are_those_of_the_full_size_model(kontext: ModelFolder) -> None:
    one, two = sizes_of(kontext, 2, MEGAPIXEL), sizes_of(kontext, 2, 2 * MEGAPIXEL)
    for needed in zip(needs(one).items(), needs(two).items(), strict=True):
        (mode, at_one), (_, at_two) = needed
        row = next(line for line in str(memory.__doc__).splitlines() if line.startswith(f"| `{mode.value}`"))
        assert [cell.strip() for cell in row.split("|")[3:5]] == [f"{at_one / 1e9:.1f} GB", f"{at_two / 1e9:.1f} GB"]
    assert one.transformer == pytest.approx(23.8e9, rel=0.005)
    assert one.text_encoders == pytest.approx((9.5 + 0.25) * 1e9, rel=0.01)
    assert one.vae == pytest.approx(0.17e9, rel=0.02)
    assert one.largest_block == pytest.approx(0.68e9, rel=0.01)
    assert (one.activations, two.activations) == (pytest.approx(2.7e9, rel=0.01), pytest.approx(5.4e9, rel=0.01))


@pytest.mark.parametrize(
    ("card_gib", "mode"),
    [
        (80, MemoryMode.RESIDENT),
        (48, MemoryMode.RESIDENT),
        (32, MemoryMode.ENCODERS_OFF),
        (24, MemoryMode.GROUP_OFFLOAD),
        (12, MemoryMode.GROUP_OFFLOAD),
        (8, MemoryMode.GROUP_OFFLOAD),
        (7, MemoryMode.SEQUENTIAL),
        (6, MemoryMode.SEQUENTIAL),
    ],
)
def test_each_size_of_card_gets_the_fastest_mode_that_fits(
    kontext: ModelFolder, card_gib: int, mode: MemoryMode
) -> None:
    free = int((card_gib - 0.5) * 2**30)  # what the driver and the CUDA context leave
    assert choose(free, sizes_of(kontext, 2, 2 * MEGAPIXEL), is_cuda=True)[0] is mode


@given(st.integers(0, 10**11), st.integers(0, 10**11), st.sampled_from(list(MemoryMode)))
def test_more_memory_never_makes_the_choice_slower(low: int, high: int, asked: MemoryMode) -> None:
    sizes = ModelSizes(24 * 10**9, 10**10, 2 * 10**8, 7 * 10**8, 10**8, 3 * 10**8, 5 * 10**9)
    order = list(needs(sizes))
    first, second = (choose(free, sizes, True, asked)[0] for free in sorted((low, high)))
    assert order.index(first) >= order.index(second)
    if asked is not MemoryMode.AUTO:
        assert first is asked


def test_on_the_cpu_everything_is_resident_and_asking_for_more_is_answered(tiny_folder: Path) -> None:
    sizes = sizes_of(check_folder(tiny_folder), 4, 4096)
    assert choose(0, sizes, is_cuda=False) == (MemoryMode.RESIDENT, "on the CPU everything is in host memory")
    mode, reason = choose(0, sizes, is_cuda=False, asked=MemoryMode.SEQUENTIAL)
    assert mode is MemoryMode.RESIDENT
    assert "sequential has no effect" in reason


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        (MemoryMode.AUTO, logging.INFO),
        (MemoryMode.RESIDENT, logging.INFO),
        (MemoryMode.ENCODERS_OFF, logging.WARNING),  # it has no effect on the CPU
    ],
)
def test_the_choice_is_logged_with_its_reason_and_loudly_where_it_is_not_what_was_asked_for(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, asked: MemoryMode, level: int
) -> None:
    with caplog.at_level(logging.INFO, logger="kontextd_models"):
        engine = load_engine(EngineConfig(model=tiny_folder, device="cpu", memory_mode=asked))
    (record,) = [record for record in caplog.records if "memory mode" in record.message]
    assert record.levelno == level
    assert engine.model.memory_reason in record.message
    assert engine.model.memory_mode is MemoryMode.RESIDENT


def test_what_a_mode_takes_of_host_memory(kontext: ModelFolder) -> None:
    sizes = sizes_of(kontext, 2, MEGAPIXEL)
    everything = sizes.transformer + sizes.text_encoders + sizes.vae
    assert host_needs(sizes, MemoryMode.RESIDENT, is_cuda=False) == everything
    for mode in (MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL):
        assert host_needs(sizes, mode, is_cuda=True) == everything == pytest.approx(33.7e9, rel=0.01)
    for mode in (MemoryMode.RESIDENT, MemoryMode.ENCODERS_OFF):
        assert host_needs(sizes, mode, is_cuda=True) == sizes.transformer


def test_planning_imports_no_torch() -> None:
    code = "import sys, kontextd_models.memory, kontextd_models.doctor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_sizes_are_those_of_the_loaded_modules(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "sharded", max_shard_size="100KB")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    sizes, pipeline = sizes_of(check_folder(folder), 4, 4096), load_pipeline(folder, torch.float32)

    def weigh(module: torch.nn.Module) -> int:
        return sum(weight.numel() * weight.element_size() for weight in module.parameters())

    transformer = pipeline.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert sizes.transformer == weigh(transformer)
    assert sizes.vae == weigh(pipeline.vae)
    assert sizes.text_encoders == weigh(pipeline.text_encoder) + weigh(pipeline.text_encoder_2)
    assert sizes.largest_block == max(map(weigh, blocks))
    assert sizes.outside_blocks == weigh(transformer) - sum(map(weigh, blocks))


# The hooks of each mode, with the CPU as the device that weights are streamed to.


def placed(folder: Path, mode: MemoryMode) -> Engine:
    card = check_folder(folder).card
    pipeline = load_pipeline(folder, torch.float32)
    memory.place(pipeline, mode, CPU)
    table = presets_of(folder)
    model = LoadedModel(pipeline, folder, card, card.limits, table, CPU, torch.float32, mode, "placed by a test")
    return Engine(model, EngineConfig(model=folder, prompt_cache_bytes=0, reference_cache_bytes=0))


def edited(engine: Engine, image: Image.Image, preset: Acceleration = Acceleration.NONE) -> np.ndarray:
    request = EditRequest(image, "make it red", 6, 5, enable_safety_checker=False, acceleration=preset)
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return np.asarray(done.images[0])


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_streamed_model_gives_the_same_bits_edit_after_edit(
    tiny_folder: Path, photo: Photo, mode: MemoryMode
) -> None:
    expected = edited(placed(tiny_folder, MemoryMode.RESIDENT), photo(64, 64))
    engine = placed(tiny_folder, mode)
    streamed = {
        name
        for name in ("transformer", "text_encoder", "text_encoder_2")
        if any(hasattr(module, "_diffusers_hook") for module in getattr(engine.model.pipeline, name).modules())
    }
    encoders = {"text_encoder", "text_encoder_2"}
    assert streamed == (encoders if mode is MemoryMode.ENCODERS_OFF else encoders | {"transformer"})
    for _ in range(2):
        assert np.array_equal(edited(engine, photo(64, 64)), expected)


@pytest.mark.parametrize("mode", [MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL])
def test_a_streamed_transformer_keeps_no_reference_and_skips_the_same_steps(
    tiny_folder: Path, photo: Photo, mode: MemoryMode
) -> None:
    reusing = Preset(computed=0.7, prefix=2, reuse_reference=True)
    streamed, resident = placed(tiny_folder, mode), placed(tiny_folder, MemoryMode.RESIDENT)
    streamed.presets = _with_regular(streamed.presets, reusing)
    resident.presets = _with_regular(resident.presets, replace(reusing, reuse_reference=False))
    for engine in (streamed, resident, streamed):
        assert np.array_equal(
            edited(engine, photo(64, 64), Acceleration.REGULAR), edited(resident, photo(64, 64), Acceleration.REGULAR)
        )


def _with_regular(table: PresetTable, row: Preset) -> PresetTable:
    return replace(table, rows={**table.rows, Acceleration.REGULAR: row})


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_streamed_model_survives_an_exception_in_the_middle_of_a_forward_pass(
    tiny_folder: Path, photo: Photo, mode: MemoryMode
) -> None:
    engine = placed(tiny_folder, mode)
    expected = edited(placed(tiny_folder, MemoryMode.RESIDENT), photo(64, 64))
    for part in ("transformer", "text_encoder_2"):
        inner = list(getattr(engine.model.pipeline, part).modules())[-2]

        def explode(*_: object) -> None:
            raise ValueError("in the middle")

        handle = inner.register_forward_pre_hook(explode)
        with pytest.raises(ValueError, match="in the middle"):
            edited(engine, photo(64, 64))
        handle.remove()
        assert np.array_equal(edited(engine, photo(64, 64)), expected)


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_weight_written_between_two_edits_takes_effect(tiny_folder: Path, photo: Photo, mode: MemoryMode) -> None:
    engine = placed(tiny_folder, mode)
    before = edited(engine, photo(64, 64))
    weight = engine.model.pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    pristine = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
    assert not np.array_equal(edited(engine, photo(64, 64)), before)
    with torch.no_grad():
        weight.copy_(pristine)
    assert np.array_equal(edited(engine, photo(64, 64)), before)
