"""Key names of LoRA files: every spelling and form, on a tiny model, against what the writer of the file meant."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
import torch
from dialect_files import CASES, DIALECTS, LoraFile, adapter_metadata, build, evaluated
from diffusers import FluxKontextPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kontextd_models.errors import LoraFileError
from kontextd_models.lora.dialects import normalise, unsupported_form
from kontextd_models.lora.entry import Kind, Normalised
from kontextd_models.lora.layout import Component, Layout, Parameter
from kontextd_models.weight_files import TensorInfo
from torch import Tensor

TO_Q = "transformer_blocks.0.attn.to_q"
NAMES = {
    "diffusers with alpha": "diffusers",
    "diffusers before peft": "diffusers",
    "diffusers, linear layers": "diffusers",
    "diffusers without prefix": "diffusers",
    "diffusers with lora_down": "diffusers",
    "peft": "PEFT",
    "kohya before te3": "kohya",
    "kohya, diffusers names": "kohya",
    "ComfyUI with lora_down": "ComfyUI",
    "ComfyUI, diffusers names": "ComfyUI",
    "XLabs for ComfyUI": "ComfyUI",
}


def header(tensors: Mapping[str, Tensor] | Iterable[str]) -> dict[str, TensorInfo]:
    """As `read_header` gives it; [4, 4] for a name alone."""
    shapes = {key: tuple(t.shape) for key, t in tensors.items()} if isinstance(tensors, Mapping) else {}
    return {key: TensorInfo("F32", shapes.get(key, (4, 4)), 0, 0) for key in tensors}


def read(file: LoraFile, layout: Layout) -> Normalised:
    return normalise(header(file.tensors), file.metadata, layout)


def assert_same(ours: Mapping[Parameter, Tensor], theirs: Mapping[Parameter, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for parameter, delta in theirs.items():
        torch.testing.assert_close(ours[parameter], delta, rtol=1e-12, atol=1e-12, msg=str(parameter))


def weights_of(pipeline: FluxKontextPipeline) -> dict[Parameter, Tensor]:
    return {
        Parameter(component, name): value.detach()
        for component in Component
        for name, value in getattr(pipeline, component.value).named_parameters()
    }


@pytest.mark.parametrize(("dialect", "form"), CASES)
def test_every_dialect_gives_every_parameter_what_its_writer_meant(
    dialect: str, form: str, tiny_pipeline: FluxKontextPipeline, tiny_layout: Layout
) -> None:
    weights = weights_of(tiny_pipeline)
    file = build(tiny_layout, dialect, form=form, rank=4, weights=weights, integers=form != "dora")
    found = read(file, tiny_layout)
    assert found.unmatched == ()
    assert sorted(key for entry in found.entries for key in entry.tensors.values()) == sorted(file.tensors)
    assert_same(evaluated(found, file.tensors, tiny_layout, weights), file.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_dialect_is_named_once(dialect: str, tiny_layout: Layout) -> None:
    assert read(build(tiny_layout, dialect), tiny_layout).dialects == (NAMES.get(dialect, dialect),)


def test_a_mixture_names_all_its_dialects(tiny_layout: Layout) -> None:
    ours = build(tiny_layout, "kohya", only=lambda name: "double" in name)
    others = build(tiny_layout, "OneTrainer", only=lambda name: "single" in name)
    found = normalise(header(ours.tensors | others.tensors), {}, tiny_layout)
    assert found.dialects == ("OneTrainer", "kohya")
    assert found.unmatched == ()


def test_a_file_for_text_encoders_alone_has_their_dialect(tiny_layout: Layout) -> None:
    file = build(tiny_layout, "kohya", only=lambda name: name.startswith("lora_te"))
    assert read(file, tiny_layout).dialects == ("kohya",)


@pytest.mark.parametrize("in_layout", ["", "text_model."])
@pytest.mark.parametrize("in_file", ["", "text_model."])
def test_clip_is_found_with_and_without_text_model_in_file_and_model(
    in_file: str, in_layout: str, tiny_layout: Layout
) -> None:
    bare = {p: s for p, s in tiny_layout.items() if p.component is not Component.CLIP}
    clip = {
        Parameter(p.component, in_layout + p.name.removeprefix("text_model.")): shape
        for p, shape in tiny_layout.items()
        if p.component is Component.CLIP
    }
    keys = [f"text_encoder.{in_file}encoder.layers.1.mlp.fc1.lora_{side}.weight" for side in "AB"]
    keys += [
        f"lora_te1_{in_file}encoder_layers_1_mlp_fc2".replace(".", "_") + f".lora_{s}.weight" for s in ("up", "down")
    ]
    found = normalise(header(keys), {}, bare | clip)
    assert found.unmatched == ()
    assert {entry.parts[0].parameter for entry in found.entries} == {
        Parameter(Component.CLIP, f"{in_layout}encoder.layers.1.mlp.{name}.weight") for name in ("fc1", "fc2")
    }


def test_the_attention_of_clip_is_found_by_its_name_before_peft(tiny_layout: Layout) -> None:
    keys = [
        f"text_encoder.text_model.encoder.layers.0.self_attn.to_{n}_lora.{s}.weight"
        for n in "qkv"
        for s in ("up", "down")
    ]
    found = normalise(header(keys), {}, tiny_layout)
    assert [entry.parts[0].parameter.name.split(".")[-2] for entry in found.entries] == ["q_proj", "k_proj", "v_proj"]


def test_an_underscore_at_the_end_of_a_name_is_no_part_of_it(tiny_layout: Layout) -> None:
    keys = [f"lora_unet_{TO_Q.replace('.', '_')}_.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
    assert normalise(header(keys), {}, tiny_layout).unmatched == ()


def test_fused_rows_follow_the_layout_and_the_last_modulation_is_swapped(tiny_layout: Layout) -> None:
    keys = [
        f"{name}.lora_{side}.weight"
        for name in ("single_blocks.1.linear1", "final_layer.adaLN_modulation.1")
        for side in "AB"
    ]
    fused, swapped = normalise(header(keys), {}, tiny_layout).entries
    assert [(part.parameter.name, part.start, part.stop, part.at) for part in fused.parts] == [
        ("single_transformer_blocks.1.attn.to_q.weight", 0, 32, 0),
        ("single_transformer_blocks.1.attn.to_k.weight", 32, 64, 0),
        ("single_transformer_blocks.1.attn.to_v.weight", 64, 96, 0),
        ("single_transformer_blocks.1.proj_mlp.weight", 96, 224, 0),
    ]
    assert [(part.start, part.stop, part.at) for part in swapped.parts] == [(0, 32, 32), (32, 64, 0)]


def test_a_part_that_this_model_lacks_is_unmatched(tiny_layout: Layout) -> None:
    smaller = {p: shape for p, shape in tiny_layout.items() if "guidance_embedder" not in p.name}
    file = build(tiny_layout, "kohya")
    found = read(file, smaller)
    assert found.unmatched == tuple(key for key in file.tensors if "guidance_in" in key)
    assert len(found.unmatched) == 6


def test_blocks_beyond_the_models_are_unmatched(tiny_layout: Layout) -> None:
    keys = [
        f"{p}double_blocks{s}1{s}img_attn{s}proj.lora_{e}" for p, s in (("", "."), ("lora_unet_", "_")) for e in "AB"
    ]
    assert normalise(header(keys), {}, tiny_layout).unmatched == tuple(keys)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, (8, 8, False)),
        ({"r": 4, "lora_alpha": 8}, (8, 8, False)),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {TO_Q: 2}}, (2, 8, False)),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 2}}, (2, 8, False)),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^attn.to_q": 2}}, (8, 8, False)),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^" + TO_Q: 2}}, (2, 8, False)),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"n.to_q": 2}}, (8, 8, False)),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, (8, 8, True)),
        ({"text_encoder.lora_alpha": 8}, (None, None, False)),
        ({}, (None, None, False)),
    ],
)
def test_alphas_come_from_the_metadata_of_diffusers(
    said: dict[str, object], expected: tuple[float | None, float | None, bool], tiny_layout: Layout
) -> None:
    keys = [f"transformer.transformer_blocks.0.attn.to_{name}.lora_{side}.weight" for name in "qk" for side in "AB"]
    q, k = normalise(header(keys), adapter_metadata(**said), tiny_layout).entries
    assert (q.alpha, k.alpha, q.rank_stabilised) == expected


def test_a_tensor_beats_the_metadata(tiny_layout: Layout) -> None:
    keys = [f"transformer.{TO_Q}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")]
    (entry,) = normalise(header(keys), adapter_metadata(lora_alpha=9, use_rslora=True), tiny_layout).entries
    assert (entry.tensors["alpha"], entry.alpha, entry.rank_stabilised) == (keys[2], None, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no object"),
        ('{"lora_alpha": NaN}', "no finite number"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "no finite number"),
        ('{"lora_alpha": "8"}', "no finite number"),
        ('{"lora_alpha": true}', "no finite number"),
        ('{"alpha_pattern": [1]}', "no object"),
        ('{"alpha_pattern": {"(a+)+b": 1}}', "regular expression"),
        ('{"use_rslora": "yes"}', "neither true nor false"),
        ('{"init_lora_weights": "pissa_niter_16"}', "initialised by pissa"),
    ],
)
def test_metadata_that_would_leave_the_scale_a_guess_is_an_error(text: str, says: str, tiny_layout: Layout) -> None:
    with pytest.raises(LoraFileError, match=says):
        normalise({}, {"lora_adapter_metadata": text}, tiny_layout)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"transformer.{TO_Q}.lora_A.weight", f"{TO_Q}.lora_A.weight"),
        (f"transformer.{TO_Q}.lora_A.weight", f"transformer.{TO_Q}.lora_down.weight"),
        (f"transformer.{TO_Q}.lora_A.one.weight", f"transformer.{TO_Q}.lora_A.two.weight"),
        (f"transformer.{TO_Q}.alpha", f"lora_transformer_{TO_Q.replace('.', '_')}.alpha"),
        ("double_blocks.0.img_attn.qkv.diff_b", "diffusion_model.double_blocks.0.img_attn.qkv.diff_b"),
    ],
)
def test_two_spellings_of_one_tensor_are_an_error_that_names_both(first: str, second: str, tiny_layout: Layout) -> None:
    with pytest.raises(LoraFileError) as caught:
        normalise(header([first, second]), {}, tiny_layout)
    assert first in str(caught.value)
    assert second in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
        ),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
        (f"transformer.{TO_Q}.diff",),
        (f"transformer.{TO_Q}.lokr_w1", f"transformer.{TO_Q}.lokr_w2"),
    ],
)
def test_rows_that_two_matrices_change_are_an_error(other: tuple[str, ...], tiny_layout: Layout) -> None:
    keys = [f"transformer.{TO_Q}.lora_A.weight", f"transformer.{TO_Q}.lora_B.weight", *other]
    with pytest.raises(LoraFileError, match=r"attn\.to_q\.weight of the transformer"):
        normalise(header(keys), {}, tiny_layout)


@pytest.mark.parametrize(
    "ends",
    [
        ("lora_A.weight",),
        ("lora_up.weight", "alpha", "dora_scale"),
        ("lokr_w1", "lokr_w2_a", "alpha"),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a"),
        ("alpha",),
        ("lora_B.bias",),
        ("lora_A.bias",),
        ("lora_down.weight", "lora_up.weight", "lora_mid.weight"),
        ("lora_A", "lora_B", "lora_E"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ],
)
def test_a_form_that_is_not_whole_is_unmatched_with_all_its_tensors(ends: tuple[str, ...], tiny_layout: Layout) -> None:
    keys = tuple(f"transformer.{TO_Q}.{end}" for end in ends)
    found = normalise(header(keys), {}, tiny_layout)
    assert (found.entries, found.unmatched, found.dialects) == ((), keys, ())


def test_the_rest_of_a_broken_form_beside_a_whole_one_is_unmatched(tiny_layout: Layout) -> None:
    keys = [f"transformer.{TO_Q}.{end}" for end in ("lora_A.weight", "lora_B.weight", "lokr_w1")]
    found = normalise(header(keys), {}, tiny_layout)
    assert [entry.kind for entry in found.entries] == [Kind.LOW_RANK]
    assert found.unmatched == (keys[2],)


def test_embeddings_that_onetrainer_bundles_are_unmatched(tiny_layout: Layout) -> None:
    file = build(tiny_layout, "OneTrainer")
    bundle = ("bundle_emb.<ink>.clip_l", "bundle_emb.<ink>.t5_out")
    assert normalise(header([*file.tensors, *bundle]), {}, tiny_layout).unmatched == bundle


def test_onetrainers_newer_names_are_parts_of_the_references_matrices(tiny_layout: Layout) -> None:
    names = {
        "transformer.img_in.proj": "x_embedder",
        "transformer.double_blocks.0.img_attn.qkv.2": "transformer_blocks.0.attn.to_v",
        "transformer.double_blocks.0.txt_attn.qkv.0": "transformer_blocks.0.attn.add_q_proj",
        "transformer.single_blocks.1.linear1.1": "single_transformer_blocks.1.attn.to_k",
        "transformer.single_blocks.1.linear1.3": "single_transformer_blocks.1.proj_mlp",
        "clip_l.text_model.encoder.layers.0.mlp.fc1": "encoder.layers.0.mlp.fc1",
        "t5.encoder.block.0.layer.1.DenseReluDense.wi_0": "encoder.block.0.layer.1.DenseReluDense.wi_0",
    }
    keys = [f"{name}.lora_{side}.weight" for name in names for side in ("down", "up")]
    found = normalise(header(keys), {}, tiny_layout)
    assert found.unmatched == ()
    assert [entry.parts[0].parameter.name for entry in found.entries] == [f"{name}.weight" for name in names.values()]
    assert found.dialects == ("OneTrainer",)


def test_differences_of_norms_are_found(tiny_layout: Layout) -> None:
    keys = [
        f"lora_unet_double_blocks_0_{s}_attn_norm_{n}_norm.w_norm" for s in ("img", "txt") for n in ("query", "key")
    ]
    found = normalise(header(keys), {}, tiny_layout)
    assert [entry.parts[0].parameter.name.split(".")[-2] for entry in found.entries] == [
        "norm_q",
        "norm_k",
        "norm_added_q",
        "norm_added_k",
    ]


def test_a_projection_trained_as_one_with_ranks_of_its_own_is_read_as_it_is(tiny_layout: Layout) -> None:
    """sd-scripts' split_qkv: down matrices below each other, up matrices on the diagonal."""
    ups, downs = [torch.randn(32, 2) for _ in range(3)], [torch.randn(2, 32) for _ in range(3)]
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    tensors = {
        f"{name}.lora_up.weight": torch.block_diag(*ups),
        f"{name}.lora_down.weight": torch.cat(downs),
        f"{name}.alpha": torch.tensor(6.0),
    }
    deltas = evaluated(normalise(header(tensors), {}, tiny_layout), tensors, tiny_layout)
    for part, up, down in zip("qkv", ups, downs, strict=True):
        parameter = Parameter(Component.TRANSFORMER, f"transformer_blocks.0.attn.add_{part}_proj.weight")
        torch.testing.assert_close(deltas[parameter], up.double() @ down.double())


