"""The Triton kernels of lora_merge in Triton's interpreter, on the CPU: `make test-kernels`."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kontextd_kernels.lora_merge.reference import merged_fp8, summed
from kontextd_kernels.lora_merge.rows import MERGED, MERGED_FP8
from kontextd_kernels.op import Case, Op
from poison import poisoned, untouched
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":  # read once, when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from kontextd_kernels.lora_merge import triton_way

CPU = torch.device("cpu")
MERGES = (MERGED, MERGED_FP8)
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in MERGES for case in op.awkward]

pytestmark = pytest.mark.usefixtures("true_arithmetic")


def launched(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The kernel's results, written into poisoned memory."""
    base = inputs[0]
    if op.name == "lora_merge":
        results: tuple[Tensor, ...] = (poisoned(torch.full_like(base, math.nan)),)
        triton_way.merge(*inputs, *results)
    else:
        codes, scale = torch.zeros(base.shape).to(torch.float8_e4m3fn), torch.full((len(base), 1), math.nan)
        results = poisoned(codes), poisoned(scale)
        triton_way.merge_fp8(*inputs, *results)
    return results


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_kernel_gives_the_fp64_result_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    results = launched(op, inputs)
    excess = op.excess(inputs, results if len(results) > 1 else results[0])
    assert excess <= 1
    assert all(untouched(tensor) for tensor in (*inputs, *results))


@pytest.mark.parametrize("down_dtype", [torch.bfloat16, torch.float32])
def test_factors_cut_in_two_leave_the_error_at_that_of_rounding_to_bf16(down_dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    base = (torch.randn(192, 256, generator=random) * 0.03).bfloat16()
    up, down = torch.randn(192, 64, generator=random) * 0.004, torch.randn(64, 256, generator=random).to(down_dtype)
    out = torch.empty_like(base)
    triton_way.merge(base, up, down, out)
    exact = summed(base.double(), up.double(), down.double())
    floor = (exact.bfloat16().double() - exact).norm()
    assert (out.double() - exact).norm() <= 1.0001 * floor


def test_codes_and_scales_are_those_of_the_reference_but_for_ties() -> None:
    random = torch.Generator().manual_seed(4)
    inputs = (torch.randn(130, 300, generator=random).bfloat16(), torch.zeros(130, 0), torch.zeros(0, 300))
    codes, scale = torch.empty(130, 300, dtype=torch.float8_e4m3fn), torch.empty(130, 1)
    triton_way.merge_fp8(*inputs, codes, scale)
    expected, expected_scale = merged_fp8(*inputs)
    assert torch.equal(scale, expected_scale)
    assert (codes.float() == expected.float()).float().mean() > 0.999
