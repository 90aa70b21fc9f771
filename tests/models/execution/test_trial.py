"""Blocks on made-up tokens: the same way has no error, another one is caught, and all that can compile runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from kontextd_models import EngineConfig, load_engine
from kontextd_models.engine import Engine
from kontextd_models.execution.blocks import NATIVE_WAY, Way
from kontextd_models.execution.trial import Trial
from kontextd_models.transformer.attention import native
from kontextd_models.transformer.block_ops import BlockOps, Module
from torch import Tensor

IMAGE_TOKENS, TEXT_TOKENS = 12, 24


@dataclass(frozen=True)
class Scaled(BlockOps):
    """Norms of another size: another result, of the right shape."""

    factor: float = 1.0

    def normed(self, norm: Module, tokens: Tensor, scale: Tensor, shift: Tensor, reader: Module) -> Tensor:
        return super().normed(norm, tokens, scale, shift, reader) * self.factor


@dataclass(frozen=True)
class Gated(Scaled):
    def gated(self, update: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return super().gated(update, gate * self.factor, residual)


class Broken(BlockOps):
    def gated(self, update: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return super().gated(update, gate, residual) * torch.nan


@pytest.fixture
def trial(tiny_engine: Engine) -> Trial:
    model = tiny_engine.model
    return Trial(model.pipeline.transformer, TEXT_TOKENS, IMAGE_TOKENS, model.device, model.dtype, fp8=False)


def test_the_same_has_no_error_and_nan_is_no_result(trial: Trial) -> None:
    assert trial.error(Way.eager("again", BlockOps()), NATIVE_WAY) == 0
    assert not trial.error(Way.eager("broken", Broken()), NATIVE_WAY) <= 1


@pytest.mark.parametrize("kind", [Scaled, Gated])
@pytest.mark.parametrize(
    ("dtype", "precision", "factor"),
    [("float32", "full", 1.0003), ("bfloat16", "full", 1.04), ("bfloat16", "fp8", 1.1)],
)
def test_a_result_that_is_off_is_more_than_is_allowed_in_its_precision(
    embedded_folder: Path, kind: type[Scaled], dtype: str, precision: str, factor: float
) -> None:
    model = load_engine(EngineConfig(model=embedded_folder, device="cpu", dtype=dtype, precision=precision)).model
    trial = Trial(model.pipeline.transformer, TEXT_TOKENS, 64, model.device, model.dtype, precision == "fp8")
    assert trial.error(Way.eager("off", kind(native, factor)), NATIVE_WAY) > 1


@pytest.mark.parametrize("kind", ["double", "single", "last_single"])
def test_an_error_in_any_kind_of_block_is_seen(trial: Trial, kind: str) -> None:
    wrong = getattr(Way.eager("doubled", Scaled(native, 2.0)), kind)
    assert trial.error(replace(NATIVE_WAY, **{kind: wrong}), NATIVE_WAY) > 1


def test_a_run_goes_through_every_block_with_and_without_a_reference_kept(trial: Trial) -> None:
    seen: list[tuple[int, bool]] = []

    def noting(run):
        def noted(block, *given):
            seen.append((id(block), any(type(one).__name__ == "KeyValue" for one in given)))
            return run(block, *given)

        return noted

    way = Way("noting", *map(noting, (NATIVE_WAY.double, NATIVE_WAY.single, NATIVE_WAY.last_single)))
    trial.run(way)
    blocks = [*trial.transformer.transformer_blocks, *trial.transformer.single_transformer_blocks]
    assert seen == [(id(block), is_kept) for is_kept in (False, True) for block in blocks]


def test_each_way_has_its_seconds(trial: Trial) -> None:
    found = trial.seconds(NATIVE_WAY, NATIVE_WAY, NATIVE_WAY)
    assert len(found) == 3
    assert min(found) > 0
