"""Our forward pass against diffusers' own, in full and with the reference kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kontextd_models.loading import LoadedModel
from kontextd_models.transformer.attention import KeyValue, Rotary
from kontextd_models.transformer.forward import AsTheyStand, Inputs, Stock, Trim, WrittenOut
from torch import Tensor

Requests = Callable[[LoadedModel], tuple[Inputs, Tensor]]
STEPS = 4


@pytest.fixture(autouse=True)
def no_autograd() -> object:
    with torch.no_grad():
        yield


def deviation(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def rounding(model: LoadedModel) -> float:
    """What a handful of roundings in the model's dtype may add up to."""
    return 4 * torch.finfo(model.dtype).eps


@pytest.mark.parametrize("trim", [Trim.NEVER, Trim.WHERE_EQUAL])
def test_full_passes_are_those_of_diffusers_to_the_bit(model: LoadedModel, made: Requests, trim: Trim) -> None:
    inputs, noise = made(model)
    forward = WrittenOut(model.pipeline.transformer, inputs, modulation_ahead=False, trim=trim)
    stock = Stock(model.pipeline.transformer, inputs)
    for step in range(STEPS):
        assert torch.equal(forward.full(step, noise * (1 + step))[0], stock.full(step, noise * (1 + step))[0])
    assert not forward.trims


@pytest.mark.parametrize(("error", "runs_trimmed"), [(0.0, STEPS), (1e-6, 1)])
def test_the_last_block_is_trimmed_after_the_first_full_pass_where_that_changes_no_bit(
    model: LoadedModel, made: Requests, error: float, runs_trimmed: int
) -> None:
    """With blocks whose trimmed results are those of the whole one, and with such as are a little off."""
    inputs, noise = made(model)
    trimmed: list[Tensor] = []

    class Cut(AsTheyStand):
        @staticmethod
        def last_single(
            block: object, tokens: Tensor, modulation: Tensor, rotary: Rotary, kept: None, first: int, output: Rotary
        ) -> tuple[Tensor, KeyValue]:
            whole, keys = AsTheyStand.single(block, tokens, modulation, rotary, kept)
            trimmed.append(whole[:, first : first + len(output[0])] * (1 + error))
            return trimmed[-1], keys

    transformer = model.pipeline.transformer
    forward = WrittenOut(transformer, inputs, modulation_ahead=False, trim=Trim.WHERE_EQUAL, blocks=Cut())
    exact = WrittenOut(transformer, inputs, modulation_ahead=False)
    for step in range(STEPS):
        assert torch.equal(forward.full(step, noise)[0], exact.full(step, noise)[0])
    assert len(trimmed) == (runs_trimmed if error == 0 or model.dtype == torch.float32 else STEPS)


def test_passes_with_keys_kept_are_not_trimmed_for_what_full_passes_show(model: LoadedModel, made: Requests) -> None:
    inputs, noise = made(model)
    transformer = model.pipeline.transformer
    forward, never = (
        WrittenOut(transformer, inputs, modulation_ahead=False, trim=trim) for trim in (Trim.WHERE_EQUAL, Trim.NEVER)
    )
    (_, kept), (_, same) = forward.full(0, noise, keep=True), never.full(0, noise, keep=True)
    assert torch.equal(forward.cached(1, noise, kept), never.cached(1, noise, same))


@pytest.mark.parametrize("step", range(STEPS))
def test_modulation_ahead_of_the_loop_changes_no_more_than_roundings(
    model: LoadedModel, made: Requests, step: int
) -> None:
    inputs, noise = made(model)
    ahead, _ = WrittenOut(model.pipeline.transformer, inputs, modulation_ahead=True).full(step, noise)
    exact, _ = WrittenOut(model.pipeline.transformer, inputs, modulation_ahead=False).full(step, noise)
    assert deviation(ahead, exact) <= rounding(model)


@pytest.mark.parametrize("step", range(STEPS))
def test_a_trimmed_last_block_changes_no_more_than_roundings(model: LoadedModel, made: Requests, step: int) -> None:
    inputs, noise = made(model)
    transformer = model.pipeline.transformer
    trimmed, kept = WrittenOut(transformer, inputs, modulation_ahead=False, trim=Trim.ALWAYS).full(
        step, noise, keep=True
    )
    exact, all_kept = WrittenOut(transformer, inputs, modulation_ahead=False).full(step, noise, keep=True)
    assert trimmed.shape == exact.shape
    assert deviation(trimmed, exact) <= rounding(model)
    assert kept is not None
    assert all_kept is not None
    for block, other in zip(kept.blocks, all_kept.blocks, strict=True):
        assert torch.equal(block.key, other.key)
        assert torch.equal(block.value, other.value)


@pytest.mark.parametrize("shortcuts", [False, True])
def test_a_pass_with_the_keys_of_the_same_step_is_a_full_one(
    model: LoadedModel, made: Requests, shortcuts: bool
) -> None:
    inputs, noise = made(model)
    transformer = model.pipeline.transformer
    trim = Trim.ALWAYS if shortcuts else Trim.NEVER
    forward = WrittenOut(transformer, inputs, modulation_ahead=shortcuts, trim=trim)
    full, kept = forward.full(1, noise, keep=True)
    assert kept is not None
    assert deviation(forward.cached(1, noise, kept), full) <= rounding(model)


def test_keys_of_another_step_are_an_approximation_and_not_the_same(model: LoadedModel, made: Requests) -> None:
    inputs, noise = made(model)
    forward = WrittenOut(model.pipeline.transformer, inputs, modulation_ahead=False)
    _, others = forward.full(0, noise, keep=True)
    full, own = forward.full(3, noise, keep=True)
    assert others is not None
    assert own is not None
    assert forward.cached(3, noise, others).shape == full.shape
    assert deviation(forward.cached(3, noise, others), full) > deviation(forward.cached(3, noise, own), full)


def test_keeping_changes_nothing_and_takes_what_the_formula_says(model: LoadedModel, made: Requests) -> None:
    inputs, noise = made(model)
    transformer = model.pipeline.transformer
    forward = WrittenOut(transformer, inputs, modulation_ahead=False)
    plain, none = forward.full(2, noise)
    keeping, kept = forward.full(2, noise, keep=True)
    assert none is None
    assert kept is not None
    assert torch.equal(plain, keeping)
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    reference_tokens = inputs.reference.latents.shape[1]
    assert kept.size_bytes == blocks * 2 * reference_tokens * transformer.inner_dim * model.dtype.itemsize
    for block in kept.blocks:  # copies: a view would hold the keys of all tokens
        assert block.key.untyped_storage().nbytes() == block.key.numel() * block.key.element_size()
        assert block.value.untyped_storage().nbytes() == block.value.numel() * block.value.element_size()


def test_a_pass_leaves_the_transformer_as_it_was(model: LoadedModel, made: Requests) -> None:
    inputs, noise = made(model)
    transformer = model.pipeline.transformer
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    modules = [name for name, _ in transformer.named_modules()]
    forward = WrittenOut(transformer, inputs, modulation_ahead=True)
    _, kept = forward.full(0, noise, keep=True)
    assert kept is not None
    forward.cached(1, noise, kept)
    assert [name for name, _ in transformer.named_modules()] == modules
    after = transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_diffusers_own_pass_keeps_nothing_and_says_so(model: LoadedModel, made: Requests) -> None:
    inputs, noise = made(model)
    stock = Stock(model.pipeline.transformer, inputs)
    assert not stock.keeps
    with pytest.raises(ValueError, match="keeps no keys"):
        stock.full(0, noise, keep=True)