@pytest.mark.parametrize(
    ("end", "form"),
    [
        ("lora_mid.weight", "Tucker"),
        ("hada_t1", "Tucker"),
        ("lokr_t2", "Tucker"),
        ("lora_down.0.weight", "numbered"),
        ("a1.weight", "GLoRA"),
        ("bm.weight", "GLoRA"),
        ("oft_blocks", "OFT"),
        ("oft_blocks.0", "OFT"),
        ("oft_R.default.weight", "OFT"),
        ("boft_R.default", "BOFT"),
        ("on_input", "IA3"),
        ("ia3_l", "IA3"),
        ("vera_lambda_b", "VeRA"),
        ("lora_E", "AdaLoRA"),
        ("p_layer.weight", "T-LoRA"),
        ("lambda_layer", "T-LoRA"),
        ("lora_embedding_A", "embeddings"),
        ("set_weight", "replacement"),
        ("modules_to_save.default.weight", "modules_to_save"),
        ("lora_down", "SVDQuant"),
        ("fourierft_spectrum", "peft's fourierft"),
        ("randlora_lambda.default", "peft's randlora"),
    ],
)
def test_forms_that_are_not_merged_are_unmatched_and_have_a_name(end: str, form: str, tiny_layout: Layout) -> None:
    keys = (f"base_model.model.{TO_Q}.{end}",)
    assert normalise(header(keys), {}, tiny_layout).unmatched == keys
    assert form in (unsupported_form(keys) or "")


