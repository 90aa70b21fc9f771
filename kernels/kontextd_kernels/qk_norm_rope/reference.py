"""What qk_norm_rope is: its only definition, in the plainest torch. Knows nothing of speed, memory or devices.

    n = x / √(mean of x² over W + eps) · weight                    of each head, x and n [W]
    out[2i], out[2i + 1] = n[2i] · cos − n[2i + 1] · sin, n[2i + 1] · cos + n[2i] · sin

RMSNorm is of Zhang and Sennrich 2019 (arXiv:1910.07467), the rotation of Su et al. 2021 (arXiv:2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor


def turned(heads: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float = 1e-6) -> Tensor:
    """The result before it is rounded: in fp32, or in fp64 where the heads are."""
    numbers = heads.to(torch.promote_types(heads.dtype, torch.float32))
    normed = numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + eps) * weight.to(numbers.dtype)
    real, imaginary = normed.unflatten(-1, (-1, 2)).unbind(-1)
    return normed * cosine[:, None] + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sine[:, None]


def pair_turned(
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """As `turned`, of text and of the image behind it."""
    own, behind = slice(len(text)), slice(len(text), None)
    of_text = turned(text, text_weight, cosine[own], sine[own], eps)
    return torch.cat([of_text, turned(image, image_weight, cosine[behind], sine[behind], eps)])


def normed_rotated(heads: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float = 1e-6) -> Tensor:
    """heads [T, H, W], weight [W], cosine and sine [T, W] -> [T, H, W] in the dtype of the heads."""
    return turned(heads, weight, cosine, sine, eps).to(heads.dtype)


def pair_normed_rotated(
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """text [L, H, W], image [N, H, W], weights [W], cosine and sine [L + N, W] -> [L + N, H, W] in their dtype."""
    return pair_turned(text, image, text_weight, image_weight, cosine, sine, eps).to(image.dtype)
