"""Whole blocks of the embedded model by our Triton kernels, in Triton's interpreter: `make test-kernels`."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":  # read once, when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from pathlib import Path

from kontextd_kernels.fp8_linear import launch as fp8_launch
from kontextd_kernels.modulated_norm import launch as norm_launch
from kontextd_kernels.qk_norm_rope import launch as rope_launch
from kontextd_models import EngineConfig, load_engine
from kontextd_models.execution.blocks import NATIVE_WAY, Way
from kontextd_models.execution.kernel_ops import KernelOps
from kontextd_models.execution.trial import Trial

pytestmark = pytest.mark.usefixtures("true_arithmetic")


@pytest.mark.parametrize(("precision", "kernels"), [("full", {"norm", "rope"}), ("fp8", {"norm", "rope", "fp8"})])
def test_blocks_by_kernels_are_as_near_to_formulas_as_is_allowed(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kernels: set[str]
) -> None:
    came: set[str] = set()

    def here(name: str) -> object:
        return lambda *_: came.add(name) or True

    monkeypatch.setattr(norm_launch, "fits_triton", here("norm"))
    monkeypatch.setattr(rope_launch, "goes_to_triton", here("rope"))
    monkeypatch.setattr(fp8_launch, "_is_quantised_by_triton", here("fp8"))
    model = load_engine(EngineConfig(model=embedded_folder, device="cpu", dtype="bfloat16", precision=precision)).model
    trial = Trial(model.pipeline.transformer, 8, 12, torch.device("cpu"), model.dtype, precision == "fp8")
    assert 0 < trial.error(Way.eager("kernels", KernelOps()), NATIVE_WAY) <= 1
    assert came == kernels
