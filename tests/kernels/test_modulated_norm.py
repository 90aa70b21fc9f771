"""modulated_norm through its door on the CPU, against fp64, in poisoned memory, compiled; and what the door refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kontextd_kernels.fp8_linear.reference import quantised
from kontextd_kernels.modulated_norm import gated_norm, gated_norm_fp8, launch, modulated_norm, modulated_norm_fp8
from kontextd_kernels.modulated_norm.launch import fits_triton
from kontextd_kernels.modulated_norm.reference import normed, summed
from kontextd_kernels.modulated_norm.rows import NORMS, extreme, gated, plain
from kontextd_kernels.op import Case, Op
from poison import poisoned, untouched
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in NORMS for case in (*op.awkward, *op.ours["cpu"])]
each_op = pytest.mark.parametrize("op", NORMS, ids=lambda op: op.name)


def made(op: Op, tokens: int, width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    """Inputs of one dtype; the sums of gated ones are rounded, unlike those of the table."""
    x, scale, shift = plain((tokens, width), (dtype, dtype), CPU)
    return (x.flip(0), shift, x, scale, shift) if op.name.startswith("gated") else (x, scale, shift)


def several(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_result_is_that_in_fp64_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    assert op.excess(inputs, op.launcher(*inputs)) <= 1
    assert all(untouched(tensor) for tensor in inputs)


@pytest.mark.parametrize("case", NORMS[2].awkward, ids=lambda case: case.name)
def test_the_sums_of_the_table_are_exact_so_that_fp64_norms_the_same_tokens(case: Case) -> None:
    update, gate, residual, *_ = case.inputs(CPU)
    exact = summed(update.double(), gate.double(), residual.double())
    assert torch.equal(exact.to(residual.dtype).double(), exact)


@each_op
def test_two_units_too_much_or_a_nan_anywhere_are_more_than_is_allowed(op: Op) -> None:
    """But two units of tokens beside codes, which are held to the bound of codes: for these see the next test."""
    inputs = next(case for case in op.awkward if case.name == "33x192 bfloat16 bfloat16").inputs(CPU)
    result = op.launcher(*inputs)
    results = several(result)
    for spoilt in results[-2:-1] if op.name.endswith("fp8") else results:
        bits = spoilt.view(torch.uint8 if spoilt.itemsize == 1 else torch.int16)
        bits[17, 3] += 2
        assert op.excess(inputs, result) > 1
        bits[17, 3] -= 2
    for spoilt in results:
        assert op.excess(inputs, result) <= 1
        kept, spoilt[17, 0] = spoilt[17, 0].clone(), float("nan")
        assert not op.excess(inputs, result) <= 1
        spoilt[17, 0] = kept


@pytest.mark.parametrize("op", NORMS[2:], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tokens_are_rounded_once_and_it_is_these_that_are_normed(op: Op, dtype: torch.dtype) -> None:
    update, gate, residual, scale, shift = made(op, 70, 192, dtype)
    tokens, *rest = op.launcher(update, gate, residual, scale, shift)
    exact = summed(update.double(), gate.double(), residual.double())
    assert tokens.dtype == dtype
    assert (tokens.double() - exact).norm() <= 1.0001 * (exact.to(dtype).double() - exact).norm()
    of_tokens, of_sums = (
        several(NORMS[NORMS.index(op) - 2].launcher(x, scale, shift)) for x in (tokens, summed(update, gate, residual))
    )
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(rest, of_tokens, strict=True))
    assert not torch.equal(rest[0].float(), of_sums[0].to(rest[0].dtype).float())


def with_a_column_of_zeros(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wider = [torch.nn.functional.pad(tensor, (0, 1)) for tensor in (x, scale, shift)]
    return normed(*wider)[:, :-1]


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "masked lanes counted": with_a_column_of_zeros,
    "deviation of a sample": lambda x, scale, shift: (x - x.mean(1)[:, None]) / x.std(1)[:, None] * (1 + scale) + shift,
    "larger eps": lambda x, scale, shift: normed(x, scale, shift, 1e-5),
    "mean left in": lambda x, scale, shift: x * (x.square().mean(1)[:, None] + 1e-6).rsqrt() * (1 + scale) + shift,
    "scale without one": lambda x, scale, shift: normed(x, scale - 1, shift),
    "scaled shift": lambda x, scale, shift: normed(x, scale, shift * (1 + scale)),
    "scale of a neighbour": lambda x, scale, shift: normed(x, scale.roll(1, 1), shift),
    "shift of a neighbour": lambda x, scale, shift: normed(x, scale, shift.roll(1, 1)),
    "row of a neighbour": lambda x, scale, shift: normed(x.roll(1, 0), scale, shift),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_formula_is_more_than_is_allowed(wrong: str) -> None:
    x, scale, shift = plain((64, 96), (FP32, FP32), CPU)
    inputs = (x * torch.logspace(-3, 1, 64)[:, None], scale, shift)
    assert NORMS[0].excess(inputs, WRONG[wrong](*inputs)) > 1
    assert NORMS[1].excess(inputs, quantised(WRONG[wrong](*inputs))) > 1


@each_op
def test_the_error_is_that_of_rounding_to_bf16_and_no_more(op: Op) -> None:
    """Of float8 it is the rounding of codes: normed values in bf16 on the way would show."""
    inputs = gated((130, 768), (BF16, BF16), CPU) if op.name.startswith("gated") else made(op, 130, 768)
    exact = op.exact(*(tensor.double() for tensor in inputs))[-130:]
    codes, row_scale = quantised(exact.float())
    rounded = codes.double() * row_scale.double() if op.name.endswith("fp8") else exact.bfloat16().double()
    assert (op.values(op.launcher(*inputs))[-130:] - exact).norm() <= 1.0001 * (rounded - exact).norm()


def test_it_is_what_torch_s_layer_norm_gives_scaled_and_shifted() -> None:
    x, scale, shift = plain((50, 192), (FP32, FP32), CPU)
    expected = torch.nn.LayerNorm(192, eps=1e-6, elementwise_affine=False)(x) * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, scale, shift), expected, rtol=1e-5, atol=1e-5)
    loose = torch.nn.LayerNorm(192, eps=0.5, elementwise_affine=False)(x) * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, scale, shift, eps=0.5), loose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 192, 3072])
def test_a_row_of_equal_values_becomes_the_shift_to_the_bit(width: int) -> None:
    x = torch.tensor([0, 1e-30, 0.1, -1000.7, 3e4, 1e16])[:, None].repeat(1, width)
    scale, shift = (torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(modulated_norm(x, scale, shift), shift.expand(6, width))
    codes, row_scale = modulated_norm_fp8(x, scale, shift)
    expected, expected_scale = quantised(shift[None])
    assert torch.equal(codes.float(), expected.float().expand(6, width))
    assert torch.equal(row_scale, expected_scale.expand(6, 1))


def test_a_mean_of_a_thousand_times_the_deviation_costs_no_accuracy() -> None:
    random = torch.Generator().manual_seed(5)
    x, nothing = torch.randn(40, 3072, generator=random), torch.zeros(3072)
    for offset in (0, 1000):
        moved = x + offset
        error = modulated_norm(moved, nothing, nothing) - normed(moved.double(), nothing.double(), nothing.double())
        assert error.abs().max() < 2.0**-20


def test_the_largest_of_each_row_becomes_the_largest_code_and_a_row_of_zeros_stays_one() -> None:
    x, scale, shift = plain((9, 200), (BF16, BF16), CPU)
    x[3] = 5
    codes, row_scale = modulated_norm_fp8(x, scale, torch.zeros_like(shift))
    assert codes.float().abs().amax(dim=1).tolist() == [448.0] * 3 + [0.0] + [448.0] * 5
    assert (row_scale > 0).all()


@each_op
def test_channels_may_have_one_dimension_or_two_and_rows_may_lie_apart_or_be_the_same(op: Op) -> None:
    inputs = tuple(tensor[:1].expand(7, -1) if len(tensor) > 1 else tensor for tensor in made(op, 7, 33))
    flat = tuple(tensor.contiguous() if len(tensor) > 1 else tensor[0] for tensor in inputs)
    pairs = zip(several(op.launcher(*inputs)), several(op.launcher(*flat)), strict=True)
    assert all(torch.equal(one.float(), other.float()) for one, other in pairs)


@each_op
def test_no_input_changes_and_results_are_in_memory_of_their_own(op: Op) -> None:
    inputs = tuple(poisoned(tensor) for tensor in made(op, 6, 40, FP32))
    before = [tensor.clone() for tensor in inputs]
    results = several(op.launcher(*inputs))
    assert all(result.is_contiguous() for result in results)
    for result in results:
        result.view(torch.uint8).fill_(7)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


@each_op
def test_it_is_an_op_that_torch_s_own_checks_pass(op: Op) -> None:
    for dtype in (BF16, FP32):
        inputs = (*(poisoned(tensor) for tensor in made(op, 5, 24, dtype)), 1e-6)
        torch.library.opcheck(getattr(torch.ops.kontextd, op.name).default, inputs)


@each_op
def test_a_compiler_does_not_look_inside_and_one_graph_does_for_any_number_of_rows(op: Op) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.launcher, backend=counter, fullgraph=True)
    for tokens in (33, 70):
        inputs = made(op, tokens, 48)
        for tensor in inputs:
            if len(tensor) > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        pairs = zip(several(compiled(*inputs)), several(op.launcher(*inputs)), strict=True)
        assert all(torch.equal(one.float(), other.float()) for one, other in pairs)
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op.startswith("call")]
    assert [name for name in called if "built-in" not in name] == [f"kontextd.{op.name}"]  # the rest compares sizes


def test_what_does_not_fit_is_refused_with_its_value_and_a_remedy() -> None:
    update, gate, residual, scale, shift = gated((4, 12), (FP32, FP32), CPU)
    refused = [
        (dict(residual=residual.double()), r"residual is torch.float64 and must be one of .*; convert it"),
        (dict(residual=residual[None]), r"residual is \[1, 4, 12\] and must be \[T, D\]"),
        (dict(residual=residual[:0]), r"residual is \[0, 12\]"),
        (dict(residual=residual.T.contiguous().T), r"strides \[1, 4\].*contiguous\(\) first"),
        (dict(update=update[:3]), r"update is \[3, 12\] and residual \[4, 12\]"),
        (dict(update=update.to("meta")), r"update is on meta and the rows on cpu; move"),
        (dict(update=update.to(torch.float8_e4m3fn)), r"update is torch.float8_e4m3fn"),
        (dict(gate=gate[:, :11]), r"gate is \[1, 11\]; beside residual \[4, 12\] it must be \[12\]"),
        (dict(scale=scale.expand(4, 12)), r"scale is \[4, 12\]"),
        (dict(scale=torch.tensor(1.0)), r"scale has shape \[\]"),
        (dict(shift=shift.to(torch.int8)), r"shift is torch.int8"),
        (dict(shift=torch.zeros(24)[::2]), r"shift has shape \[12\] and strides \[2\]"),
        (dict(eps=0.0), r"eps is 0.0 and must be more than 0"),
    ]
    for wrong, message in refused:
        given = dict(update=update, gate=gate, residual=residual, scale=scale, shift=shift) | wrong
        for op in (gated_norm, gated_norm_fp8):
            with pytest.raises(ValueError, match=message):
                op(**given)
    for op in (modulated_norm, modulated_norm_fp8):
        with pytest.raises(ValueError, match=r"x is torch.int64 and must be"):
            op(residual.long(), scale, shift)
        with pytest.raises(ValueError, match=r"scale is \[11\]; beside x \[4, 12\]"):
            op(residual, scale[0, :11], shift)
        with pytest.raises(ValueError, match=r"eps is -1"):
            op(residual, scale, shift, -1)


def test_the_kernel_is_for_cuda_and_for_rows_that_registers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "goes_to_triton", lambda x: x.is_cuda)
    with FakeTensorMode():
        there = [torch.empty(2, width, device="cuda") for width in (1, launch.WIDEST, launch.WIDEST + 1)]
    assert [fits_triton(x) for x in (*there, extreme((FP32, FP32), CPU)[0])] == [True, True, False, False]
