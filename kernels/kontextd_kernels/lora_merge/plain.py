"""lora_merge in plain torch, for the CPU: a band of rows at a time, which stays in the cache. Checks nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kontextd_kernels.lora_merge.reference import LARGEST_CODE, LEAST_SCALE

# Fewer rows pack `down` anew too often, more fall out of the cache. Of 32 to 4096 rows, 256 were among the fastest for
# each of four shapes, on two busy cores with 32 MB of L3.
BAND_ROWS = 256


def merge(base: Tensor, up: Tensor, down: Tensor, out: Tensor) -> None:
    """out = round(base + up @ down), [out, in]."""
    for rows, sums in bands(base, up, down):
        out[rows] = sums


def merge_fp8(base: Tensor, up: Tensor, down: Tensor, codes: Tensor, scale: Tensor) -> None:
    """codes, [out, in], and scale, [out, 1], of base + up @ down."""
    for rows, sums in bands(base, up, down):
        low, high = sums.aminmax(dim=1, keepdim=True)  # in one read, and without a copy of magnitudes
        scale[rows] = (torch.maximum(high, -low) / LARGEST_CODE).clamp_(min=LEAST_SCALE)
        codes[rows] = sums.div_(scale[rows]).clamp_(-LARGEST_CODE, LARGEST_CODE)


def bands(base: Tensor, up: Tensor, down: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """S = base + up @ down in fp32, some rows at a time: (which rows, sums [rows, in]), valid until the next."""
    up, down = up.float(), down.float()
    scratch = torch.empty(min(BAND_ROWS, base.shape[0]), base.shape[1], dtype=torch.float32, device=base.device)
    for start in range(0, base.shape[0], BAND_ROWS):
        rows = slice(start, min(start + BAND_ROWS, base.shape[0]))
        sums = scratch[: rows.stop - start]
        yield rows, sums.copy_(base[rows]).addmm_(up[rows], down)