def test_what_is_merged_has_no_such_name(tiny_layout: Layout) -> None:
    for dialect, form in CASES:
        if form != "dora":
            assert unsupported_form(build(tiny_layout, dialect, form=form).tensors) is None
    assert unsupported_form(["bundle_emb.<ink>.t5", "transformer.proj_out.weight", ""]) is None


def test_names_are_read_without_torch() -> None:
    program = (
        "import sys, kontextd_models.lora.dialects, kontextd_models.lora.architectures;"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


PIECES = st.sampled_from(
    [
        "",
        "transformer.",
        "lora_unet_",
        "diffusion_model.",
        "base_model.model.",
        "lora_te1_",
        "text_encoder_2.",
        "lycoris_",
    ]
)
STEMS = st.sampled_from(
    [
        TO_Q,
        TO_Q.replace(".", "_"),
        "double_blocks.0.img_attn.qkv",
        "double_blocks_0_img_attn_qkv",
        "single_blocks.0.processor.qkv_lora",
        "final_layer.adaLN_modulation.1",
        "text_model_encoder_layers_0_mlp_fc1",
        "encoder.block.0.layer.0.SelfAttention.q",
        "nonsense",
    ]
)
ENDS = st.sampled_from(
    [
        *(f".lora_{side}{name}.weight" for side in "AB" for name in ("", ".default")),
        *(
            f".{form}{name}"
            for form in ("lokr_", "hada_")
            for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")
        ),
        *(".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".down.weight", ".up.weight", ".lora_B.bias"),
        *(".alpha", ".dora_scale", ".diff", ".diff_b", ".weight", ".lora_magnitude_vector", ""),
    ]
)
KEYS = st.builds("{}{}{}".format, PIECES, STEMS, ENDS) | st.text(max_size=30)


def outcome(keys: list[str], alpha: float | None, layout: Layout) -> Normalised | LoraFileError:
    try:
        return normalise(header(keys), adapter_metadata(lora_alpha=alpha), layout)
    except LoraFileError as error:
        return error


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(KEYS, unique=True, max_size=12), alpha=st.none() | st.floats(0.1, 100))
def test_every_tensor_is_in_exactly_one_entry_or_unmatched(
    keys: list[str], alpha: float | None, tiny_layout: Layout
) -> None:
    found = outcome(keys, alpha, tiny_layout)
    if isinstance(found, LoraFileError):
        assert "both for" in str(found)
        assert sum(key in str(found) for key in keys) >= 2
        return
    used = [key for entry in found.entries for key in entry.tensors.values()]
    assert sorted([*used, *found.unmatched]) == sorted(keys)
    assert bool(found.dialects) == bool(found.entries)
    rows = [
        (part.parameter, row)
        for entry in found.entries
        for part in entry.parts
        for row in range(part.at, part.at + part.stop - part.start)
    ]
    assert len(rows) == len(set(rows))


def test_each_single_tensor_of_a_file_is_missed_by_its_matrix(tiny_layout: Layout) -> None:
    """Whichever tensor is lost on the way, nothing is read in part."""
    file = build(tiny_layout, "kohya", form="lokr", only=lambda name: "single_blocks_0" in name)
    for lost in file.tensors:
        if lost.endswith("alpha"):
            continue
        left = {key: tensor for key, tensor in file.tensors.items() if key != lost}
        name = lost.partition(".")[0]
        assert set(normalise(header(left), {}, tiny_layout).unmatched) == {
            key for key in left if key.startswith(name + ".")
        }


def test_an_ambiguous_underscored_name_is_matched_to_nothing(tiny_layout: Layout) -> None:
    shape = (32, 32)
    layout = dict(tiny_layout) | {
        Parameter(Component.TRANSFORMER, "a.b_c.weight"): shape,
        Parameter(Component.TRANSFORMER, "a_b.c.weight"): shape,
    }
    flat = ["lora_unet_a_b_c.lora_down.weight", "lora_unet_a_b_c.lora_up.weight"]
    dotted = ["transformer.a_b.c.lora_A.weight", "transformer.a_b.c.lora_B.weight"]
    found = normalise(header([*flat, *dotted]), {}, layout)
    assert found.unmatched == tuple(flat)
    assert [entry.parts[0].parameter.name for entry in found.entries] == ["a_b.c.weight"]


def test_rank_stabilised_alphas_are_divided_by_the_root_of_the_rank(tiny_layout: Layout) -> None:
    file = build(tiny_layout, "diffusers", rank=4, only=lambda name: name.endswith("." + TO_Q))
    (entry,) = normalise(header(file.tensors), adapter_metadata(lora_alpha=8, use_rslora=True), tiny_layout).entries
    found = Normalised((entry,), (), ())
    parameter = Parameter(Component.TRANSFORMER, f"{TO_Q}.weight")
    theirs = file.expected[parameter] * 8 / math.sqrt(4)
    torch.testing.assert_close(evaluated(found, file.tensors, tiny_layout)[parameter], theirs)
    plain = Normalised((replace(entry, rank_stabilised=False),), (), ())
    assert not torch.equal(evaluated(plain, file.tensors, tiny_layout)[parameter], theirs)
