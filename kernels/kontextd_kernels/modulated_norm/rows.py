"""The rows of modulated_norm in the table of ops: shapes, dtypes and error bounds. Knows no kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from kontextd_kernels.lora_merge.reference import LARGEST_CODE
from kontextd_kernels.modulated_norm import launch, reference
from kontextd_kernels.op import Case, Inputs, Op, Result, Tolerance

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Shape = tuple[int, int]  # T, D
Dtypes = tuple[torch.dtype, torch.dtype]  # of the rows that are normed, and of all else

AWKWARD_SHAPES: tuple[Shape, ...] = ((1, 1), (5, 1), (1, 1030), (3, 2), (130, 17), (33, 192), (16, 257), (9, 3072))
ALL_DTYPES: tuple[Dtypes, ...] = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, BF16), (FP32, FP32))
# Of FLUX.1 Kontext at 1 MP + 1 MP, D = 3072: a single block with the reference and without, a double block's text.
MODEL_SHAPES: tuple[Shape, ...] = ((8704, 3072), (4608, 3072), (512, 3072))
SMALL_SHAPE: Shape = (1280, 192)  # a single block of the demonstration model

TINY = 2.0**-126  # a GPU may take what is smaller for zero
# fp32 errs by 2⁻²⁴ of a number in each step. A value relative to the row's first, and the mean of these, are at most as
# large as the deviation times twice the row's peak; a root, two products and a sum follow. 16 times 2⁻²⁴ of the peak.
ROW = 2.0**-20
TOLERANCE = {
    BF16: Tolerance(2.0**-8, ROW, TINY, 0.0, "half a unit of 8 significant bits"),
    FP16: Tolerance(2.0**-11, ROW, 2.0**-25, 0.0, "half a unit of 11 significant bits, or half of the smallest number"),
    FP32: Tolerance(2.0**-24, ROW, TINY, 0.0, "half a unit of 24 significant bits"),
}
STEP = 2.0**-10 / LARGEST_CODE  # half of the smallest code, 2⁻⁹, where the largest of the row is 448
CODES = Tolerance(2.0**-4, STEP + ROW, TINY, 0.0, "half a unit of 4 significant bits, or half of the smallest code")


def plain(shape: Shape, dtypes: Dtypes, device: torch.device) -> Inputs:
    """x, scale and shift: tokens like a model's, one channel in a hundred ten times the others."""
    tokens, width = shape
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(1))
    x = random(tokens, width)
    x[:, 1::100] *= 10
    return x.to(dtypes[0]), *((random(1, width) * 0.3).to(dtypes[1]) for _ in range(2))


def extreme(dtypes: Dtypes, device: torch.device) -> Inputs:
    """Rows of all sizes, of equal values, far from zero, and with a first value that is; channels without scale."""
    x, scale, shift = plain((67, 190), (FP32, FP32), device)
    far = 1000 + x[2]
    least, most = (-6, 3) if dtypes[0] == FP16 else (-30, 15)
    x *= torch.logspace(least, most, 67, device=device)[:, None]
    x[::5] = x[::5, :1]
    x[1], x[2] = 0, far
    x[3:5, 0] = 1000
    scale[:, 1::3], shift[:, ::2] = -1, 0
    return x.to(dtypes[0]), scale.to(dtypes[1]), shift.to(dtypes[1])


def gated(shape: Shape, dtypes: Dtypes, device: torch.device) -> Inputs:
    """update, gate, residual, scale and shift. The sum is a number of every dtype, so that fp64 norms the same tokens:
    updates and gates are in fourths and residuals in sixteenths, and no sum is above 16, which bf16 holds in 8 bits.
    """
    x, scale, shift = plain(shape, (FP32, dtypes[1]), device)
    residual = (x * 16).round().clamp(-160, 160) / 16
    update = (x.flip(0, 1) * 8).round().clamp(-24, 24) / 4
    gate = (scale.float() * 12).round().clamp(-4, 4) / 4
    return update.to(dtypes[1]), gate.to(dtypes[1]), residual.to(dtypes[0]), scale, shift


def extreme_gated(dtypes: Dtypes, device: torch.device) -> Inputs:
    """Extreme rows with an update of 0, so that here too the sum is exact."""
    x, scale, shift = extreme(dtypes, device)
    return torch.zeros_like(x, dtype=dtypes[1]), torch.ones_like(scale), x, scale, shift


def case(shape: Shape, dtypes: Dtypes, is_gated: bool, fp8: bool) -> Case:
    (tokens, width), (row_dtype, channel_dtype) = shape, dtypes
    name = f"{tokens}x{width} {spelled(dtypes)}"
    values = tokens * width
    read = values * row_dtype.itemsize + 2 * width * channel_dtype.itemsize
    written = values + 4 * tokens if fp8 else values * row_dtype.itemsize
    if is_gated:
        read += (values + width) * channel_dtype.itemsize
        written += values * row_dtype.itemsize
    return Case(name, partial(gated if is_gated else plain, shape, dtypes), read + written, 0)  # no product of matrices


def spelled(dtypes: Dtypes) -> str:
    return " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def row(
    name: str,
    definition: Callable[..., Result],
    launcher: Callable[..., Result],
    values: Callable[[Result], Tensor],
    *,
    is_gated: bool = False,
    fp8: bool = False,
) -> Op:
    made = partial(case, is_gated=is_gated, fp8=fp8)
    inputs = extreme_gated if is_gated else extreme
    extremes = (Case(f"extreme {spelled(dtypes)}", partial(inputs, dtypes), 0, 0) for dtypes in ALL_DTYPES)
    return Op(
        name,
        reference=definition,
        launcher=launcher,
        exact=tokens_and_norm if is_gated else reference.normed,
        values=values,
        tolerance=dict.fromkeys((*TOLERANCE, torch.float8_e4m3fn), CODES) if fp8 else TOLERANCE,
        awkward=(*(made(*one) for one in product(AWKWARD_SHAPES, ALL_DTYPES)), *extremes),
        ours={
            "cuda": tuple(made(shape, (BF16, BF16)) for shape in MODEL_SHAPES),
            "cpu": (made(SMALL_SHAPE, (FP32, FP32)),),
        },
        takes_memory=False,
        has_compiled_rival=True,
    )


def tokens_and_norm(update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Both results of the gated ops, one above the other: [2 T, D]."""
    tokens = reference.summed(update, gate, residual)
    return torch.cat([tokens, reference.normed(tokens, scale, shift)])


def whole(result: Result) -> Tensor:
    return result.double() if isinstance(result, Tensor) else torch.cat(result).double()


def dequantised(result: Result) -> Tensor:
    *tokens, codes, row_scale = result
    return torch.cat([*(each.double() for each in tokens), codes.double() * row_scale.double()])


NORMS: tuple[Op, ...] = (
    row("modulated_norm", reference.modulated_norm, launch.modulated_norm, whole),
    row("modulated_norm_fp8", reference.modulated_norm_fp8, launch.modulated_norm_fp8, dequantised, fp8=True),
    row("gated_norm", reference.gated_norm, launch.gated_norm, whole, is_gated=True),
    row("gated_norm_fp8", reference.gated_norm_fp8, launch.gated_norm_fp8, dequantised, is_gated=True, fp8=True),
)
