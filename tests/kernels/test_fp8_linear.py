"""fp8_linear and the quantised rows it takes, through their door on the CPU, against fp64, in poisoned memory.

What is asked of torch on CUDA; what a compiler sees; what the door refuses.
"""

from __future__ import annotations

import pytest
import torch
from kontextd_kernels.fp8_linear import (
    fp8_linear,
    launch,
    multiplies_fp8,
    quantised_gelu,
    quantised_linear,
    quantised_rows,
)
from kontextd_kernels.fp8_linear.reference import activated, quantised, summed
from kontextd_kernels.fp8_linear.rows import FP8_LINEAR, QUANTISED_GELU, QUANTISED_ROWS, inputs, rows
from kontextd_kernels.lora_merge import merged_fp8
from kontextd_kernels.op import Case, Op
from poison import poisoned, untouched
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANTISERS = (QUANTISED_ROWS, QUANTISED_GELU)
ROWS_CASES = [
    pytest.param(op, case, id=f"{op.name} {case.name}") for op in QUANTISERS for case in (*op.awkward, *op.ours["cpu"])
]
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
    codes_x, scale_x = quantised_rows(x)
    for wrong, message in (
        (dict(codes_x=x), r"codes_x are \[4, 20\] in torch.float32"),
        (dict(codes_x=codes_x[0]), r"codes_x are \[20\]"),
        (dict(scale_x=scale_x[:3]), r"scale_x \[3, 1\] in torch.float32; they must be"),
        (dict(scale_x=scale_x.double()), r"scale_x \[4, 1\] in torch.float64"),
        (dict(codes=codes[:, 1:]), r"codes \[12, 19\] .* do not fit x \[4, 20\]"),
        (dict(dtype=torch.float64), r"dtype is torch.float64"),
    ):
        given = dict(codes_x=codes_x, scale_x=scale_x, codes=codes, scale=scale, bias=None, dtype=FP32)
        with pytest.raises(ValueError, match=message):
            quantised_linear(**given | wrong)


# Rows that are quantised by themselves.


@pytest.mark.parametrize(("op", "case"), ROWS_CASES)
def test_codes_times_scale_are_the_rows_within_half_a_unit_of_codes(op: Op, case: Case) -> None:
    given = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    assert op.excess(given, op.launcher(*given)) <= 1
    assert all(untouched(tensor) for tensor in given)


@pytest.mark.parametrize("op", QUANTISERS, ids=lambda op: op.name)
def test_two_codes_too_much_or_a_nan_or_another_row_s_scale_are_more_than_is_allowed(op: Op) -> None:
    given = rows((9, 130), BF16, 2, CPU)
    codes, scale = op.launcher(*given)
    assert op.excess(given, (codes, scale.roll(1, dims=0))) > 1
    codes.view(torch.uint8)[6, 3] += 2
    assert op.excess(given, (codes, scale)) > 1
    codes[6, 3] = float("nan")
    assert not op.excess(given, (codes, scale)) <= 1


def test_another_gelu_or_another_order_are_more_than_is_allowed() -> None:
    hidden, beside = rows((40, 300, 300), FP32, 0, CPU)
    for wrong in (
        torch.cat([beside, functional.gelu(hidden)], dim=1),
        torch.cat([beside, functional.silu(hidden)], dim=1),
        torch.cat([functional.gelu(hidden, approximate="tanh"), beside], dim=1),
        functional.gelu(torch.cat([beside, hidden], dim=1), approximate="tanh"),
    ):
        assert QUANTISED_GELU.excess((hidden, beside), quantised(wrong)) > 1


def test_gelu_is_not_rounded_before_it_is_quantised() -> None:
    hidden, beside = rows((40, 300, 200), BF16, 0, CPU)
    codes, scale = quantised_gelu(hidden, beside)
    of_rounded, _ = quantised(torch.cat([beside, functional.gelu(hidden, approximate="tanh")], dim=1))
    exact = activated(hidden.double(), beside.double())
    expected, expected_scale = quantised(exact.float())
    torch.testing.assert_close(scale, expected_scale, rtol=2.0**-20, atol=0)
    assert (codes.float() == expected.float()).float().mean() > 0.9999
    assert (of_rounded.float() == expected.float()).float().mean() < 0.99


def test_the_linear_of_rows_that_are_quantised_already_is_that_of_the_rows_to_the_bit() -> None:
    x, codes, scale = inputs((33, 48, 64), BF16, CPU)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(4)).bfloat16()
    for dtype in (BF16, FP16, FP32):
        rows_of_x = quantised_rows(x.to(dtype))
        assert torch.equal(
            quantised_linear(*rows_of_x, codes, scale, bias.to(dtype), dtype),
            fp8_linear(x.to(dtype), codes, scale, bias.to(dtype)),
        )


