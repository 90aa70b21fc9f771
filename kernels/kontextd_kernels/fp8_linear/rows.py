"""The rows of fp8_linear in the table of ops: shapes, dtypes and error bounds. Knows no kernels."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from kontextd_kernels.fp8_linear import launch, reference
from kontextd_kernels.lora_merge.reference import merged_fp8
from kontextd_kernels.lora_merge.rows import STEP, dequantised
from kontextd_kernels.op import Case, Inputs, Op, Result, Tolerance

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Shape = tuple[int, int, int]  # T, out, in

AWKWARD_SHAPES: tuple[Shape, ...] = ((1, 1, 1), (1, 16, 4096), (33, 48, 64), (130, 17, 31), (257, 512, 384))
# Of FLUX.1 Kontext at 1 MP + 1 MP, D = 3072: attention, feed-forward there and back, the single blocks' output.
MODEL_SHAPES: tuple[Shape, ...] = tuple(
    (8704, out, columns) for out, columns in ((3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360))
)
# Rows that are quantised: (T, in); (T, M) to go through gelu, or (T, M, D) with D columns beside them.
AWKWARD_ROWS = ((1, 1), (5, 130), (33, 768), (3, 4096), (2, 8200))
AWKWARD_PAIRS = ((3, 130, 7), (33, 768, 192), (2, 1, 4097), (5, 4100, 3072))
# Of FLUX.1 Kontext, in a full step of 1 MP + 1 MP and in a cached one: what attention made; what the feed-forward of
# double blocks hands to its second layer, and what single blocks hand to their way out.
MODEL_ROWS = ((8704, 3072), (4608, 3072))
MODEL_HIDDEN = ((8704, 12288), (4608, 12288), (8704, 12288, 3072), (4608, 12288, 3072))

TINY = 2.0**-126
# What tensor cores may lose while they add up, in units of the sum of all sizes: 2 % of a result (see launch.py), which
# is a sixtieth of that sum for 4096 random terms, is 2⁻¹²; eight times as much is allowed, and a wrong scale is 2⁻⁶.
TENSOR_CORES = 2.0**-9
TOLERANCE = {
    BF16: Tolerance(2.0**-8, 0.0, TINY, TENSOR_CORES, "half a unit of 8 significant bits; 14 bits while adding up"),
    FP16: Tolerance(2.0**-11, 0.0, 2.0**-25, 2.0**-20, "half a unit of 11 significant bits; sums in fp32"),
    FP32: Tolerance(2.0**-24, 0.0, TINY, 2.0**-20, "half a unit of 24 significant bits; sums in fp32"),
}

CODES = Tolerance(
    2.0**-4,
    STEP,
    TINY,
    2.0**-22,
    "half a unit of 4 significant bits, or half of the smallest code; 1 + tanh in fp32 is right to 2⁻²⁴ only",
)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normed tokens, one in a hundred channels ten times the others, and a weight like a trained one."""
    tokens, out_features, in_features = shape
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(1))
    x = random(tokens, in_features)
    x[:, ::100] *= 10
    base = (random(out_features, in_features) * 0.03).to(dtype)
    codes, scale = merged_fp8(base, base.new_empty(out_features, 0), base.new_empty(0, in_features))
    return x.to(dtype), codes, scale


def case(shape: Shape, dtype: torch.dtype) -> Case:
    tokens, out_features, in_features = shape
    name = f"{tokens} tokens {out_features}x{in_features} {dtype}".replace("torch.", "")
    size_bytes = (tokens * (in_features + out_features)) * dtype.itemsize + out_features * (in_features + 4)
    return Case(name, partial(inputs, shape, dtype), size_bytes, 2 * tokens * out_features * in_features)


def result(found: Result) -> Tensor:
    assert isinstance(found, Tensor)
    return found.double()


def rows(shape: tuple[int, ...], dtype: torch.dtype, spread: int, device: torch.device) -> Inputs:
    """[T, columns] for each number of columns: normal, each row times 10^-spread to 10^spread.

    Where there is a spread, one row in seven is zeros, and in one nothing is above 0: gelu makes little of it.
    """
    tokens, *widths = shape
    generator = torch.Generator(device).manual_seed(1)
    made = []
    for columns in widths:
        x = torch.randn(tokens, columns, device=device, generator=generator)
        if spread:
            x *= 10 ** (spread * (2 * torch.rand(tokens, 1, device=device, generator=generator) - 1))
            x[3::7] = 0
            x[5::7] = -x[5::7].abs()
        made.append(x.to(dtype))
    return tuple(made)


def rows_case(shape: tuple[int, ...], dtype: torch.dtype, spread: int = 0) -> Case:
    tokens, *widths = shape
    name = f"{tokens}x{'+'.join(map(str, widths))} {dtype}".replace("torch.", "")
    size_bytes = tokens * (sum(widths) * (dtype.itemsize + 1) + 4)
    return Case(name, partial(rows, shape, dtype, spread), size_bytes, 0)  # no product of matrices


def as_they_are(x: Tensor) -> Tensor:
    return x


FP8_LINEAR = Op(
    "fp8_linear",
    reference=reference.fp8_linear,
    launcher=launch.fp8_linear,
    exact=reference.summed,
    values=result,
    tolerance=TOLERANCE,
    awkward=tuple(case(*one) for one in product(AWKWARD_SHAPES, (BF16, FP16, FP32))),
    ours={"cuda": tuple(case(shape, BF16) for shape in MODEL_SHAPES), "cpu": (case((512, 768, 192), FP32),)},
    takes_memory=False,
)
QUANTISED_ROWS = Op(
    "quantised_rows",
    reference=reference.quantised,
    launcher=launch.quantised_rows,
    exact=as_they_are,
    values=dequantised,
    tolerance={torch.float8_e4m3fn: CODES},
    awkward=tuple(rows_case(shape, dtype, spread=4) for shape, dtype in product(AWKWARD_ROWS, (BF16, FP16, FP32))),
    ours={"cuda": tuple(rows_case(shape, BF16) for shape in MODEL_ROWS), "cpu": (rows_case((1280, 192), FP32),)},
    takes_memory=False,
    has_compiled_rival=True,
)
QUANTISED_GELU = Op(
    "quantised_gelu",
    reference=reference.quantised_gelu,
    launcher=launch.quantised_gelu,
    exact=reference.activated,
    values=dequantised,
    tolerance={torch.float8_e4m3fn: CODES},
    awkward=tuple(
        rows_case(shape, dtype, spread=4) for shape, dtype in product(AWKWARD_ROWS + AWKWARD_PAIRS, (BF16, FP16, FP32))
    ),
    ours={"cuda": tuple(rows_case(shape, BF16) for shape in MODEL_HIDDEN), "cpu": (rows_case((1280, 768, 192), FP32),)},
    takes_memory=False,
    has_compiled_rival=True,
)
