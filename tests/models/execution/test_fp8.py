"""Float8 blocks: which layers, what their numbers are, LoRAs at full strength, and the base to the bit after them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import CPU, KINDS, digest, linears, style
from kontextd_kernels.fp8_linear.reference import summed
from kontextd_kernels.lora_merge import merged_fp8
from kontextd_models import Done, EditRequest, EngineConfig, MemoryMode, load_engine, memory
from kontextd_models.embedded.evaluate import as_tensor, edited, psnr
from kontextd_models.engine import Engine
from kontextd_models.execution import fp8
from kontextd_models.execution.fp8 import Fp8Linear
from kontextd_models.execution.precision import fp8_layers
from kontextd_models.loading import load_pipeline
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.merged_sets import MergedSets
from kontextd_models.lora.merging import Merger, open_merger
from kontextd_models.lora.pristine import Place, parameters_of, size_of
from PIL import Image
from torch import Tensor, nn

Photo = Callable[[int, int], Image.Image]


class Lowered:
    """A pipeline in float8, one beside it that is not, and the merger of each."""

    def __init__(self, folder: Path, dtype: torch.dtype, mode: MemoryMode = MemoryMode.RESIDENT) -> None:
        self.pipeline, self.full = load_pipeline(folder, dtype), load_pipeline(folder, dtype)
        masters = fp8.lower(self.pipeline, folder, CPU, mode, 0)
        for pipeline in (self.pipeline, self.full):
            memory.place(pipeline, mode, CPU)
        self.merger = open_merger(self.pipeline, folder, CPU, mode, masters)
        self.of_full = open_merger(self.full, folder, CPU, mode)

    def pairs(self) -> dict[Parameter, tuple[Tensor, Tensor]]:
        """Codes and scales as they lie in the model."""
        live = parameters_of(self.pipeline)
        return {at: (live[at].detach(), scale) for at, scale in fp8.scales_of(self.pipeline).items()}

    def bits(self) -> list[bytes]:
        return [
            tensor.contiguous().view(torch.uint8).numpy().tobytes() for pair in self.pairs().values() for tensor in pair
        ]

    def weight(self, at: Parameter) -> Tensor:
        codes, scale = self.pairs()[at]
        return codes.double() * scale


def of_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    return merged_fp8(weight, weight[:, :0], weight[:0])


def equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, expected, strict=True)
    )


# Which layers.


def test_all_layers_of_blocks_are_float8_but_modulation_and_the_last_single_block(tiny_folder: Path) -> None:
    lowered = Lowered(tiny_folder, torch.float32)
    modules = dict(lowered.pipeline.transformer.named_modules())
    found = {name for name, module in modules.items() if isinstance(module, Fp8Linear)}
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert found == set(fp8_layers(linear))
    last = f"single_transformer_blocks.{lowered.pipeline.transformer.config.num_single_layers - 1}."
    blocks = {name for name in linear if "blocks." in name}
    assert blocks - found == {name for name in blocks if name.startswith(last) or ".norm" in name}
    assert {name.partition(".")[0] for name in linear - blocks} >= {"x_embedder", "context_embedder", "proj_out"}
    assert found


def test_names_and_the_module_tree_stay(tiny_folder: Path) -> None:
    lowered = Lowered(tiny_folder, torch.float32)
    for one, other in zip((lowered.pipeline, lowered.full), (lowered.full, lowered.pipeline), strict=True):
        assert one.transformer.state_dict().keys() == other.transformer.state_dict().keys()
    names = [list(dict(one.transformer.named_modules())) for one in (lowered.pipeline, lowered.full)]
    assert names[0] == names[1]
    shapes = [{at: value.shape for at, value in parameters_of(one).items()} for one in (lowered.pipeline, lowered.full)]
    assert shapes[0] == shapes[1]


def test_layers_are_told_by_their_names_alone() -> None:
    names = [f"single_transformer_blocks.{index}.{part}" for index in (9, 10) for part in ("norm.linear", "proj_out")]
    names += ["transformer_blocks.10.attn.to_q", "transformer_blocks.0.norm1_context.linear", "norm_out.linear"]
    assert fp8_layers(names) == ("single_transformer_blocks.9.proj_out", "transformer_blocks.10.attn.to_q")
    assert fp8_layers(["transformer_blocks.0.ff.net.2"]) == ("transformer_blocks.0.ff.net.2",)
    assert fp8_layers([]) == ()


# The numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_holds_the_codes_of_its_weights(tiny_folder: Path, dtype: torch.dtype) -> None:
    lowered = Lowered(tiny_folder, dtype)
    full = parameters_of(lowered.full)
    assert all(equal(pair, of_weight(full[at].detach())) for at, pair in lowered.pairs().items())
    others = [at for at in full if at not in lowered.pairs()]
    assert all(torch.equal(parameters_of(lowered.pipeline)[at], full[at]) for at in others)


@pytest.mark.parametrize("place", Place)
def test_masters_are_kept_wherever_there_is_room_before_the_weights_become_codes(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    full = load_pipeline(tiny_folder, torch.bfloat16)
    pipeline = load_pipeline(tiny_folder, torch.bfloat16)
    monkeypatch.setattr(fp8, "choose", lambda *_: (place, "a test says so"))
    masters = fp8.lower(pipeline, tiny_folder, CPU, MemoryMode.RESIDENT, 0)
    loaded, lowered = parameters_of(full), fp8.scales_of(pipeline)
    assert masters.place is place
    assert masters.still_to_copy == size_of(loaded) - size_of({at: loaded[at] for at in lowered})
    for _ in range(2):
        assert all(torch.equal(masters.pristine.weight(at), weight) for at, weight in loaded.items())


@pytest.mark.parametrize("shape", [(1, 24), (1, 7), (2, 3, 5)])
def test_a_layer_gives_the_product_of_its_codes_for_tokens_of_any_shape(
    tiny_folder: Path, shape: tuple[int, ...]
) -> None:
    pipeline = Lowered(tiny_folder, torch.float32).pipeline
    layer = next(module for module in pipeline.transformer.modules() if isinstance(module, Fp8Linear))
    tokens = torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(1))
    rows = summed(tokens.flatten(0, -2), layer.weight, layer.weight_scale, layer.bias)
    assert torch.equal(layer(tokens), rows.view(*shape, layer.out_features))


# LoRAs.


@pytest.mark.parametrize("kinds", [("low-rank",), KINDS])
def test_a_merge_holds_the_codes_of_the_merged_sum(tiny_folder: Path, kinds: tuple[str, ...]) -> None:
    lowered = Lowered(tiny_folder, torch.float32)
    wanted = [(style(lowered.full, 1, *kinds), 0.8), (style(lowered.full, 2, *kinds), -1.3)]
    lowered.merger.merge(wanted)
    lowered.of_full.merge(wanted)
    full = parameters_of(lowered.full)
    assert all(equal(pair, of_weight(full[at].detach())) for at, pair in lowered.pairs().items())
    rest = [at for at in full if at not in lowered.pairs()]
    assert all(torch.equal(parameters_of(lowered.pipeline)[at], full[at]) for at in rest)


def test_a_bfloat16_model_is_quantised_from_the_sum_and_not_from_its_rounding(tiny_folder: Path) -> None:
    lowered = Lowered(tiny_folder, torch.bfloat16)
    held = style(lowered.full, 1, "low-rank")
    base = {at: value.detach().float() for at, value in parameters_of(lowered.full).items()}
    lowered.merger.merge([(held, 0.8)])
    for at, pair in lowered.pairs().items():
        (one,) = held.deltas[at]
        up, down = one.form.up.float() * (0.8 * one.form.factor), one.form.down.float()
        assert equal(pair, merged_fp8(base[at].bfloat16(), up, down))


def test_a_lora_keeps_its_strength_where_codes_that_are_added_to_lose_it(tiny_folder: Path) -> None:
    """Strength: the part of the wanted change that is there, ⟨change, wanted⟩ / ⟨wanted, wanted⟩."""
    lowered = Lowered(tiny_folder, torch.float32)
    held = style(lowered.full, 1, "low-rank", rank=4)
    strengths, added = [], []
    base = {at: lowered.weight(at) for at in lowered.pairs()}
    codes = {at: (pair[0].clone(), pair[1].clone()) for at, pair in lowered.pairs().items()}
    scale = 0.1  # changes the weights by a hundredth
    lowered.merger.merge([(held, scale)])
    for at in base:
        (one,) = held.deltas[at]
        wanted = (one.form.up.double() @ one.form.down.double()) * (scale * one.form.factor)
        strengths.append(_part(lowered.weight(at) - base[at], wanted))
        onto = (codes[at][0].double() + wanted / codes[at][1]).to(torch.float8_e4m3fn)
        added.append(_part(onto.double() * codes[at][1] - base[at], wanted))
    assert np.mean(strengths) == pytest.approx(1, abs=0.05)
    assert np.mean(added) < 0.5


def _part(change: Tensor, wanted: Tensor) -> float:
    return float((change * wanted).sum() / wanted.square().sum())


@pytest.mark.parametrize("mode", [MemoryMode.RESIDENT, MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL])
def test_after_any_history_no_lora_is_the_same_codes_to_the_bit(tiny_folder: Path, mode: MemoryMode) -> None:
    lowered = Lowered(tiny_folder, torch.bfloat16, mode)
    before, of_all = lowered.bits(), digest(lowered.pipeline)
    styles, sets = [style(lowered.full, seed, *KINDS) for seed in range(3)], MergedSets(2**30)
    for wanted in ([(styles[0], 1.0)], [(styles[1], -0.5), (styles[2], 2.0)], [(styles[0], 1.0)]):
        lowered.merger.merge(wanted, sets)
        assert lowered.bits() != before
    lowered.merger.merge([])
    assert lowered.bits() == before
    assert digest(lowered.pipeline) == of_all
    assert lowered.merger.is_base


def test_a_set_that_is_kept_comes_back_with_its_scales(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered, sets = Lowered(tiny_folder, torch.float32), MergedSets(2**30)
    wanted = [(style(lowered.full, 1, "low-rank"), 3.0)]
    lowered.merger.merge(wanted, sets)
    merged = lowered.bits()
    lowered.merger.merge([], sets)
    monkeypatch.setattr(Merger, "_write_sum", lambda *_: pytest.fail("it was merged anew"))
    lowered.merger.merge(wanted, sets)
    assert lowered.bits() == merged


def test_a_merge_that_breaks_off_between_codes_and_scales_is_set_right_by_the_next(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = Lowered(tiny_folder, torch.float32)
    before, held = lowered.bits(), style(lowered.full, 1, "low-rank")
    write_sum = fp8.write_sum

    def broken(base: Tensor, up: Tensor, down: Tensor, codes: Tensor, scale: Tensor) -> None:
        write_sum(base, up, down, codes, scale.clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(fp8, "write_sum", broken)
    with pytest.raises(KeyboardInterrupt):
        lowered.merger.merge([(held, 5.0)])
    monkeypatch.setattr(fp8, "write_sum", write_sum)
    assert lowered.bits() != before
    lowered.merger.merge([])
    assert lowered.bits() == before


def test_a_bias_and_rows_of_a_float8_weight_are_merged_as_of_any_other(tiny_folder: Path) -> None:
    lowered = Lowered(tiny_folder, torch.float32)
    held = style(lowered.full, 4, "LoHa", "full", every=2)
    lowered.merger.merge([(held, 1.0)])
    lowered.of_full.merge([(held, 1.0)])
    full = parameters_of(lowered.full)
    touched = [at for at in lowered.pairs() if at in held.deltas]
    untouched = [at for at in lowered.pairs() if at not in held.deltas]
    assert touched
    assert untouched
    assert all(equal(lowered.pairs()[at], of_weight(full[at].detach())) for at in (*touched, *untouched))


# The engine.


def loaded(folder: Path, **changes: object) -> Engine:
    return load_engine(EngineConfig(model=folder, device="cpu", **changes))


def picture(engine: Engine, image: Image.Image, **changes: object) -> np.ndarray:
    request = EditRequest(image, "make it red", 3, 7, enable_safety_checker=False, **changes)
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return np.asarray(done.images[0]).astype(int)


def test_an_engine_in_float8_says_so_and_makes_nearly_the_same_picture(
    tiny_folder: Path, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = loaded(tiny_folder, precision="fp8")
    assert engine.model.numerics == "float32, fp8 blocks"
    assert "fp8 on the CPU is worked out by its reference" in engine.model.notes[0]
    assert engine.model.notes[0] in caplog.text
    difference = picture(engine, photo(64, 64)) - picture(loaded(tiny_folder), photo(64, 64))
    assert 0 < np.abs(difference).mean() < 3


def test_streamed_and_resident_blocks_give_the_same_picture(tiny_folder: Path) -> None:
    tokens = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for mode in (MemoryMode.RESIDENT, MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL):
        transformer = Lowered(tiny_folder, torch.float32, mode).pipeline.transformer
        given = {
            "encoder_hidden_states": torch.ones(1, 24, 32),
            "pooled_projections": torch.ones(1, 32),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([2.5]),
            "txt_ids": torch.zeros(24, 3),
            "img_ids": torch.zeros(16, 3),
        }
        with torch.no_grad():
            outputs.append(transformer(hidden_states=tokens, **given, return_dict=False)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_the_embedded_model_s_edits_stay_above_40_db(embedded_folder: Path, photo: Photo) -> None:
    full, lowered = loaded(embedded_folder), loaded(embedded_folder, precision="fp8")
    likeness = [
        psnr(*(as_tensor(edited(engine, photo(128, 128), prompt, 8, 1)) for engine in (full, lowered)))
        for prompt in ("make it black and white", "a red circle in the middle")
    ]
    assert min(likeness) > 40
    assert max(likeness) < 80


def test_weights_that_are_float8_are_of_the_transformer(tiny_folder: Path) -> None:
    lowered = Lowered(tiny_folder, torch.float32)
    assert {at.component for at in lowered.pairs()} == {Component.TRANSFORMER}
    assert set(lowered.pairs()) < set(linears(lowered.full))
