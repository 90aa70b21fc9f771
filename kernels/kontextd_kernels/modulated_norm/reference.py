"""What modulated_norm is: its only definition, in the plainest torch. Knows nothing of speed, memory or devices.

    tokens = round(residual + gate · update)                              [T, D]; gate [D]
    N = (x − mean) / √(var + eps) · (1 + scale) + shift                   [T, D]; scale, shift [D]

N is LayerNorm (Ba et al. 2016) under the modulation of DiT's adaLN (Peebles and Xie 2023, arXiv:2212.09748). It is
rounded once, or quantised by the rule of `fp8_linear` unrounded. The norm of gated tokens is that of the rounded ones,
which are what the next block reads: (tokens, modulated_norm(tokens, …)) in two steps has the same bits.

A row is first taken relative to its first value: then equal values are 0 exactly, and rounding errs in units of the
deviation, whatever the mean (the shifted data of Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.fp8_linear.reference import quantised

EPS = 1e-6  # of FLUX.1's norms


def normed(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """N, [T, D], in fp32, or in fp64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shifted = x.to(wide) - x[:, :1].to(wide)
    centred = shifted - shifted.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    return centred * (variance + eps).rsqrt() * (1 + scale.to(wide)) + shift.to(wide)


def summed(update: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate · update, [T, D], in fp32, or in fp64 where the residual is."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    return residual.to(wide) + gate.to(wide) * update.to(wide)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """round(N) in the dtype of x."""
    return normed(x, scale, shift, eps).to(x.dtype)


def modulated_norm_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(codes [T, D], row_scale [T, 1]) of N."""
    return quantised(normed(x, scale, shift, eps))


def gated_norm(
    update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(tokens, round(N of tokens)), both in the dtype of the residual."""
    tokens = summed(update, gate, residual).to(residual.dtype)
    return tokens, modulated_norm(tokens, scale, shift, eps)


def gated_norm_fp8(
    update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens in the dtype of the residual, codes, row_scale)."""
    tokens = summed(update, gate, residual).to(residual.dtype)
    return tokens, *modulated_norm_fp8(tokens, scale, shift, eps)
