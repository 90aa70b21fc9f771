"""lora_merge into bfloat16 on a CPU that multiplies bfloat16 itself: one product, summed in fp32. Checks nothing.

Factors are cut in two as in kernel.py, here side by side: (high low high) @ (high high low), [out, 3R] @ [3R, in]; a
factor that is bfloat16 already has no low part. oneDNN adds the base to the fp32 sum and rounds once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Smaller products torch does not hand to oneDNN, and they take no time either way.
_LEAST_PRODUCTS = 2**16


def fits(base: Tensor, up: Tensor, out: Tensor) -> bool:
    is_large = base.numel() * up.shape[1] >= _LEAST_PRODUCTS
    return base.dtype == out.dtype == torch.bfloat16 and is_large and is_native()


@functools.cache
def is_native() -> bool:
    """Instructions for products of bfloat16 that add up in fp32: AVX512_BF16 or AMX, used through oneDNN."""
    has: dict[str, bool | int] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that we run on
    return torch.backends.mkldnn.is_available() and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def merge(base: Tensor, up: Tensor, down: Tensor, out: Tensor) -> None:
    """out = round(base + up @ down), [out, in]."""
    (up_high, up_low), (down_high, down_low) = _cut(up), _cut(down)
    ups, downs = [up_high], [down_high]
    if up_low is not None:
        ups.append(up_low)
        downs.append(down_high)
    if down_low is not None:
        ups.append(up_high)
        downs.append(down_low)
    torch.addmm(base, torch.cat(ups, dim=1), torch.cat(downs), out=out)


def _cut(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """high + low = factor but for 2^-17 of it; low is None where it would be zeros."""
    high = factor.bfloat16()
    return high, None if factor.dtype == torch.bfloat16 else (factor.float() - high.float()).bfloat16()
