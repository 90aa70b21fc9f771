"""How the Triton kernel of qk_norm_rope is launched: blocks and grid. Checks nothing; imports triton."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
from torch import Tensor

from kontextd_kernels.qk_norm_rope.kernel import norm_rotate_kernel

# FLUX has 24 heads of 128: a program holds a token's at 32 numbers a thread, of which 8 stand idle, in loads of 16
# bytes. Not measured.
LARGEST_BLOCK_HEADS = 32
NUM_WARPS = 4


def norm_rotate(
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """out [L + N, H, W], of which there may be no token of text."""
    tokens, heads, width = out.shape
    block_heads = min(triton.next_power_of_2(heads), LARGEST_BLOCK_HEADS)
    with torch.cuda.device_of(image):
        norm_rotate_kernel[(tokens, triton.cdiv(heads, block_heads))](
            text,
            image,
            text_weight,
            image_weight,
            cosine,
            sine,
            out,
            len(text),
            heads,
            width,
            *(tensor.stride(0) for tensor in (text, image, cosine, sine, out)),
            eps=eps,
            block_heads=block_heads,
            block_width=triton.next_power_of_2(width),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # said outright: what is meant by saying nothing changes in Triton 3.10
        )
