"""Key names at the size of FLUX.1, against diffusers' own converters wherever those are right, and peft on a tiny one.

Values are small whole numbers, so that every product is exact: two matrices are the same if they do the same to a few
random vectors, and nothing of the size of the model is ever made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from dialect_files import DIALECTS, adapter_metadata, build, evaluated
from diffusers import FluxKontextPipeline
from diffusers.loaders import lora_conversion_utils as theirs
from kontextd_models.lora.dialects import normalise
from kontextd_models.lora.entry import Kind
from kontextd_models.lora.layout import Component, Layout, Parameter
from kontextd_models.weight_files import TensorInfo
from peft.tuners.lora import LoraLayer
from torch import Tensor

Tensors = dict[str, Tensor]
Effects = dict[Parameter, Tensor]  # of a delta [out, in] on three vectors: [out, 3]

_OLD_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def header(tensors: Tensors) -> dict[str, TensorInfo]:
    return {key: TensorInfo("F32", tuple(tensor.shape), 0, 0) for key, tensor in tensors.items()}


def vectors(width: int) -> Tensor:
    return torch.randint(-2, 3, (width, 3), generator=torch.Generator().manual_seed(width)).double()


def our_effects(tensors: Tensors, layout: Layout) -> Effects:
    found = normalise(header(tensors), {}, layout)
    assert found.unmatched == ()
    effects: Effects = {}
    for entry in found.entries:
        down, up = tensors[entry.tensors["down"]].double(), tensors[entry.tensors["up"]].double()
        alpha = tensors[entry.tensors["alpha"]].item() if "alpha" in entry.tensors else len(down)
        effect = up @ (down @ vectors(down.shape[1])) * (alpha / len(down))
        for part in entry.parts:
            whole = effects.setdefault(part.parameter, torch.zeros(layout[part.parameter][0], 3).double())
            whole[part.at : part.at + part.stop - part.start] += effect[part.start : part.stop]
    return effects


def their_effects(converted: Tensors) -> Effects:
    """Of diffusers' names for factors, those of its own CLIP before peft among them."""
    effects: Effects = {}
    for key, down in converted.items():
        for ends in (
            ("lora_A", "lora_B"),
            ("lora.down", "lora.up"),
            ("lora_linear_layer.down", "lora_linear_layer.up"),
        ):
            name, found, _ = key.replace("_lora.", ".lora.").partition(f".{ends[0]}.weight")
            if found:
                up = converted[key.replace(*ends).replace("lora.down", "lora.up")]
                effects[_their_parameter(name)] = up.double() @ (down.double() @ vectors(down.shape[1]))
    return effects


def _their_parameter(name: str) -> Parameter:
    if not name.startswith("text_encoder."):
        return Parameter(Component.TRANSFORMER, name.removeprefix("transformer.") + ".weight")
    stem, _, last = name.removeprefix("text_encoder.").removeprefix("text_model.").rpartition(".")
    return Parameter(Component.CLIP, f"{stem}.{_OLD_CLIP.get(last, last)}.weight")


def assert_same(ours: Effects, expected: Effects, layout: Layout) -> None:
    bare = {Parameter(p.component, p.name.removeprefix("text_model.")): effect for p, effect in ours.items()}
    assert bare.keys() == expected.keys()
    for parameter, effect in expected.items():
        assert torch.equal(bare[parameter], effect), parameter
        assert effect.any(), parameter


def in_blocks(name: str) -> bool:
    return "_blocks" in name


def no_t5(name: str) -> bool:
    return not name.startswith("lora_te3")


def attention_alone(name: str) -> bool:
    """diffusers reads these of OneTrainer's; the others of a block overwrite each other."""
    return "attn" in name and "lora_te" not in name


