"""From files to adapters: every form and dtype, and what is refused before the base model could be touched."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kontextd_models import LoraLimits
from kontextd_models.errors import LoraError, LoraFileError, LoraMismatch
from kontextd_models.folder import check_folder
from kontextd_models.lora.adapter import Adapter, Delta, Full, LoHa, LoKr, LowRank
from kontextd_models.lora.layout import Component, Layout, Parameter, layout_of, layout_of_folder
from kontextd_models.lora.reading import read_adapter
from safetensors.torch import save_file
from torch import Tensor

LIMITS = LoraLimits()
Tensors = dict[str, Tensor]
Read = Callable[..., Adapter]

# The tiny model: 32 wide, MLPs of 128. One linear by diffusers' name, one that three parameters share by kohya's.
TO_Q, MLP = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.ff.net.0.proj"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def parameter(name: str) -> Parameter:
    return Parameter(Component.TRANSFORMER, name.removeprefix("transformer.") + ".weight")


QKV_PARAMETERS = [parameter(f"transformer_blocks.0.attn.to_{name}") for name in "qkv"]


@pytest.fixture(scope="module")
def layout(tiny_folder: Path) -> Layout:
    return layout_of_folder(check_folder(tiny_folder))


@pytest.fixture
def read(tmp_path: Path, layout: Layout) -> Read:
    """What becomes of a file of these tensors."""

    def make(tensors: Tensors, metadata: dict[str, str] | None = None, limits: LoraLimits = LIMITS) -> Adapter:
        save_file(tensors, tmp_path / "style.safetensors", metadata=metadata)
        return read_adapter(tmp_path / "style.safetensors", layout, limits)

    return make


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(name: str = TO_Q, rows: int = 32, columns: int = 32, rank: int = 4) -> Tensors:
    return {f"{name}.lora_A.weight": noise(rank, columns), f"{name}.lora_B.weight": noise(rows, rank, seed=1)}


def fused(rows: int = 96, columns: int = 32, rank: int = 4) -> Tensors:
    return {f"{QKV}.lora_down.weight": noise(rank, columns), f"{QKV}.lora_up.weight": noise(rows, rank, seed=1)}


def only(adapter: Adapter, where: Parameter) -> Delta:
    (delta,) = adapter.deltas[where]
    return delta


# Layouts.


def test_a_folder_has_the_layout_of_the_pipeline_in_it(tiny_folder: Path, embedded_folder: Path) -> None:
    from kontextd_models.loading import load_pipeline

    for folder in (tiny_folder, embedded_folder):
        ours, theirs = layout_of_folder(check_folder(folder)), layout_of(load_pipeline(folder, torch.float32))
        assert ours == theirs


def test_names_of_older_files_are_those_of_the_library_of_today(tiny_folder: Path) -> None:
    folder = check_folder(tiny_folder)
    clip = {f"text_model.{name}": info for name, info in folder.tensors["text_encoder"].items()}
    clip["text_model.embeddings.position_ids"] = replace(next(iter(clip.values())), dtype="I64", shape=(1, 77))
    t5 = folder.tensors["text_encoder_2"] | {
        "encoder.embed_tokens.weight": folder.tensors["text_encoder_2"]["shared.weight"]
    }
    older = replace(folder, tensors={**folder.tensors, "text_encoder": clip, "text_encoder_2": t5})
    assert layout_of_folder(older) == layout_of_folder(folder)


# Forms.


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_tensors_are_the_files_in_its_own_dtype(read: Read, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in plain().items()}
    tensors[f"{TO_Q}.alpha"] = torch.tensor(6.0).to(dtype)
    adapter = read(tensors)
    form = only(adapter, parameter(TO_Q)).form
    assert isinstance(form, LowRank)
    assert (form.up.dtype, form.factor) == (dtype, 1.5)
    assert torch.equal(form.up.double(), tensors[f"{TO_Q}.lora_B.weight"].double())
    assert torch.equal(form.down.double(), tensors[f"{TO_Q}.lora_A.weight"].double())
    assert adapter.size_bytes == 2 * 32 * 4 * dtype.itemsize
    assert adapter.key == hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    assert (adapter.coverage.matched, adapter.coverage.total, adapter.coverage.is_whole) == (3, 3, True)


def test_a_matrix_that_parameters_share_is_cut_into_their_rows(read: Read) -> None:
    tensors = fused() | {f"{QKV}.dora_scale": noise(96, 1), f"{QKV}.alpha": torch.tensor(2, dtype=torch.int64)}
    adapter = read(tensors)
    assert list(adapter.deltas) == QKV_PARAMETERS
    for index, name in enumerate(QKV_PARAMETERS):
        delta, rows = only(adapter, name), slice(32 * index, 32 * index + 32)
        assert isinstance(delta.form, LowRank)
        assert (delta.start, delta.stop, delta.at, delta.form.factor) == (0, 32, 0, 0.5)
        assert torch.equal(delta.form.up, tensors[f"{QKV}.lora_up.weight"][rows])
        assert torch.equal(delta.form.down, tensors[f"{QKV}.lora_down.weight"])
        assert delta.magnitude is not None
        assert torch.equal(delta.magnitude, tensors[f"{QKV}.dora_scale"][rows])
    assert adapter.size_bytes == 4 * (4 * 32 + 96 * 4 + 96)  # what they share counts once


@pytest.mark.parametrize("whole", [("w1",), ("w2",), ("w1", "w2"), ()], ids=str)
def test_a_lokr_keeps_its_form_and_its_alpha_counts_only_where_it_has_a_rank(
    read: Read, whole: tuple[str, ...]
) -> None:
    shapes = {"w1": (6, 4), "w2": (16, 8)}
    tensors = {f"{QKV}.alpha": torch.tensor(8.0)}
    for name, (rows, columns) in shapes.items():
        if name in whole:
            tensors[f"{QKV}.lokr_{name}"] = noise(rows, columns)
        else:
            tensors |= {f"{QKV}.lokr_{name}_a": noise(rows, 2), f"{QKV}.lokr_{name}_b": noise(2, columns)}
    adapter = read(tensors)
    deltas = [only(adapter, name) for name in QKV_PARAMETERS]
    assert [(delta.start, delta.stop, delta.at) for delta in deltas] == [(0, 32, 0), (32, 64, 0), (64, 96, 0)]
    form = deltas[2].form
    assert isinstance(form, LoKr)
    assert [isinstance(part, Tensor) for part in (form.w1, form.w2)] == ["w1" in whole, "w2" in whole]
    assert form.factor == (1.0 if len(whole) == 2 else 4.0)


def test_a_loha_keeps_its_form(read: Read) -> None:
    tensors = {
        f"{QKV}.hada_w{i}_{side}": noise(*shape) for i in (1, 2) for side, shape in (("a", (96, 3)), ("b", (3, 32)))
    }
    delta = only(read(tensors | {f"{QKV}.alpha": torch.tensor(1.5)}), QKV_PARAMETERS[1])
    assert isinstance(delta.form, LoHa)
    assert (delta.start, delta.stop, delta.form.factor) == (32, 64, 0.5)
    assert torch.equal(delta.form.w2[1], tensors[f"{QKV}.hada_w2_b"])


def test_full_differences_of_weights_and_biases_are_cut_and_never_scaled(read: Read) -> None:
    tensors = {f"{QKV}.diff": noise(96, 32), f"{QKV}.diff_b": noise(96)}
    adapter = read(tensors)
    weight, bias = QKV_PARAMETERS[1], QKV_PARAMETERS[1]._replace(name="transformer_blocks.0.attn.to_k.bias")
    for name, key in ((weight, "diff"), (bias, "diff_b")):
        delta = only(adapter, name)
        assert isinstance(delta.form, Full)
        assert torch.equal(delta.form.diff, tensors[f"{QKV}.{key}"][32:64])


def test_a_factor_is_one_without_alpha_and_over_the_root_where_rank_stabilised(read: Read) -> None:
    form = only(read(plain()), parameter(TO_Q)).form
    assert isinstance(form, LowRank)
    assert form.factor == 1.0
    config = '{"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_rslora": true}'
    form = only(read(plain(), {"lora_adapter_metadata": config}), parameter(TO_Q)).form
    assert isinstance(form, LowRank)
    assert form.factor == 3.0


# DoRA.


@pytest.mark.parametrize(("rows", "shape"), [(128, (128,)), (128, (128, 1)), (32, (32,))])
def test_a_magnitude_for_each_row_is_a_column(read: Read, rows: int, shape: tuple[int, ...]) -> None:
    name = MLP if rows == 128 else TO_Q
    magnitude = only(
        read(plain(name, rows) | {f"{name}.lora_magnitude_vector": noise(*shape)}), parameter(name)
    ).magnitude
    assert magnitude is not None
    assert torch.equal(magnitude, noise(*shape).reshape(-1, 1))


@pytest.mark.parametrize(("name", "rows"), [(MLP, 128), (TO_Q, 32)])
def test_a_magnitude_for_each_column_is_a_row(read: Read, name: str, rows: int) -> None:
    magnitude = only(read(plain(name, rows) | {f"{name}.dora_scale": noise(1, 32)}), parameter(name)).magnitude
    assert magnitude is not None
    assert torch.equal(magnitude, noise(1, 32))


def test_magnitudes_of_columns_over_a_matrix_that_is_cut_are_refused(read: Read) -> None:
    """Also where its halves change places within one parameter: each would be normed by itself."""
    with pytest.raises(LoraFileError, match=r"dora_scale .* columns .* in 3 places .*Convert"):
        read(fused() | {f"{QKV}.dora_scale": noise(1, 32)})
    last = "lora_unet_final_layer_adaLN_modulation_1"
    with pytest.raises(LoraFileError, match=r"dora_scale .* columns .* in 2 places .*Convert"):
        read(plain(last, 64) | {f"{last}.dora_scale": noise(1, 32)})


# What is refused.


def bad(tensors: Tensors, **changed: Tensor) -> Tensors:
    """The tensors with those changed whose names end so."""
    return {
        name: changed.get(name.rsplit(".", 2)[-2 if name.endswith("weight") else -1], value)
        for name, value in tensors.items()
    }


def lokr(w1: tuple[int, ...], w2: tuple[int, ...]) -> Tensors:
    return {f"{TO_Q}.lokr_w1": noise(*w1), f"{TO_Q}.lokr_w2": noise(*w2)}


def loha(first: int, second: int, columns: int = 32) -> Tensors:
    return {
        f"{TO_Q}.hada_w1_a": noise(32, first),
        f"{TO_Q}.hada_w1_b": noise(first, 32),
        f"{TO_Q}.hada_w2_a": noise(32, second),
        f"{TO_Q}.hada_w2_b": noise(second, columns),
    }


NAN = torch.full((4, 32), math.nan)
ALPHA = f"{TO_Q}.alpha"
REFUSED: dict[str, tuple[Tensors, type[LoraError], str]] = {
    "too narrow": (plain(columns=16), LoraMismatch, r"to_q.weight is \[32, 32\] in this .* \[32, 16\] in the file"),
    "too wide": (plain(columns=64), LoraMismatch, r"\[32, 64\] in the file"),
    "too tall": (plain(rows=64), LoraMismatch, r"\[64, 32\] in the file"),
    "shared, too tall": (fused(rows=9216), LoraMismatch, r"to_q.weight and 2 more is \[96, 32\] .* \[9216, 32\]"),
    "all of another size": (
        plain(rows=64, columns=64) | plain(MLP, 256, 64),
        LoraMismatch,
        r"2 of its 2 matrices .*to_q.weight is \[32, 32\] .* \[64, 64\] in the file\..* model of another size",
    ),
    "one of another size": (plain() | plain(MLP, 64), LoraMismatch, r"ff.net.0.proj.weight is \[128, 32\] .* \[64,"),
    "ranks that differ": (bad(plain(), lora_A=noise(3, 32)), LoraFileError, r"not make a matrix: .*down \[3, 32\]"),
    "rank 0": (plain(rank=0), LoraFileError, r"do not make a matrix: .*\[0, 32\]"),
    "a vector": (bad(plain(), lora_A=noise(32)), LoraFileError, r"do not make a matrix: .*\[32\]"),
    "a scalar": (bad(plain(), lora_A=noise()), LoraFileError, r"do not make a matrix: .*\[\]"),
    "four sides": (bad(plain(), lora_A=noise(4, 32, 1, 1)), LoraFileError, r"\[4, 32, 1, 1\]"),
    "rank over the limit": (plain(rank=1025), LoraFileError, r"to_q.weight has rank 1025; the most allowed is 1024"),
    "lokr of another size": (lokr((4, 4), (4, 4)), LoraMismatch, r"is \[32, 32\] in .* \[16, 16\] in the file"),
    "lokr of vectors": (lokr((4,), (8, 8)), LoraFileError, r"w1 \[4\]"),
    "lokr of nothing": (lokr((0, 4), (8, 8)), LoraFileError, r"a side of 0: \[0, 32\]"),
    "loha that is none": (loha(2, 2, 16), LoraFileError, r"w2_b \[2, 16\]"),
    "loha of two ranks": (loha(2, 3) | {ALPHA: noise()}, LoraFileError, "of the ranks 2 and 3.*alpha is divided by"),
    "difference of another size": ({f"{TO_Q}.diff": noise(32, 16)}, LoraMismatch, r"\[32, 16\] in the file"),
    "magnitude of another size": (plain() | {f"{TO_Q}.dora_scale": noise(16, 1)}, LoraMismatch, r"shape \[16, 1\]"),
    "magnitude of columns as a vector": (
        plain(MLP, 128) | {f"{MLP}.dora_scale": noise(32)},
        LoraMismatch,
        r"dora_scale has the shape \[32\]",
    ),
    "alpha of two": (plain() | {ALPHA: noise(2)}, LoraFileError, r"alpha has the shape \[2\]; an alpha is one number"),
    "alpha 0": (plain() | {ALPHA: torch.tensor(0.0)}, LoraFileError, r"alpha 0 at rank 4 multiplies .* by 0"),
    "alpha NaN": (plain() | {ALPHA: torch.tensor(math.nan)}, LoraFileError, "alpha nan"),
    "alpha infinite": (plain() | {ALPHA: torch.tensor(-math.inf)}, LoraFileError, "alpha -inf"),
    "alpha absurd": (plain() | {ALPHA: torch.tensor(4004.0)}, LoraFileError, r"by 1001; it must not be 0, and 1000 at"),
    "alpha of booleans": (plain() | {ALPHA: torch.tensor(True)}, LoraFileError, "alpha is of dtype BOOL"),
    "NaN": (bad(plain(), lora_A=NAN), LoraFileError, r"to_q.lora_A.weight holds the value nan.*training failed"),
    "infinite": (bad(plain(), lora_B=NAN.T.nan_to_num(math.inf)), LoraFileError, r"lora_B.weight holds the value inf"),
    "minus infinite": (bad(plain(), lora_B=NAN.T.nan_to_num(-math.inf)), LoraFileError, r"the value -inf"),
    "NaN in float8": (bad(plain(), lora_A=NAN.to(torch.float8_e4m3fn)), LoraFileError, "the value nan"),
    "infinite in float8": (
        bad(plain(), lora_A=NAN.nan_to_num(math.inf).to(torch.float8_e5m2)),
        LoraFileError,
        "the value inf",
    ),
    "NaN in a magnitude": (plain() | {f"{TO_Q}.dora_scale": NAN[0]}, LoraFileError, "dora_scale holds the value nan"),
    "absurd": (bad(plain(), lora_A=noise(4, 32) * 1e9), LoraFileError, r"holds the value -?\d\.\d+e\+09"),
    "absurd together": (
        bad(plain(), lora_A=noise(4, 32) * 1e4, lora_B=noise(32, 4) * 1e4),
        LoraFileError,
        r"could change transformer_blocks.0.attn.to_q.weight by \d\.\d+e\+09",
    ),
    "whole numbers": (bad(plain(), lora_A=torch.zeros(4, 32, dtype=torch.int8)), LoraFileError, "dtype I8. Save"),
    "booleans": (bad(plain(), lora_A=torch.zeros(4, 32, dtype=torch.bool)), LoraFileError, "of dtype BOOL. Save it as"),
    "complex": (bad(plain(), lora_A=torch.zeros(4, 32, dtype=torch.complex64)), LoraFileError, "of dtype C64"),
    "another float8": (bad(plain(), lora_A=noise(4, 32).to(torch.float8_e4m3fnuz)), LoraFileError, "F8_E4M3FNUZ"),
    "half of it": ({f"{TO_Q}.lora_A.weight": noise(4, 32)}, LoraError, r"style.safetensors"),
    "another architecture": (
        plain("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        LoraMismatch,
        r"matches nothing of this model, unet\.down_blocks.* for one of its 2 tensors. It looks like .*(SDXL|SD)",
    ),
    "another form": ({f"{TO_Q}.oft_blocks": noise(4, 8, 8)}, LoraFileError, "OFT cannot be merged. Convert"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_with_its_value(read: Read, case: str) -> None:
    tensors, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as caught:
        read({name: value.contiguous().clone() for name, value in tensors.items()})
    assert str(caught.value).startswith("style.safetensors")
    assert (str(caught.value).isprintable(), len(str(caught.value)) < 700, str(caught.value)[-1]) == (True, True, ".")


def test_a_file_that_contradicts_itself_is_named(read: Read) -> None:
    with pytest.raises(LoraFileError, match=r"^style\.safetensors: .* are both for "):
        read(plain() | plain(TO_Q.removeprefix("transformer.")))
    with pytest.raises(LoraFileError, match=r"^style\.safetensors: the metadata lora_adapter_metadata is not JSON"):
        read(plain(), {"lora_adapter_metadata": "{"})


def test_shapes_are_refused_before_a_tensor_is_read(read: Read) -> None:
    """A file of another size whose values are all NaN is called a mismatch."""
    with pytest.raises(LoraMismatch):
        read({name: value * math.nan for name, value in plain(rows=64).items()})


def test_what_the_model_has_no_place_for_is_named_and_neither_read_nor_kept(read: Read) -> None:
    other = "lora_unet_double_blocks_7_img_attn_qkv"
    unused = {f"{other}.lora_down.weight": torch.full((4, 32), math.nan), f"{other}.lora_up.weight": noise(96, 4)}
    adapter = read(plain() | unused | {"z": torch.zeros(0, dtype=torch.int64)})
    assert (adapter.coverage.matched, adapter.coverage.total, adapter.coverage.is_whole) == (2, 5, False)
    assert adapter.coverage.unmatched == (*sorted(unused), "z")
    assert adapter.size_bytes == 2 * 32 * 4 * 4
    assert list(adapter.deltas) == [parameter(TO_Q)]


def test_a_text_encoders_part_is_read_with_the_rest(read: Read) -> None:
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    adapter = read({f"{name}.lora_down.weight": noise(2, 32), f"{name}.lora_up.weight": noise(37, 2)} | fused())
    assert Parameter(Component.CLIP, "encoder.layers.0.mlp.fc1.weight") in adapter.deltas
    assert adapter.coverage.is_whole


def test_a_lower_limit_of_ranks_is_kept(read: Read) -> None:
    with pytest.raises(LoraFileError, match="has rank 4; the most allowed is 3"):
        read(plain(), limits=LoraLimits(max_rank=3))


def test_reading_takes_the_room_of_the_file_and_little_more(tmp_path: Path) -> None:
    """Python's own objects; tensors are counted by `size_bytes`."""
    layout = {parameter(MLP): (4096, 4096)}
    save_file(plain(MLP, 4096, 4096, rank=1024), tmp_path / "big.safetensors")
    tracemalloc.start()
    adapter = read_adapter(tmp_path / "big.safetensors", layout, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (adapter.size_bytes, peak < 4 * 2**20) == (2 * 1024 * 4096 * 4, True)
