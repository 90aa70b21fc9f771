"""The Triton kernel of modulated_norm in Triton's interpreter, on the CPU: `make test-kernels`."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kontextd_kernels.modulated_norm import launch
from kontextd_kernels.modulated_norm.rows import NORMS, gated, plain
from kontextd_kernels.op import Case, Op
from poison import poisoned, untouched
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":  # read once, when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from kontextd_kernels.modulated_norm import triton_way

CPU = torch.device("cpu")
EPS = 1e-6
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in NORMS for case in op.awkward]

pytestmark = pytest.mark.usefixtures("true_arithmetic")


def launched(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The kernel's results, written into poisoned memory."""
    *sum_of, x, scale, shift = inputs
    results = [poisoned(torch.full_like(x, math.nan))]
    if op.name.endswith("fp8"):
        results = [
            poisoned(torch.zeros(x.shape).to(torch.float8_e4m3fn)),
            poisoned(torch.full((len(x), 1), math.nan)),
        ]
    if not sum_of:
        triton_way.norm(x, scale, shift, EPS, *results)
        return tuple(results)
    tokens, (update, gate) = poisoned(torch.full_like(x, math.nan)), sum_of
    triton_way.norm(x, scale, shift, EPS, *results, update=update, gate=gate, tokens=tokens)
    return tokens, *results


def result_of(results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return results if len(results) > 1 else results[0]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_kernel_gives_the_fp64_result_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    results = launched(op, inputs)
    assert op.excess(inputs, result_of(results)) <= 1
    assert all(untouched(tensor) for tensor in (*inputs, *results))


@pytest.mark.parametrize("op", NORMS, ids=lambda op: op.name)
def test_the_door_hands_the_kernel_what_it_was_given(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "fits_triton", lambda x: True)
    made = gated if op.name.startswith("gated") else plain
    inputs = made((9, 100), (torch.bfloat16, torch.float32), CPU)
    found, expected = op.launcher(*inputs, 0.5), result_of(launched(op, inputs))
    assert op.excess(inputs, found) > 1  # it was with another eps
    found = op.launcher(*inputs)
    pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True)
    assert all(torch.equal(one.float(), other.float()) for one, other in pairs)


def test_tokens_that_have_to_be_rounded_are_those_of_the_reference_and_what_is_normed() -> None:
    x, scale, shift = plain((64, 192), (torch.bfloat16, torch.bfloat16), CPU)
    inputs = (x.flip(0), shift, x, scale, shift)
    tokens, normed = launched(NORMS[2], inputs)
    assert torch.equal(tokens, NORMS[2].reference(*inputs)[0])
    assert torch.equal(normed, launched(NORMS[0], (tokens, scale, shift))[0])


@pytest.mark.parametrize("width", [1, 3, 192, 3072])
def test_a_row_of_equal_values_becomes_the_shift_to_the_bit(width: int) -> None:
    x = torch.tensor([0, 1e-30, 0.1, -1000.7, 3e4, 1e16])[:, None].repeat(1, width)
    scale, shift = (torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(launched(NORMS[0], (x, scale, shift))[0], shift.expand(6, width))


def test_codes_and_scales_are_those_of_the_reference_but_for_ties() -> None:
    inputs = plain((130, 300), (torch.bfloat16, torch.bfloat16), CPU)
    codes, row_scale = launched(NORMS[1], inputs)
    expected, expected_scale = NORMS[1].reference(*inputs)
    torch.testing.assert_close(row_scale, expected_scale, rtol=2.0**-20, atol=0)
    assert (codes.float() == expected.float()).float().mean() > 0.999
