"""The Triton kernel that quantises rows in Triton's interpreter, on the CPU: `make test-kernels`."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kontextd_kernels.fp8_linear import launch
from kontextd_kernels.fp8_linear.rows import QUANTISED_GELU, QUANTISED_ROWS, rows
from kontextd_kernels.op import Case, Op
from poison import poisoned, untouched
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":  # read once, when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from kontextd_kernels.fp8_linear import triton_way

CPU = torch.device("cpu")
BF16 = torch.bfloat16
BOTH = (QUANTISED_ROWS, QUANTISED_GELU)
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in BOTH for case in op.awkward]

pytestmark = [
    pytest.mark.usefixtures("true_arithmetic"),
    # exp(−2u) is infinite far below 0, where 1 over it is the 0 that is meant; NumPy warns, a GPU does not.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def launched(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The kernel's codes and scale, written into poisoned memory."""
    hidden, beside = inputs if len(inputs) > 1 else (inputs[0], inputs[0][:, :0])
    if op is QUANTISED_ROWS:
        hidden, beside = beside, hidden
    codes = poisoned(torch.zeros(len(hidden), beside.shape[1] + hidden.shape[1]).to(torch.float8_e4m3fn))
    scale = poisoned(torch.full((len(hidden), 1), math.nan))
    triton_way.quantise(beside, hidden, codes, scale)
    return codes, scale


@pytest.mark.parametrize(("op", "case"), CASES)
def test_codes_times_scale_are_the_rows_within_half_a_unit_of_codes(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    results = launched(op, inputs)
    assert op.excess(inputs, results) <= 1
    assert all(untouched(tensor) for tensor in (*inputs, *results))


@pytest.mark.parametrize(
    ("op", "widths"), [(QUANTISED_ROWS, (50,)), (QUANTISED_GELU, (50,)), (QUANTISED_GELU, (50, 7))]
)
def test_the_door_hands_the_kernel_what_it_was_given(
    op: Op, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_is_quantised_by_triton", lambda x: True)
    inputs = rows((9, *widths), BF16, 2, CPU)
    codes, scale = op.launcher(*inputs)
    expected, expected_scale = launched(op, inputs)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize(("op", "widths"), [(QUANTISED_ROWS, (300,)), (QUANTISED_GELU, (300, 80))])
def test_codes_and_scales_are_those_of_the_reference_but_for_ties(op: Op, widths: tuple[int, ...]) -> None:
    inputs = rows((130, *widths), BF16, 0, CPU)
    codes, scale = launched(op, inputs)
    expected, expected_scale = op.reference(*inputs)
    torch.testing.assert_close(scale, expected_scale, rtol=2.0**-20, atol=0)
    assert (codes.float() == expected.float()).float().mean() > 0.999


def test_the_peak_of_a_row_of_small_values_is_found_in_the_dip_of_gelu_below_zero() -> None:
    """The dip is 0.17004 deep, at −0.7525: more than gelu makes of 0.275, 0.1673, and less than of 0.28, 0.1709."""
    lines = [[-0.7525, -3, -8, 0.1], [-0.7525, 0.275, 0.2, 0], [-0.7525, 0.28, -1, -2], [-4, -5, -6, -7], [0, 0, 0, 0]]
    hidden = torch.tensor(lines).repeat(1, 2000)
    codes, scale = launched(QUANTISED_GELU, (hidden,))
    peaks = torch.nn.functional.gelu(hidden.double(), approximate="tanh").abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scale[:4].double() * 448, peaks[:4], rtol=2.0**-18, atol=0)
    assert codes.float().abs().amax(dim=1).tolist() == [448.0] * 4 + [0.0]
    assert scale[4] == 2.0**-126


@pytest.mark.parametrize("size", [1e10, 1e25, 1e38])
def test_gelu_of_the_largest_numbers_is_themselves_or_nothing(size: float) -> None:
    hidden = torch.tensor([[size, -size, size / 2]])
    codes, scale = launched(QUANTISED_GELU, (hidden,))
    assert codes.float().tolist() == [[448.0, 0.0, 224.0]]
    assert scale.item() == pytest.approx(size / 448)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
def test_a_nan_or_an_infinity_becomes_a_nan_and_spoils_no_other_row(op: Op) -> None:
    x = torch.ones(3, 100)
    x[1, 7], x[2, 9] = math.nan, math.inf
    codes, _ = launched(op, (x,))
    assert codes.float().isnan().nonzero().tolist() == [[1, 7], [2, 9]]
    assert op.reference(x)[0].float().isnan()[[1, 2], [7, 9]].all()


def test_without_rows_there_is_nothing_to_do() -> None:
    assert launched(QUANTISED_ROWS, rows((0, 50), BF16, 0, CPU))[0].shape == (0, 50)
