"""The ops on a real CUDA device against fp64, in poisoned memory: every row of the table."""

from __future__ import annotations

import pytest
import torch
from kontextd_kernels.device import triton_is_there
from kontextd_kernels.lora_merge import merged, merged_fp8
from kontextd_kernels.op import Case, Op
from kontextd_kernels.ops import OPS
from poison import poisoned, untouched

CUDA = torch.device("cuda")
AWKWARD = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in OPS for case in op.awkward]
OURS = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in OPS for case in op.ours["cuda"]]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def test_triton_is_what_runs_here() -> None:
    assert triton_is_there()


@pytest.mark.parametrize(("op", "case"), AWKWARD)
def test_an_awkward_shape_gives_the_fp64_result_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CUDA))
    excess = [op.excess(inputs, way(*inputs)) for way in (op.launcher, op.reference)]
    assert max(excess) <= 1
    assert all(untouched(tensor) for tensor in inputs)


@pytest.mark.parametrize(("op", "case"), OURS)
def test_a_layer_of_the_model_gives_the_fp64_result_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = case.inputs(CUDA)
    excess = op.excess(inputs, op.launcher(*inputs))
    assert excess <= 1


@pytest.mark.parametrize("op", [op for op in OPS if op.has_compiled_rival], ids=lambda op: op.name)
def test_in_a_compiled_graph_it_gives_the_same_bits(op: Op) -> None:
    torch._dynamo.reset()
    inputs = op.ours["cuda"][-1].inputs(CUDA)
    compiled = torch.compile(op.launcher, fullgraph=True)
    found, expected = (
        result if isinstance(result, tuple) else (result,) for result in (compiled(*inputs), op.launcher(*inputs))
    )
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(found, expected, strict=True))


def test_it_writes_into_rows_that_lie_apart_and_nowhere_else() -> None:
    inputs = OPS[0].ours["cuda"][0].inputs(CUDA)
    out = poisoned(torch.empty_like(inputs[0]))
    codes, scale = poisoned(torch.zeros_like(out).to(torch.float8_e4m3fn)), poisoned(torch.zeros_like(inputs[1][:, :1]))
    assert torch.equal(merged(*inputs, out=out), merged(*inputs))
    expected, expected_scale = merged_fp8(*inputs)
    merged_fp8(*inputs, codes=codes, scale=scale)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    assert all(untouched(tensor) for tensor in (out, codes, scale))


def test_the_same_merge_gives_the_same_bits_every_time() -> None:
    inputs = OPS[0].ours["cuda"][-1].inputs(CUDA)
    first, (codes, scale) = merged(*inputs), merged_fp8(*inputs)
    for _ in range(5):
        again_codes, again_scale = merged_fp8(*inputs)
        assert torch.equal(merged(*inputs), first)
        assert torch.equal(again_codes.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(again_scale, scale)


def test_a_weight_of_more_than_two_gigabytes_of_elements_is_addressed_whole() -> None:
    rows = (1 << 31) // 4096 + 130
    base = torch.zeros(rows, 4096, device=CUDA, dtype=torch.bfloat16)
    up, down = torch.ones(rows, 1, device=CUDA), torch.arange(4096, device=CUDA)[None].bfloat16()
    out = merged(base, up, down)
    assert torch.equal(out[-1], down[0])
    assert torch.equal(out[:: rows // 7].amax(dim=1), torch.full((8,), 4096.0, device=CUDA, dtype=torch.bfloat16))