@pytest.mark.parametrize(
    ("dialect", "converter", "only", "alpha"),
    [
        # diffusers leaves out the alpha of the last layer, so that is the rank; elsewhere it is half and double.
        ("kohya", theirs._convert_kohya_flux_lora_to_diffusers, no_t5, 2),
        ("kohya", theirs._convert_kohya_flux_lora_to_diffusers, in_blocks, 1),
        ("kohya", theirs._convert_kohya_flux_lora_to_diffusers, in_blocks, 4),
        ("ComfyUI with lora_down", theirs._convert_kohya_flux_lora_to_diffusers, in_blocks, 4),
        ("OneTrainer", theirs._convert_kohya_flux_lora_to_diffusers, attention_alone, 1),
        ("XLabs", theirs._convert_xlabs_flux_lora_to_diffusers, in_blocks, None),
        ("XLabs for ComfyUI", theirs._convert_xlabs_flux_lora_to_diffusers, in_blocks, None),
        (
            "fal trainer",
            theirs._convert_fal_kontext_lora_to_diffusers,
            lambda n: in_blocks(n) or n.endswith("linear"),
            None,
        ),
    ],
)
def test_the_converters_of_diffusers_agree_on_every_matrix(
    dialect: str,
    converter: Callable[[Tensors], Tensors],
    only: Callable[[str], bool],
    alpha: float | None,
    full_layout: Layout,
) -> None:
    tensors = build(full_layout, dialect, rank=2, alpha=alpha, integers=True, only=only).tensors
    assert_same(our_effects(tensors, full_layout), their_effects(converter(dict(tensors))), full_layout)


def test_the_control_loras_of_the_reference_agree_with_biases_and_all(full_layout: Layout) -> None:
    tensors = build(full_layout, "BFL", rank=2, integers=True).tensors
    draw = torch.Generator().manual_seed(3)
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        bias = torch.randint(-2, 3, (len(tensors[key]),), generator=draw).float()
        tensors[key.replace("weight", "bias")] = bias
    norms = {
        f"{block}.{norm}.{name}_norm.scale": torch.rand(128, generator=draw)
        for count, blocks, sides in ((19, "double", ("img_attn.norm", "txt_attn.norm")), (38, "single", ("norm",)))
        for block in (f"{blocks}_blocks.{number}" for number in range(count))
        for norm in sides
        for name in ("query", "key")
    }
    found = normalise(header(tensors | norms), {}, full_layout)
    assert found.unmatched == ()
    converted = theirs._convert_bfl_flux_control_lora_to_diffusers(dict(tensors | norms))
    converted = {key.removeprefix("transformer."): value for key, value in converted.items()}
    biases = [key for key in converted if key.endswith("lora_B.bias")]
    whole = [key for key in converted if ".norm_" in key and ".lora_" not in key]
    seen = 0
    for entry in found.entries:
        for part in entry.bias_parts:
            there = converted[part.parameter.name.replace(".bias", ".lora_B.bias")]
            ours = tensors[entry.tensors["bias"]][part.start : part.stop]
            assert torch.equal(ours, there[part.at : part.at + part.stop - part.start])
            seen += 1
    assert seen == len(biases) + 1  # the two halves of the last modulation
    replaced = {e.parts[0].parameter.name: norms[e.tensors["value"]] for e in found.entries if e.kind is Kind.REPLACED}
    assert replaced.keys() == set(whole)
    assert all(torch.equal(value, converted[name]) for name, value in replaced.items())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_whole_at_full_size(dialect: str, full_layout: Layout) -> None:
    tensors = {key: tensor for key, tensor in build(full_layout, dialect, rank=1).tensors.items()}
    found = normalise(header(tensors), {}, full_layout)
    assert found.unmatched == ()
    assert sorted(key for entry in found.entries for key in entry.tensors.values()) == sorted(tensors)
    for entry in found.entries:
        rows = max(part.stop for part in entry.parts)
        assert rows == len(tensors[entry.tensors["up"]])
        assert all(full_layout[part.parameter][1] == tensors[entry.tensors["down"]].shape[1] for part in entry.parts)


