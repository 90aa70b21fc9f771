"""What the reference's control LoRAs have besides pairs: biases of the up matrices, and norms trained whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from hand_made import digest, errors, merger_of
from kontextd_models import LoraLimits
from kontextd_models.errors import LoraError, LoraFileError, LoraMismatch
from kontextd_models.loading import load_pipeline
from kontextd_models.lora.adapter import Adapter, Full
from kontextd_models.lora.layout import Component, Layout, Parameter
from kontextd_models.lora.pristine import parameters_of
from kontextd_models.lora.reading import read_adapter
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Read = Callable[..., Adapter]

TO_Q, QKV = "transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv"
T5_Q = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
NORM = "transformer_blocks.0.attn.norm_q"
SPELLINGS = (
    "double_blocks.0.img_attn.norm.query_norm.scale",
    "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight",
    f"transformer.{NORM}.weight",
)


@pytest.fixture
def pipeline(tiny_folder: Path) -> FluxKontextPipeline:
    """In bfloat16, of the test's own."""
    return load_pipeline(tiny_folder, torch.bfloat16)


@pytest.fixture
def read(tmp_path: Path, tiny_layout: Layout) -> Read:
    def make(tensors: Tensors, metadata: dict[str, str] | None = None) -> Adapter:
        save_file(tensors, tmp_path / "control.safetensors", metadata=metadata)
        return read_adapter(tmp_path / "control.safetensors", tiny_layout, LoraLimits())

    return make


def at(name: str) -> Parameter:
    return Parameter(Component.TRANSFORMER, name)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(name: str, rows: int = 32, rank: int = 4) -> Tensors:
    return {f"{name}.lora_A.weight": noise(rank, 32), f"{name}.lora_B.weight": noise(rows, rank, seed=1)}


# Biases.


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("in_metadata", [False, True])
def test_a_bias_is_scaled_with_its_pair_as_peft_scales_it(
    read: Read, pipeline: FluxKontextPipeline, in_metadata: bool, rank_stabilised: bool
) -> None:
    tensors, bias = pair(TO_Q), noise(32, seed=2)
    layer = pipeline.transformer.get_submodule(TO_Q)
    linear = nn.Linear(32, 32, dtype=torch.float64)
    linear.weight.data, linear.bias.data = layer.weight.double(), layer.bias.double()
    rank_stabilised = rank_stabilised and in_metadata  # a tensor says alpha only
    config = LoraConfig(r=4, lora_alpha=6, lora_bias=True, use_rslora=rank_stabilised, init_lora_weights=False)
    theirs = LoraLinear(linear, "it", config, r=4, lora_alpha=6)
    theirs.lora_A["it"].weight.data = tensors[f"{TO_Q}.lora_A.weight"].double()
    theirs.lora_B["it"].weight.data = tensors[f"{TO_Q}.lora_B.weight"].double()
    theirs.lora_B["it"].bias.data = bias.double()
    theirs.merge()

    said = f'{{"transformer.lora_alpha": 6, "transformer.use_rslora": {str(rank_stabilised).lower()}}}'
    alpha = {} if in_metadata else {f"{TO_Q}.alpha": torch.tensor(6.0)}
    metadata = {"lora_adapter_metadata": said} if in_metadata else None
    adapter = read({**tensors, f"{TO_Q}.lora_B.bias": bias, **alpha}, metadata)
    assert adapter.coverage.is_whole
    merger_of(pipeline).merge([(adapter, 1.0)])
    for name in ("weight", "bias"):
        exact = getattr(theirs.get_base_layer(), name).detach()
        error, floor = errors(getattr(layer, name).detach(), exact)
        assert error < 1.002 * floor, name


def test_a_bias_of_a_shared_matrix_goes_where_its_rows_go(read: Read) -> None:
    bias = noise(96)
    adapter = read({**pair(QKV, 96), f"{QKV}.lora_B.bias": bias, f"{QKV}.alpha": torch.tensor(2.0)})
    for index, name in enumerate("qkv"):
        (delta,) = adapter.deltas[at(f"transformer_blocks.0.attn.to_{name}.bias")]
        assert isinstance(delta.form, Full)
        assert delta.form.factor == 0.5
        assert torch.equal(delta.form.diff, bias[32 * index : 32 * index + 32])


