"""Merging: exact, in any order, only what changed, and the base to the bit after any history."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from hand_made import (
    CPU,
    KINDS,
    Factors,
    adapter,
    digest,
    errors,
    exact_sum,
    linears,
    merger_of,
    pipeline_of,
    style,
)
from kontextd_models import MemoryMode, memory
from kontextd_models.loading import load_pipeline
from kontextd_models.lora import merging
from kontextd_models.lora.adapter import Adapter, Delta, Full, LowRank
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.merged_sets import MergedSets
from kontextd_models.lora.merging import Merger, MergeReport
from kontextd_models.lora.pristine import Copies, parameters_of
from torch import Tensor

# What sums in float32 may add to the error of one rounding to bfloat16, relative to it.
AT_THE_FLOOR = 1.001
# Of a float32 model. Its floor is 2.5e-8, and each product and sum of the merge rounds as coarsely itself.
FLOAT32_ERROR = 2e-7


@pytest.fixture
def pipeline(tiny_folder: Path) -> FluxKontextPipeline:
    """In bfloat16, of the test's own."""
    return load_pipeline(tiny_folder, torch.bfloat16)


def weights(pipeline: object) -> dict[Parameter, Tensor]:
    return {at: value.detach().clone() for at, value in parameters_of(pipeline).items()}


def worst(pipeline: object, base: dict[Parameter, Tensor], wanted: list[tuple[Adapter, float]]) -> list[float]:
    """Of each weight that is merged into: its error, in units of the error of one rounding."""
    now, ratios = parameters_of(pipeline), []
    for at in base:
        scaled = [(one, scale) for held, scale in wanted for one in held.deltas.get(at, ())]
        if scaled:
            error, floor = errors(now[at].detach(), exact_sum(base[at], scaled))
            ratios.append(error / floor)
    return ratios


class BrokenOff(Exception):
    """Raised by the tests inside a merge."""


class Breaker:
    """Raises in a merge: before a weight is looked at, when its sum is made, or once it was written wrongly."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.left = 0

    def arm(self, error: BaseException, at: int) -> None:
        """Raise at the nth of these steps from now on; there are two for a weight that is merged into."""
        self.error, self.left = error, at

    def step(self, spoil: Callable[[], object] | None = None) -> None:
        self.left -= 1
        if self.error is None or self.left:
            return
        error, self.error = self.error, None
        if spoil is not None:
            spoil()
        raise error


@pytest.fixture
def breaker(monkeypatch: pytest.MonkeyPatch) -> Breaker:
    made = Breaker()
    product, summed, weight = merging.merge_low_rank, merging._summed, Copies.weight

    def merge_low_rank(base: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Tensor:
        made.step(lambda: product(base, up * 3, down, out=out))
        return product(base, up, down, out=out)

    def _summed(base: Tensor, *given: object) -> Tensor:
        made.step()
        return summed(base, *given)

    def pristine_weight(kept: Copies, parameter: Parameter) -> Tensor:
        made.step()
        return weight(kept, parameter)

    monkeypatch.setattr(merging, "merge_low_rank", merge_low_rank)
    monkeypatch.setattr(merging, "_summed", _summed)
    monkeypatch.setattr(Copies, "weight", pristine_weight)
    return made


# As exact as one rounding.


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_every_form_is_as_exact_as_rounding_peft_s_sum_in_float64_once(
    pipeline: FluxKontextPipeline, kind: str
) -> None:
    base, wanted = weights(pipeline), [(style(pipeline, 1, kind), 0.8), (style(pipeline, 2, kind), -1.3)]
    report = merger_of(pipeline).merge(wanted)
    assert report == MergeReport(written=len(linears(pipeline)), restored=0)
    ratios = worst(pipeline, base, wanted)
    assert len(ratios) == len(linears(pipeline))
    assert max(ratios) < AT_THE_FLOOR
    assert {at for at, value in weights(pipeline).items() if torch.equal(value, base[at])} == base.keys() - linears(
        pipeline
    ).keys()


def test_a_float32_model_is_merged_in_float32(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, torch.float32)
    base, wanted = weights(pipeline), [(style(pipeline, 1, *KINDS), 0.8), (style(pipeline, 2, *KINDS), -1.3)]
    merger_of(pipeline).merge(wanted)
    for at, weight in linears(pipeline).items():
        exact = exact_sum(base[at], [(one, scale) for held, scale in wanted for one in held.deltas[at]])
        assert errors(weight.detach(), exact)[0] < FLOAT32_ERROR


def test_two_doras_are_the_sum_of_their_deltas_from_the_base_in_either_order(pipeline: FluxKontextPipeline) -> None:
    base = weights(pipeline)
    wanted = [(style(pipeline, 1, "low-rank DoRA"), 1.0), (style(pipeline, 2, "low-rank DoRA"), 0.7)]
    merger = merger_of(pipeline)
    merger.merge(wanted)
    assert max(worst(pipeline, base, wanted)) < AT_THE_FLOOR
    once = digest(pipeline)
    merger.merge([])
    merger.merge(wanted[::-1])
    assert digest(pipeline) == once


def test_64_loras_of_mixed_ranks_and_forms_are_as_exact_and_no_order_shows_in_a_bit(
    pipeline: FluxKontextPipeline,
) -> None:
    base = weights(pipeline)
    kinds = ["low-rank" if seed % 3 else KINDS[seed % len(KINDS)] for seed in range(64)]
    wanted = [(style(pipeline, seed, kind, every=1 + seed % 4), 0.05 * (seed - 20)) for seed, kind in enumerate(kinds)]
    merger, orders, found = merger_of(pipeline), random.Random(0), set()
    for _ in range(3):
        merger.merge([])
        merger.merge(orders.sample(wanted, len(wanted)))
        found.add(digest(pipeline))
    assert len(found) == 1
    assert max(worst(pipeline, base, wanted)) < AT_THE_FLOOR


@pytest.fixture(scope="module")
def large() -> SimpleNamespace:
    """A random transformer of 288 million parameters in bfloat16: 576 MB."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=4, num_single_layers=8, num_attention_heads=8, guidance_embeds=True
        )
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in transformer.parameters():
        value.normal_(0, 0.02, generator=generator)
    return pipeline_of(transformer)


