"""What fp8_linear is: its only definition, in the plainest torch. Knows nothing of speed, memory or devices.

    scale_x = max over the row of |x| / 448, [T, 1]; codes_x = round(x / scale_x)      float8_e4m3fn
    out = (codes_x @ codesᵀ) · scale_x · scaleᵀ + bias                                [T, out]

Summed in fp32 and rounded once. A product of two codes is exact in fp32. The rule for rows is that of `merged_fp8`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kontextd_kernels.lora_merge.reference import LARGEST_CODE, LEAST_SCALE


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [T, in], scale [T, 1] in fp32) of the rows of x."""
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_CODE).clamp(min=LEAST_SCALE)
    return (wide / scale).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn), scale


def activated(hidden: Tensor, beside: Tensor | None = None) -> Tensor:
    """[beside | gelu(hidden)], [T, D + M], in fp32, or in fp64 where hidden is; gelu by tanh (arXiv:1606.08415)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = functional.gelu(hidden.to(wide), approximate="tanh")
    return rows if beside is None else torch.cat([beside.to(wide), rows], dim=1)


def quantised_gelu(hidden: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """hidden [T, M], beside [T, D] -> (codes [T, D + M], scale [T, 1] in fp32)."""
    return quantised(activated(hidden, beside))


def product(
    codes_x: Tensor, scale_x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, wide: torch.dtype
) -> Tensor:
    """The result before it is rounded, in the dtype `wide`."""
    out = (codes_x.to(wide) @ codes.to(wide).T) * scale_x.to(wide) * scale.to(wide).T
    return out if bias is None else out + bias.to(wide)


def summed(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The result before it is rounded: in fp32, or in fp64 where x is. Codes of x are those of fp32 in either."""
    return product(*quantised(x), codes, scale, bias, torch.promote_types(x.dtype, torch.float32))


def quantised_linear(
    codes_x: Tensor, scale_x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """codes_x [T, in], scale_x [T, 1], codes [out, in], scale [out, 1], bias [out] -> [T, out] in `dtype`."""
    return product(codes_x, scale_x, codes, scale, bias, torch.float32).to(dtype)


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], codes [out, in], scale [out, 1], bias [out] -> [T, out] in the dtype of x."""
    return summed(x, codes, scale, bias).to(x.dtype)