@pytest.mark.parametrize(
    ("name", "more"),
    [
        (T5_Q, {}),  # has no bias
        (f"transformer.{TO_Q}", {"lora_magnitude_vector": noise(32)}),  # peft has none with DoRA
    ],
)
def test_a_bias_that_means_nothing_is_told_of(read: Read, name: str, more: Tensors) -> None:
    tensors = pair(name) | {f"{name}.{end}": value for end, value in more.items()}
    adapter = read({**tensors, f"{name}.lora_B.bias": noise(32)})
    assert adapter.coverage.unmatched == (f"{name}.lora_B.bias",)
    assert len(adapter.deltas) == 1


BIAS = f"{TO_Q}.lora_B.bias"
REFUSED: dict[str, tuple[Tensors, type[LoraError], str]] = {
    "a bias of another size": (
        {BIAS: noise(31)},
        LoraMismatch,
        r"to_q\.bias is \[32\] in this model and \[31\] in the",
    ),
    "a NaN": ({BIAS: noise(32) * float("nan")}, LoraFileError, r"lora_B\.bias holds the value nan"),
    "an absurd one": (
        {BIAS: noise(32) * 1e5, f"{TO_Q}.alpha": torch.tensor(4000.0)},
        LoraFileError,
        r"could change transformer_blocks\.0\.attn\.to_q\.weight by \d\.\d+e\+0[78]",
    ),
    "two": ({BIAS: noise(32), f"{TO_Q}.diff_b": noise(32)}, LoraFileError, r"attn\.to_q\.bias of the transformer"),
    "a norm of another size": ({SPELLINGS[0]: noise(7)}, LoraMismatch, r"norm_q\.weight is \[\d+\] in .* \[7\] in the"),
    "a norm twice": ({SPELLINGS[0]: noise(16), SPELLINGS[2]: noise(16)}, LoraFileError, "are both for .*norm_q.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_with_its_value(read: Read, case: str) -> None:
    tensors, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as caught:
        read(pair(TO_Q) | tensors)
    assert str(caught.value).startswith("control.safetensors")


# Norms.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_norm_of_a_control_lora_stands_in_for_the_models(
    read: Read, pipeline: FluxKontextPipeline, spelling: str, dtype: torch.dtype
) -> None:
    before, weight = digest(pipeline), parameters_of(pipeline)[at(f"{NORM}.weight")]
    base, value = weight.detach().clone(), (1 + noise(*weight.shape)).to(dtype)
    adapter = read(pair(TO_Q) | {spelling: value})
    assert adapter.coverage.is_whole
    merger = merger_of(pipeline)
    merger.merge([(adapter, 1.0)])
    assert torch.equal(weight.detach(), value.bfloat16())
    merger.merge([(adapter, 0.5)])
    error, floor = errors(weight.detach(), (base.double() + value.double()) / 2)
    assert error < 1.002 * floor
    merger.merge([])
    assert digest(pipeline) == before


def test_norms_of_two_control_loras_add_their_differences_in_any_order(
    read: Read, pipeline: FluxKontextPipeline
) -> None:
    weight = parameters_of(pipeline)[at(f"{NORM}.weight")]
    base, values = weight.detach().clone(), [noise(*weight.shape, seed=seed) for seed in (1, 2)]
    both = [(read(pair(TO_Q) | {SPELLINGS[0]: value}), 1.0) for value in values]
    merger, found = merger_of(pipeline), []
    for order in (both, both[::-1]):
        merger.merge([])
        merger.merge(order)
        found.append(weight.detach().clone())
    assert torch.equal(*found)
    error, floor = errors(found[0], values[0].double() + values[1].double() - base.double())
    assert error < 1.002 * floor


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_norms_alone_are_those_of_a_checkpoint(read: Read, spelling: str) -> None:
    tensors = {f"{TO_Q}.weight": noise(32, 32), f"{QKV}.weight": noise(96, 32), spelling: noise(16)}
    with pytest.raises(LoraError, match=r"matches nothing of this model|cannot be merged"):
        read(tensors)


@pytest.mark.parametrize(
    "key",
    [
        f"transformer.{TO_Q}.weight",
        "transformer.norm_out.linear.weight",
        "double_blocks.0.img_attn.proj.scale",
        "diffusion_model.double_blocks.0.img_attn.proj.set_weight",
        "text_encoder.text_model.final_layer_norm.weight",
    ],
)
def test_no_other_weight_is_replaced(read: Read, key: str) -> None:
    assert read(pair(TO_Q) | {key: noise(32)}).coverage.unmatched == (key,)
