"""The Triton kernel of qk_norm_rope in Triton's interpreter, on the CPU: `make test-kernels`."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kontextd_kernels.op import Case, Op
from kontextd_kernels.qk_norm_rope import launch
from kontextd_kernels.qk_norm_rope.rows import NORMED_ROTATED, PAIR_NORMED_ROTATED, alone, pair
from poison import poisoned, untouched
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":  # read once, when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from kontextd_kernels.qk_norm_rope import triton_way

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
BOTH = (NORMED_ROTATED, PAIR_NORMED_ROTATED)
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in BOTH for case in op.awkward]

pytestmark = pytest.mark.usefixtures("true_arithmetic")


def launched(inputs: tuple[Tensor, ...], eps: float = 1e-6) -> Tensor:
    """The kernel's result, written into poisoned memory."""
    if len(inputs) == 4:
        heads, weight, *angles = inputs
        inputs = heads[:0], heads, weight, weight, *angles
    text, image, *_ = inputs
    out = poisoned(torch.full((len(text) + len(image), *image.shape[1:]), math.nan, dtype=image.dtype))
    triton_way.norm_rotate(*inputs, eps, out)
    return out


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_kernel_gives_the_fp64_result_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    out = launched(inputs)
    assert op.excess(inputs, out) <= 1
    assert all(untouched(tensor) for tensor in (*inputs, out))


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
def test_the_door_hands_the_kernel_what_it_was_given(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "goes_to_triton", lambda heads: True)
    inputs = (pair if op is PAIR_NORMED_ROTATED else alone)((2, 3, 4, 32), (BF16, FP32), CPU)
    assert torch.equal(op.launcher(*inputs), launched(inputs))
    assert torch.equal(op.launcher(*inputs, 0.5), launched(inputs, 0.5))
    assert op.excess(inputs, launched(inputs, 0.5)) > 1


def test_the_error_is_that_of_rounding_to_bf16_and_no_more() -> None:
    inputs = pair((20, 40, 24, 128), (BF16, BF16), CPU)
    exact = PAIR_NORMED_ROTATED.exact(*(tensor.double() for tensor in inputs))
    floor = (exact.bfloat16().double() - exact).norm()
    assert (launched(inputs).double() - exact).norm() <= 1.0001 * floor


def test_without_tokens_there_is_nothing_to_do() -> None:
    assert launched(pair((0, 0, 4, 32), (BF16, BF16), CPU)).shape == (0, 4, 32)