def test_a_model_of_288_million_parameters_is_merged_at_the_rounding_floor(large: SimpleNamespace) -> None:
    assert sum(value.numel() for value in large.transformer.parameters()) == pytest.approx(288e6, rel=0.01)
    before, merger = digest(large), merger_of(large)
    every = 6  # of the linears a sixth each, so that float64 stays a matter of seconds
    wanted = [(style(large, seed, "low-rank", every=every, rank=16), 0.5 + seed / 4) for seed in (0, 6)]
    touched = {at: value.detach().clone() for at, value in parameters_of(large).items() if at in wanted[0][0].deltas}
    merger.merge(wanted)
    squares = torch.zeros(3, dtype=torch.float64)  # of our error, of the floor's, of the weights
    for at, base in touched.items():
        exact = exact_sum(base, [(held.deltas[at][0], scale) for held, scale in wanted])
        ours = parameters_of(large)[at].detach().double()
        rounded = exact.to(torch.bfloat16).double()
        squares += torch.stack([(ours - exact).square().sum(), (rounded - exact).square().sum(), exact.square().sum()])
    error, floor = (squares[:2] / squares[2]).sqrt().tolist()
    assert floor == pytest.approx(1.6e-3, rel=0.1)
    assert error < floor * AT_THE_FLOOR
    merger.merge([])
    assert digest(large) == before


