"""How the Triton kernels of lora_merge are launched: blocks, grid, scratch. Checks nothing; imports triton.

    merge        reads base once, writes out once
    merge_fp8    reads base twice, writes codes once: every tile needs the peak of its whole rows

kernels/README.md says what else was thought of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
from torch import Tensor

from kontextd_kernels.lora_merge.kernel import merge_kernel, peak_kernel, quantise_kernel
from kontextd_kernels.lora_merge.reference import LARGEST_CODE, LEAST_SCALE


@dataclass(frozen=True)
class Blocks:
    """The tile of a program, [block_out, block_in], the ranks it takes at a time, its warps and pipeline stages."""

    block_out: int
    block_in: int
    block_rank: int
    num_warps: int
    num_stages: int
    maxnreg: int = 128  # of a thread: 4 and 2 tiles at a time on a multiprocessor of 65,536 registers
    enable_fp_fusion: bool = True  # said outright: what is meant by saying nothing changes in Triton 3.10


# Chosen for Hopper from the compiler's report (128 registers a thread are enough: tests/kernels) and from bytes: a tile
# reads R · (4 / block_in + 2 / block_out) bytes of factors from L2 for each weight, which itself costs 4 bytes of
# memory traffic. Many ranks want the larger tile, few more of them at a time. Not measured: kernels/bench.py --sweep.
FEW_RANKS = Blocks(block_out=64, block_in=128, block_rank=16, num_warps=4, num_stages=3)
MANY_RANKS = Blocks(block_out=128, block_in=128, block_rank=16, num_warps=8, num_stages=3)
FEW = 64


def blocks(rank: int) -> Blocks:
    return FEW_RANKS if rank <= FEW else MANY_RANKS


def merge(base: Tensor, up: Tensor, down: Tensor, out: Tensor, tiling: Blocks | None = None) -> None:
    """out = round(base + up @ down), [out, in]."""
    tiling = tiling or blocks(up.shape[1])
    with torch.cuda.device_of(base):
        merge_kernel[grid(base, tiling)](
            base, up, down, out, *base.shape, up.shape[1], *rows_apart(base, up, down, out), **vars(tiling)
        )


def merge_fp8(
    base: Tensor, up: Tensor, down: Tensor, codes: Tensor, scale: Tensor, tiling: Blocks | None = None
) -> None:
    """codes, [out, in], and scale, [out, 1], of base + up @ down."""
    tiling = tiling or blocks(up.shape[1])
    tiles = grid(base, tiling)
    peaks = torch.empty((tiles[0], base.shape[0]), dtype=torch.float32, device=base.device)
    sizes = (*base.shape, up.shape[1], *rows_apart(base, up, down))
    with torch.cuda.device_of(base):
        peak_kernel[tiles](base, up, down, peaks, *sizes, **vars(tiling))
        quantise_kernel[tiles](
            base,
            up,
            down,
            peaks,
            codes,
            scale,
            *sizes,
            *rows_apart(codes, scale),
            largest_code=LARGEST_CODE,
            least_scale=LEAST_SCALE,
            **vars(tiling),
        )


def grid(base: Tensor, tiling: Blocks) -> tuple[int, int]:
    """(tiles along in, tiles along out): neighbours read the same rows of `up`."""
    return triton.cdiv(base.shape[1], tiling.block_in), triton.cdiv(base.shape[0], tiling.block_out)


def rows_apart(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride(0) for tensor in tensors)
