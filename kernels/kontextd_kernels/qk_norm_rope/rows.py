"""The rows of qk_norm_rope in the table of ops: shapes, dtypes and error bounds. Knows no kernels."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from kontextd_kernels.op import Case, Inputs, Op, Result, Tolerance
from kontextd_kernels.qk_norm_rope import launch, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Shape = tuple[int, int, int, int]  # L, N, H, W: tokens of text and of image; the heads of one op are those of both

AWKWARD_SHAPES: tuple[Shape, ...] = (
    (0, 1, 1, 2),
    (1, 0, 3, 6),
    (2, 3, 33, 64),
    (5, 7, 24, 128),
    (33, 2, 3, 80),
    (1, 3, 2, 600),
)
ALL_DTYPES = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32), (FP32, BF16))  # of heads and of weights
# FLUX.1 Kontext at 1 MP + 1 MP: 512 tokens of text, 4096 of the output, 4096 of the reference; and a cached step.
MODEL_SHAPES: tuple[Shape, ...] = ((512, 8192, 24, 128), (512, 4096, 24, 128))
SMALL_SHAPE: Shape = (64, 192, 6, 32)

TINY = 2.0**-126  # a GPU may take what is smaller for zero
# A pair is turned, so neither of its products is more than √2 times its larger result. Each errs by the rounding of a
# mean of squares, a root and four products in fp32: 16 times 2⁻²⁴ of the largest of the head.
TURNED = 2.0**-20
TOLERANCE = {
    BF16: Tolerance(2.0**-8, TURNED, TINY, 0.0, "half a unit of 8 significant bits"),
    FP16: Tolerance(
        2.0**-11, TURNED, 2.0**-25, 0.0, "half a unit of 11 significant bits, or half of the smallest number"
    ),
    FP32: Tolerance(2.0**-24, TURNED, TINY, 0.0, "half a unit of 24 significant bits"),
}


def pair(shape: Shape, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> Inputs:
    """Text, image, their weights, cosine and sine: heads of sizes from 1e-5 to 1e4, one in nine of them all zeros."""
    text_tokens, image_tokens, count, width = shape
    tokens = text_tokens + image_tokens
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(1))
    heads = random(tokens * count, width) * torch.logspace(-5, 4, tokens * count, device=device).clamp(max=1e4)[:, None]
    heads[4::9] = 0
    text, image = heads.reshape(tokens, count, width).to(dtypes[0]).split([text_tokens, image_tokens])
    weights = ((1 + 0.3 * random(width)).to(dtypes[1]) for _ in range(2))
    angles = (random(tokens, width // 2) * 3).repeat_interleave(2, dim=1)
    return text, image, *weights, angles.cos(), angles.sin()


def alone(shape: Shape, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> Inputs:
    """The heads, weight and angles of `pair`, with the weight of the image."""
    text, image, _, weight, cosine, sine = pair(shape, dtypes, device)
    return torch.cat([text, image]), weight, cosine, sine


def case(shape: Shape, dtypes: tuple[torch.dtype, torch.dtype], is_pair: bool) -> Case:
    text_tokens, image_tokens, count, width = shape
    tokens = text_tokens + image_tokens
    of_tokens = f"{text_tokens}+{image_tokens}" if is_pair else f"{tokens}"
    name = f"{of_tokens}x{count}x{width} {' '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    weights = width * dtypes[1].itemsize * (2 if is_pair else 1)
    size_bytes = tokens * width * (2 * count * dtypes[0].itemsize + 2 * 4) + weights
    return Case(name, partial(pair if is_pair else alone, shape, dtypes), size_bytes, 0)  # no product of matrices


def values(result: Result) -> Tensor:
    assert isinstance(result, Tensor)
    return result.double()


def ours(is_pair: bool) -> dict[str, tuple[Case, ...]]:
    return {
        "cuda": tuple(case(shape, (BF16, BF16), is_pair) for shape in MODEL_SHAPES),
        "cpu": (case(SMALL_SHAPE, (FP32, FP32), is_pair),),
    }


NORMED_ROTATED = Op(
    "normed_rotated",
    reference=reference.normed_rotated,
    launcher=launch.normed_rotated,
    exact=reference.turned,
    values=values,
    tolerance=TOLERANCE,
    awkward=tuple(case(*one, is_pair=False) for one in product(AWKWARD_SHAPES, ALL_DTYPES)),
    ours=ours(is_pair=False),
    takes_memory=False,
    has_compiled_rival=True,
)
PAIR_NORMED_ROTATED = Op(
    "pair_normed_rotated",
    reference=reference.pair_normed_rotated,
    launcher=launch.pair_normed_rotated,
    exact=reference.pair_turned,
    values=values,
    tolerance=TOLERANCE,
    awkward=tuple(case(*one, is_pair=True) for one in product(AWKWARD_SHAPES, ALL_DTYPES)),
    ours=ours(is_pair=True),
    takes_memory=False,
    has_compiled_rival=True,
)
