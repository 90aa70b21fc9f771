"""lora_merge through its door on the CPU, against fp64, in poisoned memory; and what the door refuses."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from kontextd_kernels.device import triton_is_there
from kontextd_kernels.lora_merge import bfloat16_way, merged, merged_fp8, plain
from kontextd_kernels.lora_merge.plain import BAND_ROWS
from kontextd_kernels.lora_merge.reference import summed
from kontextd_kernels.lora_merge.rows import MERGED, MERGED_FP8
from kontextd_kernels.op import Case, Op
from poison import poisoned, untouched
from torch import Tensor

CPU = torch.device("cpu")
MERGES = (MERGED, MERGED_FP8)
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in MERGES for case in op.awkward]


def made(out_features: int, in_features: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """base, up and down; the delta is a tenth of the base."""
    random = torch.Generator().manual_seed(7)
    base = torch.randn(out_features, in_features, generator=random) * 0.03
    up = torch.randn(out_features, rank, generator=random) * 0.003 / max(1, rank) ** 0.5
    return base.to(dtype), up, torch.randn(rank, in_features, generator=random)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_result_is_that_in_fp64_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    excess = [op.excess(inputs, way(*inputs)) for way in (op.launcher, op.reference)]
    assert max(excess) <= 1
    assert all(untouched(tensor) for tensor in inputs)


BFLOAT16_CASES = [case for case in MERGED.awkward if case.inputs(CPU)[0].dtype == torch.bfloat16]


@pytest.mark.skipif(not bfloat16_way.is_native(), reason="this CPU does not multiply bfloat16 itself")
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=lambda case: case.name)
def test_products_of_the_cpu_itself_are_as_near_at_any_size(case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    out = poisoned(torch.empty_like(inputs[0]))
    bfloat16_way.merge(*inputs, out)
    assert MERGED.excess(inputs, out) <= 1
    assert all(untouched(tensor) for tensor in (*inputs, out))


def test_the_cpus_own_products_are_taken_where_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = made(64, 128, 16)
    came: list[str] = []
    monkeypatch.setattr(bfloat16_way, "merge", lambda *_: came.append("bfloat16"))
    monkeypatch.setattr(plain, "merge", lambda *_: came.append("plain"))
    for there in (True, False):
        monkeypatch.setattr(bfloat16_way, "is_native", lambda there=there: there)
        merged(*inputs)
    monkeypatch.setattr(bfloat16_way, "is_native", lambda: True)
    merged(*inputs, out=torch.empty(64, 128))
    merged(*made(64, 128, 16, torch.float16))
    merged(*made(8, 8, 16))
    assert came == ["bfloat16", "plain", "plain", "plain", "plain"]


@pytest.mark.parametrize("op", MERGES, ids=lambda op: op.name)
def test_two_units_too_much_or_a_nan_anywhere_are_more_than_is_allowed(op: Op) -> None:
    inputs = made(40, 50, 8)
    result = op.launcher(*inputs)
    first = result if isinstance(result, Tensor) else result[0]
    first.view(torch.uint8 if first.itemsize == 1 else torch.int16)[17, 3] += 2
    assert op.excess(inputs, result) > 1
    first[17, 3] = float("nan")
    assert not op.excess(inputs, result) <= 1


@pytest.mark.parametrize("rank", [1, 96, 2000])
def test_the_error_is_that_of_rounding_to_bf16_and_no_more(rank: int) -> None:
    base, up, down = made(300, 700, rank)
    exact = summed(base.double(), up.double(), down.double())
    floor = (exact.bfloat16().double() - exact).norm()
    assert (merged(base, up, down).double() - exact).norm() <= 1.0001 * floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_an_adapter_the_result_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    base, up, down = made(33, 65, 0, dtype)
    assert torch.equal(merged(base, up, down), base)


@pytest.mark.parametrize("rows", [1, BAND_ROWS - 1, BAND_ROWS, BAND_ROWS + 1, 2 * BAND_ROWS + 3])
def test_any_number_of_rows_is_merged_whole(rows: int) -> None:
    inputs = made(rows, 20, 3)
    excess = [op.excess(inputs, op.launcher(*inputs)) for op in MERGES]
    assert max(excess) <= 1


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_writes_into_rows_that_lie_apart_and_nowhere_else(out_dtype: torch.dtype) -> None:
    inputs = made(70, 90, 5, torch.float32)
    out = poisoned(torch.empty(70, 90, dtype=out_dtype))
    assert merged(*inputs, out=out) is out
    assert torch.equal(out, merged(*inputs).to(out_dtype))
    assert untouched(out)


def test_codes_and_scales_are_written_into_rows_that_lie_apart_and_nowhere_else() -> None:
    inputs = made(70, 90, 5)
    codes, scale = poisoned(torch.zeros(70, 90).to(torch.float8_e4m3fn)), poisoned(torch.empty(70, 1))
    merged_fp8(*inputs, codes=codes, scale=scale)
    expected, expected_scale = merged_fp8(*inputs)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    assert untouched(codes)
    assert untouched(scale)


def test_the_largest_of_each_row_becomes_the_largest_code_and_a_row_of_zeros_stays_one() -> None:
    base, up, down = made(9, 200, 4)
    base[3], up[3] = 0, 0
    codes, scale = merged_fp8(base, up, down)
    peaks = codes.float().abs().amax(dim=1)
    assert peaks.tolist() == [448.0] * 3 + [0.0] + [448.0] * 5
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_a_live_parameter_is_rewritten_in_place() -> None:
    base, up, down = made(16, 24, 2)
    live = torch.nn.Parameter(base.clone())
    address = live.data_ptr()
    assert merged(base, up, down, out=live) is live
    assert (live.data_ptr(), live.requires_grad, live.grad_fn) == (address, True, None)
    assert torch.equal(live, merged(base, up, down))


def test_no_input_changes() -> None:
    inputs = made(40, 50, 6)
    before = [tensor.clone() for tensor in inputs]
    for op in MERGES:
        op.launcher(*inputs)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


def test_writing_into_the_pristine_base_or_a_factor_is_refused() -> None:
    memory = torch.zeros(100, 64, dtype=torch.bfloat16)
    base, up, down = memory[:50], torch.zeros(50, 4), torch.zeros(4, 64)
    merged(base, up, down, out=memory[50:])
    for out in (base, memory[49:99], memory[1:51]):
        with pytest.raises(ValueError, match=r"out shares memory .* memory of its own"):
            merged(base, up, down, out=out)
    with pytest.raises(ValueError, match="scale shares memory"):
        merged_fp8(base, up, down, scale=up[:, :1])


def test_what_does_not_fit_is_refused_with_its_value_and_a_remedy() -> None:
    base, up, down = made(12, 20, 4)
    refused = [
        (dict(up=up[:11]), r"up \[11, 4\] @ down \[4, 20\] does not fit base \[12, 20\]"),
        (dict(down=down[:3]), r"down \[3, 20\] does not fit"),
        (dict(down=down[:, :19].contiguous()), r"down \[4, 19\] does not fit"),
        (dict(up=up.double()), r"up is torch.float64 and must be one of .*; convert it"),
        (dict(base=base.to(torch.float8_e4m3fn)), r"base is torch.float8_e4m3fn"),
        (dict(up=up.to("meta")), r"up is on meta and base on cpu; move"),
        (dict(down=down.T.contiguous().T), r"strides \[1, 4\].*contiguous\(\) first"),
        (dict(up=up[0]), r"up has shape \[4\].*two dimensions"),
        (dict(down=down[:1].expand(4, 20)), r"rows of down overlap, their stride is 0"),
        (dict(base=base[:0], up=up[:0]), r"base is empty, \[0, 20\]"),
        (dict(out=torch.empty(12, 21)), r"out is \[12, 21\] and must be \[12, 20\]"),
        (dict(out=torch.empty(12, 20, dtype=torch.int8)), r"out is torch.int8"),
    ]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            merged(**{"base": base, "up": up, "down": down, **wrong})


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed here")
def test_a_gpu_without_triton_is_a_warning_and_not_silence(caplog: pytest.LogCaptureFixture) -> None:
    triton_is_there.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not triton_is_there()
        assert not triton_is_there()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["triton is not installed"]