# Rows of what diffusers' own loader drops, refuses, or reads wrongly; every one is read, whole.
SILENT_OR_WRONG_THERE = [
    ("kohya", lambda name: "_in" in name or "final_layer" in name),
    ("kohya", lambda name: name.startswith("lora_te3_")),
    ("kohya", lambda name: name.startswith("lora_te1_text_model_encoder_layers_0_self_attn")),
    ("ComfyUI", lambda name: "blocks" in name),
    ("BFL", lambda name: "blocks" in name),
    ("diffusers without prefix", lambda name: True),
    ("diffusers with lora_down", lambda name: True),
    ("fal trainer", lambda name: "double_blocks.0." in name),
    ("peft", lambda name: "blocks.0." in name),
]


@pytest.mark.parametrize(("dialect", "only"), SILENT_OR_WRONG_THERE)
def test_what_diffusers_drops_or_misreads_is_read(
    dialect: str, only: Callable[[str], bool], tiny_layout: Layout
) -> None:
    file = build(tiny_layout, dialect, only=only, integers=True)
    assert file.tensors
    found = normalise(header(file.tensors), {}, tiny_layout)
    assert found.unmatched == ()
    deltas = evaluated(found, file.tensors, tiny_layout)
    assert deltas.keys() == file.expected.keys()
    assert all(torch.equal(deltas[parameter], delta) for parameter, delta in file.expected.items())


@pytest.mark.parametrize("form", ["lokr", "loha", "full", "dora"])
def test_lycoris_and_dora_under_the_names_of_kohya_are_read(
    form: str, tiny_pipeline: FluxKontextPipeline, tiny_layout: Layout
) -> None:
    weights = {
        Parameter(component, name): value.detach()
        for component in Component
        for name, value in getattr(tiny_pipeline, component.value).named_parameters()
    }
    file = build(tiny_layout, "kohya", form=form, weights=weights)
    found = normalise(header(file.tensors), {}, tiny_layout)
    assert found.unmatched == ()
    for parameter, delta in evaluated(found, file.tensors, tiny_layout, weights).items():
        torch.testing.assert_close(delta, file.expected[parameter], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "keys",
    [
        ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
        ["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight"],
        ["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
    ],
)
def test_files_of_other_models_match_nothing(keys: list[str], full_layout: Layout) -> None:
    found = normalise(header({key: torch.zeros(4, 4) for key in keys}), {}, full_layout)
    assert (found.entries, found.unmatched) == ((), tuple(keys))


@pytest.mark.parametrize(
    ("dialect", "metadata"),
    [
        ("diffusers", {}),
        ("diffusers with alpha", {}),
        ("XLabs", {}),
        ("diffusers", {"transformer.r": 4, "transformer.lora_alpha": 16}),
        ("diffusers", {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": True}),
        (
            "diffusers",
            {
                "transformer.r": 4,
                "transformer.lora_alpha": 16,
                "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 2, "proj_mlp": 1},
            },
        ),
    ],
)
def test_peft_makes_the_same_deltas_of_what_diffusers_loads(
    dialect: str, metadata: Mapping[str, object], tiny_pipeline: FluxKontextPipeline, tiny_layout: Layout
) -> None:
    file = build(tiny_layout, dialect, only=lambda name: "text_encoder" not in name)
    said = adapter_metadata(**metadata) if metadata else {}
    ours = evaluated(normalise(header(file.tensors), said, tiny_layout), file.tensors, tiny_layout)
    transformer = copy.deepcopy(tiny_pipeline.transformer)
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    state, alphas, _ = FluxKontextPipeline.lora_state_dict(
        dict(file.tensors), return_alphas=True, return_lora_metadata=True
    )
    FluxKontextPipeline.load_lora_into_transformer(
        state, alphas, transformer, metadata=_whole(config, ours) if config else None
    )
    seen = {
        Parameter(Component.TRANSFORMER, f"{name}.weight"): layer.get_delta_weight("default_0").double()
        for name, layer in transformer.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert seen.keys() == ours.keys()
    for parameter, delta in seen.items():
        torch.testing.assert_close(ours[parameter], delta, rtol=1e-5, atol=1e-6)


def _whole(config: dict[str, object], deltas: Mapping[Parameter, Tensor]) -> dict[str, object]:
    names = [parameter.name.removesuffix(".weight") for parameter in deltas]
    return {f"transformer.{key}": value for key, value in {**config, "target_modules": names}.items()}
