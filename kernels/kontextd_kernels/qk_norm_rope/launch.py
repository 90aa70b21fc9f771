"""The door to qk_norm_rope: checks what it is given and picks the way for the device.

Both are ops of torch, `kontextd::normed_rotated` and `kontextd::pair_normed_rotated`: its compiler does not look
inside, and may leave the number of tokens open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.device import FLOATS, goes_to_triton
from kontextd_kernels.qk_norm_rope import reference


def normed_rotated(heads: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float = 1e-6) -> Tensor:
    """Each head divided by its root mean square, times weight, and turned: [T, H, W] in the dtype of heads, contiguous.

    heads are [T, H, W] in bf16, fp16 or fp32, weight [W] in any of them, cosine and sine [T, W] in fp32, each angle
    repeated for both numbers of a pair of neighbours; W is even, T may be 0. Tokens may lie apart, as in a slice of a
    wider projection. Computed in fp32 and rounded once. ValueError says what does not fit. There is no gradient.
    """
    _check_heads("heads", heads, weight)
    _check_angles(cosine, sine, heads.shape[0], heads)
    made: Tensor = torch.ops.kontextd.normed_rotated(heads, weight, cosine, sine, eps)
    return made


def pair_normed_rotated(
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """As `normed_rotated`, of text and of the image behind it, each with its weight: [L + N, H, W], contiguous.

    text is [L, H, W] and image [N, H, W] in one dtype, cosine and sine are [L + N, W]; L or N may be 0.
    """
    _check_heads("text", text, text_weight)
    _check_heads("image", image, image_weight)
    if text.shape[1:] != image.shape[1:] or text.dtype != image.dtype or text.device != image.device:
        raise ValueError(
            f"text is {_spelled(text)} and image {_spelled(image)}; they may differ in their number of tokens alone"
        )
    if text_weight.dtype != image_weight.dtype:
        raise ValueError(f"text_weight is {text_weight.dtype} and image_weight {image_weight.dtype}; convert one first")
    _check_angles(cosine, sine, text.shape[0] + image.shape[0], image)
    given = text, image, text_weight, image_weight, cosine, sine, eps
    made: Tensor = torch.ops.kontextd.pair_normed_rotated(*given)
    return made


@torch.library.custom_op("kontextd::normed_rotated", mutates_args=())
def _normed_rotated(heads: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    if not goes_to_triton(heads):
        return reference.normed_rotated(heads, weight, cosine, sine, eps)
    from kontextd_kernels.qk_norm_rope.triton_way import norm_rotate

    out = _room_for(heads)
    norm_rotate(heads[:0], heads, weight, weight, cosine, sine, eps, out)
    return out


@torch.library.custom_op("kontextd::pair_normed_rotated", mutates_args=())
def _pair_normed_rotated(
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> Tensor:
    if not goes_to_triton(image):
        return reference.pair_normed_rotated(text, image, text_weight, image_weight, cosine, sine, eps)
    from kontextd_kernels.qk_norm_rope.triton_way import norm_rotate

    out = _room_for(text, image)
    norm_rotate(text, image, text_weight, image_weight, cosine, sine, eps, out)
    return out


def _room_for(*parts: Tensor) -> Tensor:
    """Memory for the heads of all parts, contiguous whatever they are."""
    return parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


# What a compiler is told of the results: their shapes, dtypes and devices.
_normed_rotated.register_fake(lambda heads, *_: _room_for(heads))
_pair_normed_rotated.register_fake(lambda text, image, *_: _room_for(text, image))


def _check_heads(name: str, heads: Tensor, weight: Tensor) -> None:
    if heads.dtype not in FLOATS or heads.dim() != 3 or 0 in heads.shape[1:] or heads.shape[2] % 2:
        raise ValueError(f"{name} is {_spelled(heads)}; it must be [T, H, W] in bf16, fp16 or fp32, W even")
    count, width = heads.shape[1:]
    if heads.stride(2) != 1 or (count > 1 and heads.stride(1) != width):
        raise ValueError(
            f"{name} is {_spelled(heads)}; the heads of a token must lie one behind the other: call .contiguous() first"
        )
    if weight.shape != (width,) or weight.dtype not in FLOATS or weight.stride(0) != 1 or weight.device != heads.device:
        raise ValueError(
            f"the weight of {name} is {_spelled(weight)}; "
            f"it must be [{width}], contiguous, in bf16, fp16 or fp32 on {heads.device}"
        )


def _check_angles(cosine: Tensor, sine: Tensor, tokens: int, heads: Tensor) -> None:
    shape = (tokens, heads.shape[2])
    for name, angles in (("cosine", cosine), ("sine", sine)):
        fits = angles.shape == shape and angles.dtype == torch.float32 and angles.device == heads.device
        if not fits or angles.stride(1) != 1:
            raise ValueError(
                f"{name} is {_spelled(angles)}; for these heads it must be {list(shape)} in fp32 on {heads.device}, "
                "each row contiguous"
            )


def _spelled(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"
