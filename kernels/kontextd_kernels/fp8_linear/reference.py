"""What fp8_linear is: its only definition, in the plainest torch. Knows nothing of speed, memory or devices.

    scale_x = max over the row of |x| / 448, [T, 1]; codes_x = round(x / scale_x)      float8_e4m3fn
    out = (codes_x @ codesᵀ) · scale_x · scaleᵀ + bias                                [T, out]

Summed in fp32 and rounded once. A product of two codes is exact in fp32. The rule for rows is that of `merged_fp8`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.lora_merge.reference import LARGEST_CODE, LEAST_SCALE


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [T, in], scale [T, 1] in fp32) of the rows of x."""
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_CODE).clamp(min=LEAST_SCALE)
    return (wide / scale).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn), scale


def summed(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The result before it is rounded: in fp32, or in fp64 where x is. Codes of x are those of fp32 in either."""
    wide = torch.promote_types(x.dtype, torch.float32)
    codes_x, scale_x = quantised(x)
    out = (codes_x.to(wide) @ codes.to(wide).T) * scale_x.to(wide) * scale.to(wide).T
    return out if bias is None else out + bias.to(wide)


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], codes [out, in], scale [out, 1], bias [out] -> [T, out] in the dtype of x."""
    return summed(x, codes, scale, bias).to(x.dtype)