@pytest.fixture
def coarse_products() -> Iterator[tuple[object, ...]]:
    """The switches of both devices, set to what keeps ten bits of a factor."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32"
    yield switches
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


def test_products_are_exact_even_where_the_process_allows_coarse_ones(
    pipeline: FluxKontextPipeline,
    coarse_products: tuple[object, ...],
    breaker: Breaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()

    def looking(*given: Tensor, out: Tensor) -> Tensor:
        seen.update(switch.fp32_precision for switch in coarse_products)
        return merging_product(*given, out=out)

    merging_product = merging.merge_low_rank
    monkeypatch.setattr(merging, "merge_low_rank", looking)
    merger, wanted = merger_of(pipeline), [(style(pipeline, 1, "low-rank"), 1.0)]
    merger.merge(wanted)
    assert seen == {"ieee"}
    assert {switch.fp32_precision for switch in coarse_products} == {"tf32"}
    breaker.arm(BrokenOff(), 3)
    with pytest.raises(BrokenOff):
        merger.merge([])
    assert {switch.fp32_precision for switch in coarse_products} == {"tf32"}


# What a set of summands is.


def test_scale_0_is_absence_and_the_same_file_twice_adds_up(pipeline: FluxKontextPipeline) -> None:
    base, merger, held = weights(pipeline), merger_of(pipeline), style(pipeline, 1, *KINDS)
    other = style(pipeline, 2, "low-rank")
    assert merger.merge([(held, 0.0), (other, -0.0)]) == MergeReport(0, 0)
    assert merger.is_base
    twice = [(held, 0.25), (held, 0.5)]
    merger.merge(twice)
    assert max(worst(pipeline, base, [(held, 0.75)])) < AT_THE_FLOOR
    assert merger.merge([(held, 0.5), (other, 0), (held, 0.25)]) == MergeReport(0, 0)
    assert not merger.is_base


def test_rows_of_a_parameter_are_added_to_where_they_belong(pipeline: FluxKontextPipeline) -> None:
    """As of files that split what the model has in one; and forms beside each other in one file."""
    at, weight = next(item for item in linears(pipeline).items() if len(item[1]) >= 96)
    factors, columns = Factors(1), weight.shape[1]
    deltas = (
        Delta(factors.form("low-rank", 32, columns, 4), 0, 32, at=64),
        Delta(factors.form("low-rank", 16, columns, 2), 0, 16),
        Delta(factors.form("LoHa", 64, columns, 4), 8, 40, at=16),
        Delta(Full(factors.matrix(8, columns)), 0, 8, at=4),
    )
    base, held = weights(pipeline), adapter({at: deltas}, "parts")
    merger_of(pipeline).merge([(held, 1.5)])
    assert max(worst(pipeline, base, [(held, 1.5)])) < AT_THE_FLOOR
    assert torch.equal(weight.detach()[96:], base[at][96:])


def test_a_bias_takes_a_full_difference(pipeline: FluxKontextPipeline) -> None:
    at = Parameter(Component.TRANSFORMER, "proj_out.bias")
    base, diff = weights(pipeline)[at], torch.randn(64)
    merger = merger_of(pipeline)
    merger.merge([(adapter({at: Delta(Full(diff), 0, 64)}, "bias"), 2.0)])
    assert torch.equal(parameters_of(pipeline)[at].detach(), (base.float() + 2 * diff).bfloat16())
    merger.merge([])
    assert torch.equal(parameters_of(pipeline)[at].detach(), base)


# Only what changed.


def written(pipeline: object, act: Callable[[], object]) -> set[Parameter]:
    """The parameters that `act` writes, the same values included."""
    before = {at: value._version for at, value in parameters_of(pipeline).items()}
    act()
    return {at for at, value in parameters_of(pipeline).items() if value._version != before[at]}


def test_only_weights_whose_summands_changed_are_written(pipeline: FluxKontextPipeline) -> None:
    merger = merger_of(pipeline)
    even, odd = (style(pipeline, seed, "low-rank", every=2) for seed in (0, 1))
    assert written(pipeline, lambda: merger.merge([(even, 1.0)])) == even.deltas.keys()
    assert written(pipeline, lambda: merger.merge([(even, 1.0)])) == set()
    assert written(pipeline, lambda: merger.merge([(odd, 1.0), (even, 1.0)])) == odd.deltas.keys()
    assert written(pipeline, lambda: merger.merge([(odd, 0.5), (even, 1.0)])) == odd.deltas.keys()
    report: list[MergeReport] = []
    assert written(pipeline, lambda: report.append(merger.merge([(odd, 0.5)]))) == even.deltas.keys()
    assert report == [MergeReport(len(even.deltas), len(even.deltas))]


def test_the_key_of_the_text_encoders_is_that_of_what_is_merged_into_them(pipeline: FluxKontextPipeline) -> None:
    merger, encoders = merger_of(pipeline), (Component.CLIP, Component.T5)
    whole = style(pipeline, 1, "low-rank")
    parts = {
        component: adapter({at: one for at, one in whole.deltas.items() if at.component is component}, component)
        for component in Component
    }
    keys = {}
    sets = {
        "none": [],
        "transformer": [(parts[Component.TRANSFORMER], 1.0)],
        "clip": [(parts[Component.CLIP], 1.0)],
        "clip, stronger": [(parts[Component.CLIP], 1.5)],
        "clip twice": [(parts[Component.CLIP], 1.0)] * 2,
        "t5": [(parts[Component.T5], 1.0)],
        "both": [(parts[Component.T5], 1.0), (parts[Component.CLIP], 1.0)],
        "clip again": [(parts[Component.CLIP], 1.0), (parts[Component.TRANSFORMER], 1.0)],
    }
    for name, wanted in sets.items():
        merger.merge(wanted)
        keys[name] = merger.key(*encoders)
    assert keys["none"] == keys["transformer"]
    assert keys["clip"] == keys["clip again"]
    assert len(set(keys.values())) == len(sets) - 2


# After anything, the base to the bit.


def test_after_200_random_switches_with_errors_and_interrupts_nothing_is_left_of_them(
    tiny_folder: Path, pipeline: FluxKontextPipeline, breaker: Breaker
) -> None:
    base, merger, chance = digest(pipeline), merger_of(pipeline), random.Random(1)
    library = [style(pipeline, seed, *chance.choices(KINDS, k=3), every=1 + seed % 4) for seed in range(12)]
    broken, expected = 0, {}
    for _ in range(200):
        picked = tuple(sorted(chance.sample(range(12), chance.randint(0, 4))))
        wanted = [(library[index], (index - 5) / 4) for index in picked]
        if chance.random() < 0.4:
            error = chance.choice([BrokenOff(), KeyboardInterrupt(), torch.OutOfMemoryError()])
            breaker.arm(error, chance.randint(1, 20))
        try:
            merger.merge(wanted)
        except (BrokenOff, KeyboardInterrupt, torch.OutOfMemoryError):
            broken += 1
        else:  # a set is the same bits whatever came before it
            assert expected.setdefault(picked, digest(pipeline)) == digest(pipeline)
    assert broken > 30
    assert len(expected) > 60
    breaker.error = None
    merger.merge([])
    assert digest(pipeline) == base == digest(load_pipeline(tiny_folder, torch.bfloat16))


def test_a_merge_that_was_broken_off_is_repaired_by_the_next_one_and_no_more_than_it(
    pipeline: FluxKontextPipeline, breaker: Breaker
) -> None:
    base, merger, held = weights(pipeline), merger_of(pipeline), style(pipeline, 1, "low-rank")
    breaker.arm(KeyboardInterrupt(), 10)  # two steps a weight
    with pytest.raises(KeyboardInterrupt):
        merger.merge([(held, 1.0)])
    touched = {at for at, value in weights(pipeline).items() if not torch.equal(value, base[at])}
    assert len(touched) == 5
    assert not merger.is_base
    assert written(pipeline, lambda: merger.merge([])) == touched
    assert all(torch.equal(value, base[at]) for at, value in weights(pipeline).items())
    assert merger.is_base


def test_an_interrupt_at_any_line_of_a_merge_is_repaired_by_the_next_one(pipeline: FluxKontextPipeline) -> None:
    base, merger, whole = digest(pipeline), merger_of(pipeline), style(pipeline, 1, "low-rank", "LoHa DoRA")
    first, second = (adapter(dict(list(whole.deltas.items())[at : at + 3]), f"{at}") for at in (0, 1))
    merger.merge([(second, 1.0)])
    expected, line = digest(pipeline), 0
    while True:
        line += 1
        merger.merge([(first, 1.0)])
        with interrupted_at(line) as is_over:
            merger.merge([(second, 1.0)])
        if is_over:
            break
        wanted, bits = (([], base), ([(second, 1.0)], expected))[line % 2]
        merger.merge(wanted)
        assert digest(pipeline) == bits, f"interrupted at line event {line}"
    assert line > 50


@contextmanager
def interrupted_at(line: int) -> Iterator[list[bool]]:
    """A KeyboardInterrupt at the nth line of `merging.py` and `pristine.py` that runs; [True] if there are fewer."""
    left, is_over = line, []

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in ("merging.py", "pristine.py"):
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield is_over
        is_over.append(True)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


# In place.


def test_no_switch_recompiles_a_compiled_transformer(pipeline: FluxKontextPipeline) -> None:
    from torch._dynamo.utils import counters

    transformer, merger = pipeline.transformer.float(), merger_of(pipeline)
    compiled = torch.compile(transformer, backend="eager", fullgraph=False)
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 24, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.5]),
        "txt_ids": torch.zeros(24, 3),
        "img_ids": torch.zeros(16, 3),
        "return_dict": False,
    }
    torch._dynamo.reset()
    counters.clear()
    sets = [[], [(style(pipeline, 1, "low-rank"), 1.0)], [(style(pipeline, 2, *KINDS), 0.7)], []]
    outputs, graphs = [], []
    with torch.no_grad():
        for wanted in sets:
            merger.merge(wanted)
            outputs.append(compiled(**given)[0])
            graphs.append(counters["stats"]["unique_graphs"])
            assert torch.equal(outputs[-1], transformer(**given)[0])
    assert graphs == [graphs[0]] * len(sets)
    assert graphs[0] > 0
    assert torch.equal(outputs[0], outputs[-1])
    assert not torch.equal(outputs[1], outputs[2])
    torch._dynamo.reset()


def placed(folder: Path, mode: MemoryMode) -> FluxKontextPipeline:
    pipeline = load_pipeline(folder, torch.float32)
    memory.place(pipeline, mode, CPU)
    return pipeline


@pytest.mark.parametrize("mode", [MemoryMode.ENCODERS_OFF, MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL])
def test_a_streamed_model_is_merged_to_the_same_bits_as_a_resident_one(tiny_folder: Path, mode: MemoryMode) -> None:
    """With the CPU as the device to stream to; the hooks are the same as on a GPU, the copies are not."""
    resident, other = placed(tiny_folder, MemoryMode.RESIDENT), placed(tiny_folder, mode)
    base, held = digest(other), style(resident, 1, *KINDS)
    tokens = torch.arange(24)[None]
    outputs = []
    mergers = [Merger(one, Copies(parameters_of(one), CPU), CPU, mode) for one in (resident, other)]
    with torch.no_grad():
        for wanted in ([], [(held, 1.0)], []):
            for one, merger in zip((resident, other), mergers, strict=True):
                merger.merge(wanted)
                outputs.append(one.text_encoder_2(tokens)[0].numpy())
    assert np.array_equal(outputs[2], outputs[3])
    assert np.array_equal(outputs[1], outputs[5])
    assert not np.array_equal(outputs[1], outputs[3])
    assert digest(other) == base


def test_a_plain_low_rank_merge_is_one_product(pipeline: FluxKontextPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many adapters: their factors stand side by side."""
    ranks = []

    def looking(base: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Tensor:
        ranks.append(up.shape[1])
        return merging_product(base, up, down, out=out)

    merging_product = merging.merge_low_rank
    monkeypatch.setattr(merging, "merge_low_rank", looking)
    at, weight = next(iter(linears(pipeline).items()))
    wanted = [(adapter({at: Factors(seed).delta("low-rank", weight, seed)}, f"{seed}"), 1.0) for seed in (1, 2, 5)]
    merger_of(pipeline).merge(wanted)
    assert ranks == [8]
    assert isinstance(wanted[0][0].deltas[at][0].form, LowRank)


def test_a_set_that_is_kept_comes_back_to_the_bit_without_any_product(
    pipeline: FluxKontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger, sets, base = merger_of(pipeline), MergedSets(2**30), digest(pipeline)
    one, other = ([(style(pipeline, seed, kind), 0.7)] for seed, kind in enumerate(("low-rank DoRA", "low-rank")))
    merger.merge(one, sets)
    first = digest(pipeline)
    merger.merge(other, sets)
    monkeypatch.setattr(Merger, "_write_sum", lambda *_: pytest.fail("it was merged anew"))
    assert written(pipeline, lambda: merger.merge(one, sets)) == one[0][0].deltas.keys()
    assert digest(pipeline) == first
    merger.merge([], sets)
    assert digest(pipeline) == base


@pytest.mark.parametrize("budget", [100, 2**30])
def test_a_set_over_the_budget_and_one_of_another_scale_are_merged_anew(
    pipeline: FluxKontextPipeline, budget: int
) -> None:
    merger, sets, one = merger_of(pipeline), MergedSets(budget), style(pipeline, 1, "low-rank")
    merger.merge([(one, 0.3)])
    wanted = digest(pipeline)
    for scale in (0.7, 0.3, 0.7):
        merger.merge([(one, scale)], sets)
        assert (digest(pipeline) == wanted) == (scale == 0.3)


def test_a_merge_that_was_broken_off_is_not_kept(pipeline: FluxKontextPipeline, breaker: Breaker) -> None:
    merger, sets, wanted = merger_of(pipeline), MergedSets(2**30), [(style(pipeline, 1, "low-rank"), 0.7)]
    breaker.arm(BrokenOff(), at=6)
    with pytest.raises(BrokenOff):
        merger.merge(wanted, sets)
    merger.merge([])
    merger.merge(wanted, sets)
    merged = digest(pipeline)
    merger.merge([])
    merger.merge(wanted)
    assert digest(pipeline) == merged
