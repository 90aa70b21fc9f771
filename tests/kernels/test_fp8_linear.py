"""fp8_linear through its door on the CPU, against fp64, in poisoned memory; what it asks of torch on CUDA; refusals."""

from __future__ import annotations

import pytest
import torch
from kontextd_kernels.fp8_linear import fp8_linear, launch, multiplies_fp8
from kontextd_kernels.fp8_linear.reference import quantised, summed
from kontextd_kernels.fp8_linear.rows import FP8_LINEAR, inputs
from kontextd_kernels.lora_merge import merged_fp8
from kontextd_kernels.op import Case
from poison import poisoned, untouched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
CASES = [pytest.param(case, id=case.name) for case in (*FP8_LINEAR.awkward, *FP8_LINEAR.ours["cpu"])]


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_in_fp64_within_half_a_unit_of_its_dtype(case: Case) -> None:
    given = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    assert FP8_LINEAR.excess(given, fp8_linear(*given)) <= 1
    assert all(untouched(tensor) for tensor in given)


def test_a_scale_of_another_row_or_a_nan_are_more_than_is_allowed() -> None:
    x, codes, scale = inputs((64, 96, 512), torch.bfloat16, CPU)
    assert FP8_LINEAR.excess((x, codes, scale), fp8_linear(x, codes, scale.roll(1, dims=0))) > 1
    spoilt = fp8_linear(x, codes, scale)
    spoilt[3, 5] = float("nan")
    assert not FP8_LINEAR.excess((x, codes, scale), spoilt) <= 1


def test_the_error_is_that_of_rounding_to_bf16_and_no_more() -> None:
    given = inputs((130, 192, 768), torch.bfloat16, CPU)
    exact = summed(*(tensor.double() for tensor in given))
    floor = (exact.bfloat16().double() - exact).norm()
    assert (fp8_linear(*given).double() - exact).norm() <= 1.001 * floor


def test_it_is_near_to_the_linear_it_stands_for_and_a_bias_is_added_in_full() -> None:
    """Each factor errs by up to 2⁻⁴ of itself, 2.6 % in the mean: √2 times that over many terms."""
    random = torch.Generator().manual_seed(2)
    x, base = torch.randn(200, 768, generator=random), torch.randn(64, 768, generator=random) * 0.03
    bias = torch.randn(64, generator=random)
    codes, scale = merged_fp8(base, base[:, :0], base[:0])
    exact = torch.nn.functional.linear(x, base)
    found = fp8_linear(x, codes, scale)
    assert 0.03 < (found - exact).norm() / exact.norm() < 0.045
    assert torch.equal(fp8_linear(x, codes, scale, bias), summed(x, codes, scale) + bias)


def test_rows_are_quantised_by_the_rule_of_the_merged_weights_and_do_not_see_one_another() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(9, 160, generator=random) * torch.logspace(-30, 30, 9)[:, None]
    x[4] = 0
    codes, scale = quantised(x)
    expected, expected_scale = merged_fp8(x, x[:, :0], x[:0])
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    assert codes.float().abs().amax(dim=1).tolist() == [448.0] * 4 + [0.0] + [448.0] * 4


@pytest.mark.parametrize("has_bias", [False, True])
def test_on_cuda_it_is_the_row_wise_product_of_torch_and_torch_takes_its_arguments(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    """Tensors without memory: torch checks shapes, strides and dtypes as it would on a GPU, and computes nothing."""
    calls: list[dict[str, object]] = []
    scaled_mm = torch._scaled_mm

    def looking(*given: Tensor, **named: object) -> Tensor:
        calls.append(named)
        return scaled_mm(*given, **named)

    monkeypatch.setattr(torch, "_scaled_mm", looking)
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    with FakeTensorMode():
        x = torch.empty(517, 3072, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(12288, 3072, device="cuda").to(torch.float8_e4m3fn)
        bias = torch.empty(12288, dtype=torch.bfloat16, device="cuda") if has_bias else None
        out = fp8_linear(x, codes, torch.empty(12288, 1, device="cuda"), bias)
    assert (out.shape, out.dtype, out.device.type) == ((517, 12288), torch.bfloat16, "cuda")
    assert [(call["scale_a"].shape, call["scale_b"].shape, call["bias"] is bias) for call in calls] == [
        ((517, 1), (1, 12288), True)
    ]


@pytest.mark.parametrize(
    ("dtype", "shape", "capability"),
    [
        (torch.float32, (64, 64), (9, 0)),
        (torch.bfloat16, (64, 72), (9, 0)),
        (torch.bfloat16, (72, 64), (9, 0)),
        (torch.bfloat16, (64, 64), (8, 6)),
    ],
)
def test_what_torch_s_product_cannot_do_on_cuda_goes_the_way_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("it was called"))
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    with FakeTensorMode():
        codes = torch.empty(*shape, device="cuda").to(torch.float8_e4m3fn)
        out = fp8_linear(
            torch.empty(9, shape[1], dtype=dtype, device="cuda"), codes, torch.empty(shape[0], 1, device="cuda")
        )
    assert (out.shape, out.dtype) == ((9, shape[0]), dtype)


def test_fp8_is_multiplied_from_ada_on() -> None:
    assert [multiplies_fp8("cuda", capability) for capability in ((8, 6), (8, 9), (9, 0), (12, 0))] == [
        False,
        True,
        True,
        True,
    ]
    assert not multiplies_fp8("cpu", (9, 0))


def test_what_does_not_fit_is_refused_with_its_value() -> None:
    x, codes, scale = inputs((4, 12, 20), torch.float32, CPU)
    refused = [
        (dict(x=x.double()), r"x is \[4, 20\] in torch.float64"),
        (dict(x=x[None]), r"x is \[1, 4, 20\]"),
        (dict(x=x[:, 1:]), r"do not fit x \[4, 19\]"),
        (dict(codes=codes.float()), r"codes are torch.float32"),
        (dict(scale=scale.double()), r"scale torch.float64"),
        (dict(scale=scale.T), r"scale \[1, 12\] do not fit"),
        (dict(bias=torch.zeros(20)), r"bias is \[20\].* must be \[12\]"),
    ]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            fp8_linear(**{"x": x, "codes": codes, "scale": scale, **wrong})
