"""How the Triton kernel of modulated_norm is launched: block, warps, strides. Checks nothing; imports triton."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
from torch import Tensor

from kontextd_kernels.lora_merge.reference import LARGEST_CODE, LEAST_SCALE
from kontextd_kernels.modulated_norm.kernel import norm_kernel


def norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    normed: Tensor,
    row_scale: Tensor | None = None,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    tokens: Tensor | None = None,
) -> None:
    """Writes normed [T, D]: in float8_e4m3fn with row_scale [T, 1]. With update and gate, tokens [T, D] are normed."""
    rows, width = x.shape
    block = block_of(width)
    with torch.cuda.device_of(x):
        norm_kernel[(rows,)](
            x,
            update,
            gate,
            scale,
            shift,
            tokens,
            normed,
            row_scale,
            width,
            eps,
            *(0 if tensor is None else tensor.stride(0) for tensor in (x, update, tokens, normed, row_scale)),
            largest_code=LARGEST_CODE,
            least_scale=LEAST_SCALE,
            block=block,
            num_warps=warps(block),
            enable_fp_fusion=True,  # said outright: what is meant by saying nothing changes in Triton 3.10
        )


def block_of(width: int) -> int:
    """The lanes of a program: the kernel promises the compiler at least 8 side by side."""
    return max(8, triton.next_power_of_2(width))  # type: ignore[no-any-return, unused-ignore]


def warps(block: int) -> int:
    """32 values a thread, so that 3072 of a block of 4096 are three wide loads for each of four warps.

    By the compiler's report for Hopper that takes 55 to 80 registers a thread, and 6 to 9 rows run at a time on a
    multiprocessor. Not measured.
    """
    return min(max(1, block // 1024), 32)
