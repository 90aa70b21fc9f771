"""The rows of lora_merge in the table of ops: shapes, dtypes and error bounds. Knows no kernels."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from kontextd_kernels.lora_merge import launch, reference
from kontextd_kernels.op import Case, Inputs, Op, Result, Tolerance

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
Shape = tuple[int, int, int]  # out, in, R
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of base, up and down

AWKWARD_SHAPES: tuple[Shape, ...] = (
    (1, 1, 1),
    (1, 1030, 7),
    (515, 1, 64),
    (64, 128, 0),
    (64, 128, 16),
    (129, 257, 1),
    (130, 131, 33),
    (127, 384, 65),
    (257, 129, 200),
)
ALL_DTYPES: tuple[Dtypes, ...] = (
    (BF16, FP32, FP32),
    (BF16, FP32, BF16),
    (BF16, BF16, BF16),
    (BF16, FP16, BF16),
    (BF16, FP32, FP16),
    (FP16, FP16, FP16),
    (FP16, FP32, FP16),
    (FP32, FP32, FP32),
    (FP32, FP32, BF16),
    (FP32, FP32, FP16),
    (FP32, BF16, BF16),
)
# Linear layers of FLUX.1 Kontext's transformer, D = 3072: attention, feed-forward there and back, the single blocks'
# output and fused input, the double blocks' fused qkv. `up` is fp32 for the strengths in it, `down` as in the file.
MODEL_SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (21504, 3072), (9216, 3072))
MODEL_RANKS = (16, 64, 192)
MEASURED: dict[str, tuple[tuple[Dtypes, ...], tuple[tuple[int, int], ...]]] = {
    "cuda": (((BF16, FP32, BF16),), MODEL_SHAPES),
    "cpu": (((FP32, FP32, FP32), (BF16, FP32, BF16)), MODEL_SHAPES[:3]),
}

CUT = 2.0**-15  # a factor cut in two bf16 loses 2^-17, two of them 2^-16, and low · low is at most 2^-16 of a product
TINY = 2.0**-126  # a GPU may take what is smaller for zero
TOLERANCE = {
    BF16: Tolerance(2.0**-8, 0.0, TINY, CUT, "half a unit of 8 significant bits; factors cut in two bf16"),
    FP16: Tolerance(2.0**-11, 0.0, 2.0**-25, CUT, "half a unit of 11 significant bits, or half of the smallest number"),
    FP32: Tolerance(
        2.0**-24, 0.0, TINY, 2.0**-20, "half a unit of 24 significant bits; a sum of 200 errs by √200 times it"
    ),
}
STEP = 2.0**-10 / reference.LARGEST_CODE  # half of the smallest code, 2^-9, where the largest of the row is 448
TOLERANCE_FP8 = {
    FP8: Tolerance(2.0**-4, STEP, TINY, CUT, "half a unit of 4 significant bits, or half of the smallest code")
}


def inputs(shape: Shape, dtypes: Dtypes, device: torch.device) -> Inputs:
    """A base like a trained one and a delta of a third of its size, which is much for an adapter."""
    out_features, in_features, rank = shape
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(1))
    up = random(out_features, rank) * 0.01 / max(1, rank) ** 0.5
    factors = (random(out_features, in_features) * 0.03, up, random(rank, in_features))
    return tuple(tensor.to(dtype) for tensor, dtype in zip(factors, dtypes, strict=True))


def cancelling(dtypes: Dtypes, device: torch.device) -> Inputs:
    """A delta that all but takes the base away, in rows of sizes from 1e-30 to 100, one of them all zeros."""
    _, up, down = inputs((67, 190, 24), (FP32, FP32, FP32), device)
    up *= torch.logspace(-28, 4, 67, device=device)[:, None]
    up[5] = 0
    return (-(up @ down)).to(dtypes[0]), up.to(dtypes[1]), down.to(dtypes[2])


def case(shape: Shape, dtypes: Dtypes, row_bytes: tuple[int, int]) -> Case:
    """`row_bytes`: of the result, for each weight and for each row."""
    (out_features, in_features, rank), (base, up, down) = shape, dtypes
    name = f"{out_features}x{in_features} R={rank} {spelled(dtypes)}"
    weights = out_features * in_features
    read = weights * base.itemsize + rank * (out_features * up.itemsize + in_features * down.itemsize)
    written = weights * row_bytes[0] + out_features * row_bytes[1]
    return Case(name, partial(inputs, shape, dtypes), read + written, 2 * rank * weights)


def spelled(dtypes: Dtypes) -> str:
    return " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def awkward() -> tuple[Case, ...]:
    plain = (case(shape, dtypes, (0, 0)) for shape, dtypes in product(AWKWARD_SHAPES, ALL_DTYPES))
    extreme = (Case(f"cancelling {spelled(dtypes)}", partial(cancelling, dtypes), 0, 0) for dtypes in ALL_DTYPES)
    return (*plain, *extreme)


def ours(fp8: bool) -> dict[str, tuple[Case, ...]]:
    return {
        device: tuple(
            case((*shape, rank), dtypes, (1, 4) if fp8 else (dtypes[0].itemsize, 0))
            for dtypes, shape, rank in product(all_dtypes, shapes, MODEL_RANKS)
        )
        for device, (all_dtypes, shapes) in MEASURED.items()
    }


def weight(result: Result) -> Tensor:
    assert isinstance(result, Tensor)
    return result.double()


def dequantised(result: Result) -> Tensor:
    codes, scale = result
    return codes.double() * scale.double()


MERGED = Op(
    "lora_merge",
    reference=reference.merged,
    launcher=launch.merged,
    exact=reference.summed,
    values=weight,
    tolerance=TOLERANCE,
    awkward=awkward(),
    ours=ours(fp8=False),
)
MERGED_FP8 = Op(
    "lora_merge_fp8",
    reference=reference.merged_fp8,
    launcher=launch.merged_fp8,
    exact=reference.summed,
    values=dequantised,
    tolerance=TOLERANCE_FP8,
    awkward=awkward(),
    ours=ours(fp8=True),
)