def test_rows_may_lie_apart_or_be_none_and_results_are_in_memory_of_their_own() -> None:
    wide = torch.randn(7, 100, generator=torch.Generator().manual_seed(5))
    sliced, kept = wide[:, 20:60], wide.clone()
    codes, scale = quantised_gelu(sliced, wide[:, :7])
    expected, expected_scale = quantised_gelu(sliced.contiguous(), wide[:, :7].contiguous())
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    codes, scale = quantised_rows(sliced)
    assert codes.is_contiguous()
    codes.view(torch.uint8).fill_(7)
    assert torch.equal(wide, kept)
    assert [tuple(tensor.shape) for tensor in quantised_gelu(wide[:0], wide[:0])] == [(0, 200), (0, 1)]


@pytest.mark.parametrize("op", QUANTISERS, ids=lambda op: op.name)
def test_a_quantiser_is_an_op_that_torch_s_own_checks_pass(op: Op) -> None:
    given = tuple(poisoned(tensor) for tensor in rows((5, 24, 8), BF16, 0, CPU))
    kinds = {"quantised_rows": [given[:1]], "quantised_gelu": [given, (given[0], None)]}[op.name]
    for kind in kinds:
        torch.library.opcheck(getattr(torch.ops.kontextd, op.name).default, kind)


@pytest.mark.parametrize("widths", [(48,), (48, 16)], ids=["alone", "beside"])
@pytest.mark.parametrize("op", QUANTISERS, ids=lambda op: op.name)
def test_a_compiler_does_not_look_inside_and_one_graph_does_for_any_number_of_rows(
    op: Op, widths: tuple[int, ...]
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight, weight_scale = quantised(torch.randn(32, 64 if len(widths) > 1 else 48))

    def layer(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale = op.launcher(*given)
        return (
            codes.float(),
            scale,
            quantised_linear(codes, scale, weight[:, : codes.shape[1]], weight_scale, None, FP32),
        )

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for tokens in (33, 70):
        given = rows((tokens, *widths[: 1 if op is QUANTISED_ROWS else 2]), BF16, 0, CPU)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert all(torch.equal(*pair) for pair in zip(compiled(*given), layer(*given), strict=True))
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op.startswith("call")]
    assert [name for name in called if "kontextd" in name] == [f"kontextd.{op.name}"]
    assert not [name for name in called if "gelu" in name and "kontextd" not in name]


def test_a_compiler_still_sees_what_quantises_the_rows_of_fp8_linear() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    given = inputs((33, 48, 64), BF16, CPU)
    assert torch.equal(torch.compile(fp8_linear, backend=counter, fullgraph=True)(*given), fp8_linear(*given))
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op.startswith("call")]
    assert "amax" in " ".join(called)
    assert "kontextd" not in " ".join(called)


def test_rows_that_do_not_fit_are_refused_with_their_value() -> None:
    x = torch.zeros(4, 20)
    refused = [
        (lambda: quantised_rows(x.double()), r"x is \[4, 20\] in torch.float64"),
        (lambda: quantised_rows(x[None]), r"x is \[1, 4, 20\]"),
        (lambda: quantised_rows(x[:, :0]), r"x is \[4, 0\] .*must have columns"),
        (lambda: quantised_rows(x.T), r"x is \[20, 4\] with strides \[1, 20\]; .*contiguous\(\) first"),
        (lambda: quantised_gelu(x.long()), r"hidden is \[4, 20\] in torch.int64"),
        (lambda: quantised_gelu(x[:, ::2]), r"hidden is \[4, 10\] with strides \[20, 2\]"),
        (lambda: quantised_gelu(x, x.double()), r"beside is \[4, 20\] in torch.float64"),
        (lambda: quantised_gelu(x, x[:, ::2]), r"beside is \[4, 10\] with strides"),
        (lambda: quantised_gelu(x, x[:3]), r"beside is \[3, 20\] on cpu and hidden \[4, 20\] on cpu; .*as many rows"),
        (lambda: quantised_gelu(x, x.to("meta")), r"beside is .* on meta and hidden"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("capability", "goes"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_rows_are_quantised_by_the_kernel_where_a_gpu_has_float8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], goes: bool
) -> None:
    monkeypatch.setattr(launch, "goes_to_triton", lambda x: x.is_cuda)
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    with FakeTensorMode():
        assert launch._is_quantised_by_triton(torch.empty(2, 3, device="cuda")) == goes
    assert not launch._is_quantised_by_triton(torch.empty(2, 3))
