"""LoRAs of other models that fit FLUX.1 in part, by names and widths that they share: refused, and told from ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from kontextd_models import LoraLimits
from kontextd_models.errors import LoraError, LoraMismatch
from kontextd_models.lora.adapter import Adapter
from kontextd_models.lora.inspection import inspect
from kontextd_models.lora.layout import Layout
from kontextd_models.lora.reading import read_adapter
from safetensors.torch import save_file

Modules = Mapping[str, tuple[int, int]]  # out, in
Read = Callable[..., Adapter]

DOWN_UP = ("lora_down", "lora_up")
SQUARE, MLP = (3072, 3072), (12288, 3072)
CLIP_L = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}  # of SDXL, SD 3 and FLUX.1


def flat(modules: Modules) -> Modules:
    return {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in modules.items()}


def named(start: str, blocks: int, ends: Modules) -> Modules:
    return {f"{start}{number}.{end}": shape for number in range(blocks) for end, shape in ends.items()}


QWEN_ATTENTION = {"attn.to_q": SQUARE, "attn.to_k": SQUARE, "attn.to_v": SQUARE, "attn.to_out.0": SQUARE}
QWEN_JOINT = {"attn.add_q_proj": SQUARE, "attn.to_add_out": SQUARE}
QWEN_MLP = {"attn.to_q": SQUARE, "img_mlp.net.0.proj": MLP}
HUNYUAN_DOUBLE = {"img_attn_qkv": (9216, 3072), "img_attn_proj": SQUARE}
IN_PART: dict[str, tuple[str, Modules, tuple[str, str]]] = {
    "the usual target modules": (
        "Qwen-Image", named("transformer.transformer_blocks.", 60, QWEN_ATTENTION), ("lora_A", "lora_B"),
    ),
    "both streams": ("Qwen-Image", named("transformer_blocks.", 60, QWEN_JOINT), DOWN_UP),
    "one block": ("Qwen-Image", named("transformer.transformer_blocks.", 1, QWEN_MLP), ("lora_A", "lora_B")),
    "musubi-tuner": ("Qwen-Image", flat(named("transformer_blocks.", 60, QWEN_MLP)), DOWN_UP),
    "musubi-tuner, double blocks": ("HunyuanVideo", flat(named("double_blocks.", 20, HUNYUAN_DOUBLE)), DOWN_UP),
    "musubi-tuner, single blocks": (
        "HunyuanVideo", flat(named("single_blocks.", 40, {"linear1": (21504, 3072)})), DOWN_UP,
    ),
    "an MLP": (
        "HunyuanVideo",
        flat(named("double_blocks.", 1, {"img_attn_qkv": (9216, 3072), "img_mlp_fc1": MLP})),
        DOWN_UP,
    ),
    "[klein] 4B": (
        "FLUX.2",
        {
            "transformer.transformer_blocks.0.attn.to_q": SQUARE,
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (27648, 3072),
        },
        ("lora_A", "lora_B"),
    ),
    "single blocks of our width": (
        "AuraFlow",
        {
            "transformer.single_transformer_blocks.0.attn.to_q": SQUARE,
            "transformer.joint_transformer_blocks.0.attn.to_q": SQUARE,
        },
        ("lora_A", "lora_B"),
    ),
    "an MLP of our width": (
        "CogVideoX",
        {
            "transformer.transformer_blocks.0.attn1.to_q": SQUARE,
            "transformer.transformer_blocks.0.ff.net.0.proj": MLP,
        },
        ("lora_A", "lora_B"),
    ),
    "with CLIP": (
        "SDXL",
        {
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_k": (1280, 2048),
            **CLIP_L,
            "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280),
        },
        DOWN_UP,
    ),
    "with its only text encoder": (
        "SD 1.5",
        {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
            "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
        },
        DOWN_UP,
    ),
    "with CLIP and T5": (
        "SD 3",
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536),
            **CLIP_L,
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096),
        },
        DOWN_UP,
    ),
}  # fmt: skip
OTHER_SHAPES: dict[str, Modules] = {
    "FLUX.2": {"diffusion_model.double_blocks.0.img_attn.qkv": (18432, 6144)},
    "FLUX.2 ": {
        "diffusion_model.double_blocks.0.img_attn.qkv": (9216, 3072),
        "diffusion_model.single_blocks.0.linear1": (27648, 3072),
    },
    "SD 3": {"transformer.transformer_blocks.0.attn.to_q": (1536, 1536)},
    "LTX": {
        "transformer.transformer_blocks.0.attn1.to_q": (2048, 2048),
        "transformer.transformer_blocks.0.ff.net.0.proj": (8192, 2048),
    },
}
OURS: dict[str, Modules] = {
    "a module of no model": {"transformer.transformer_blocks.0.attn.to_q": SQUARE, "transformer.extra": SQUARE},
    "CLIP-G, which FLUX.1 has not": {
        "lora_unet_double_blocks_0_img_attn_proj": SQUARE,
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280),
    },
    "what Chroma has in place of modulation": {
        "double_blocks.0.img_attn.proj": SQUARE,
        "distilled_guidance_layer.layers.0.in_layer": (5120, 5120),
    },
    "a projection that our CLIP has not": {**CLIP_L, "lora_te1_text_projection": (768, 768)},
}


@pytest.fixture
def read(tmp_path: Path, full_layout: Layout) -> Read:
    def make(modules: Modules, ends: tuple[str, str] = ("lora_A", "lora_B"), layout: Layout = full_layout) -> Adapter:
        tensors = {}
        for name, (out, columns) in modules.items():
            tensors[f"{name}.{ends[0]}.weight"] = torch.full((1, columns), 0.01)
            tensors[f"{name}.{ends[1]}.weight"] = torch.full((out, 1), 0.01)
        path = tmp_path / "style.safetensors"
        save_file(tensors, path)
        found = inspect(path, layout, LoraLimits())
        if found.problem:
            with pytest.raises(LoraError) as caught:
                read_adapter(path, layout, LoraLimits())
            assert found.problem == str(caught.value)
            raise caught.value
        adapter = read_adapter(path, layout, LoraLimits())
        assert (found.looks_like, found.coverage) == ("", adapter.coverage)
        return adapter

    return make


@pytest.mark.parametrize("case", IN_PART)
def test_a_file_of_another_model_that_fits_in_part_is_refused_by_its_name(read: Read, case: str) -> None:
    model, modules, ends = IN_PART[case]
    with pytest.raises(LoraMismatch) as caught:
        read(modules, ends)
    told = str(caught.value)
    assert told.startswith(f"style.safetensors looks like {model}: this model has names like those of ")
    assert told.endswith("Use a LoRA for FLUX.1.")
    assert f"of its {2 * len(modules)} tensors" in told


@pytest.mark.parametrize("model", OTHER_SHAPES)
def test_a_file_of_other_shapes_is_called_by_the_models_name_too(read: Read, model: str) -> None:
    with pytest.raises(LoraMismatch, match=rf"looks like {model.strip()}(\.$|: this model has names)"):
        read(OTHER_SHAPES[model])


@pytest.mark.parametrize("case", OURS)
def test_a_file_of_our_own_with_something_more_is_used(read: Read, case: str) -> None:
    ends = ("lora_A", "lora_B") if "." in next(iter(OURS[case])) else DOWN_UP
    coverage = read(OURS[case], ends).coverage
    assert (coverage.matched, coverage.total) == (2, 4)


@pytest.mark.parametrize("names", ["diffusers", "BFL"])
def test_a_lora_of_flux_1_is_used_by_a_model_of_fewer_blocks(read: Read, full_layout: Layout, names: str) -> None:
    """As pruned ones are: of 8 double blocks, with everything else as it was."""
    pruned = tuple(f"transformer_blocks.{number}." for number in range(8, 19))
    layout = {at: shape for at, shape in full_layout.items() if not at.name.startswith(pruned)}
    ends = {"attn.to_q": SQUARE, "ff.net.0.proj": MLP} if names == "diffusers" else {"img_attn.proj": SQUARE}
    start = "transformer.transformer_blocks." if names == "diffusers" else "double_blocks."
    coverage = read(named(start, 19, ends), layout=layout).coverage
    assert (coverage.matched, coverage.total) == (8 * 2 * len(ends), 19 * 2 * len(ends))
