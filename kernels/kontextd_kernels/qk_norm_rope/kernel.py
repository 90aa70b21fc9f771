"""The Triton kernel of qk_norm_rope, the heads of one token a program. Knows addresses; checks nothing.

    n = x / √(mean of x² over W + eps) · weight                    of each head, x and n [W]
    out[2i], out[2i + 1] = n[2i] · cos − n[2i + 1] · sin, n[2i + 1] · cos + n[2i] · sin

Tokens may lie apart (`…_token` is their distance in elements), heads of a token may not. The angles of a token are read
once for all its heads. Every address is 64-bit and every load and store is masked. Imported only where triton is.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # typed only where triton is installed
def norm_rotate_kernel(
    text: tl.tensor,
    image: tl.tensor,
    text_weight: tl.tensor,
    image_weight: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    out: tl.tensor,
    text_tokens: int,
    heads: int,
    width: int,
    text_token: int,
    image_token: int,
    cosine_token: int,
    sine_token: int,
    out_token: int,
    eps: tl.constexpr,
    block_heads: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """out [tokens, heads, width]: the text's tokens, then the image's."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * block_heads + tl.arange(0, block_heads)[:, None]
    column = tl.arange(0, block_width)[None, :]
    columns_inside = column < width
    inside = (head < heads) & columns_inside
    at = head * width + column
    if token < text_tokens:
        numbers = tl.load(text + token * text_token + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(text_weight + column, mask=columns_inside, other=0.0).to(tl.float32)
    else:
        numbers = tl.load(image + (token - text_tokens) * image_token + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(image_weight + column, mask=columns_inside, other=0.0).to(tl.float32)
    mean = tl.sum(numbers * numbers, axis=1, keep_dims=True) / width
    real, imaginary = tl.split(pairs(numbers * tl.rsqrt(mean + eps) * weight))
    cosines = tl.load(cosine + token * cosine_token + column, mask=columns_inside)
    sines = tl.load(sine + token * sine_token + column, mask=columns_inside)
    cosine_real, cosine_imaginary = tl.split(pairs(cosines))
    sine_real, sine_imaginary = tl.split(pairs(sines))
    turned = tl.join(
        real * cosine_real - imaginary * sine_real, imaginary * cosine_imaginary + real * sine_imaginary
    ).reshape(block_heads, block_width)
    tl.store(out + token * out_token + at, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def pairs(rows: tl.tensor) -> tl.tensor:
    """Neighbours in a row side by side: [rows, columns / 2, 2]."""
    return rows.reshape(rows.shape[0], rows.shape[1] // 2, 2)
