"""What lora_merge is: its only definition, in the plainest torch. Knows nothing of speed, memory or devices."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = 448.0  # of float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433)
LEAST_SCALE = 2.0**-126  # the smallest normal fp32: a row of zeros has a scale that can be divided by


def summed(base: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """S = base + up @ down in fp32, or in fp64 where the base is: [out, in], [out, R], [R, in] -> [out, in]."""
    wide = torch.promote_types(base.dtype, torch.float32)
    return base.to(wide) + up.to(wide) @ down.to(wide)


def merged(base: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W = round(S), [out, in] in the base's dtype."""
    return summed(base, up, down).to(base.dtype)


def merged_fp8(base: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max over the row of |S| / 448, [out, 1]; codes = round(S / scale), [out, in] in float8_e4m3fn."""
    sums = summed(base, up, down)
    scale = (sums.abs().amax(dim=1, keepdim=True) / LARGEST_CODE).clamp(min=LEAST_SCALE)
    return (sums / scale).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn), scale.float()
