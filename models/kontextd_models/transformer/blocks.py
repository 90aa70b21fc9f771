"""The two kinds of FLUX block, written out over diffusers' modules. Knows weights and tokens; knows no steps.

To the bit what `FluxTransformerBlock` and `FluxSingleTransformerBlock` (diffusers 0.42) compute, but for float16's
clipping. What a layer has just made is written over in place, which rounds alike and spares memory. Tokens are in the
order text, output, reference; where the reference's keys are kept, its tokens are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from kontextd_models.transformer.attention import (
    DotProduct,
    KeyValue,
    Rotary,
    attend,
    image_heads,
    native,
    text_heads,
)
from kontextd_models.transformer.modulation import Block, modulated, parts

# What a way to run the blocks has to be: `double_block` and `single_block` below are one.
Double: TypeAlias = Callable[
    [Block, Tensor, Tensor, Tensor, Tensor, Rotary, KeyValue | None], tuple[Tensor, Tensor, KeyValue]
]
Single: TypeAlias = Callable[[Block, Tensor, Tensor, Rotary, KeyValue | None], tuple[Tensor, KeyValue]]


def double_block(
    block: Block,
    image: Tensor,
    text: Tensor,
    image_modulation: Tensor,
    text_modulation: Tensor,
    rotary: Rotary,
    kept: KeyValue | None,
    dot_product: DotProduct = native,
) -> tuple[Tensor, Tensor, KeyValue]:
    """Image [1, N, D] and text [1, L, D] with weights of their own, joined in attention; both, and their keys."""
    shift, scale, gate, *image_mlp = parts(image_modulation, 6)
    text_shift, text_scale, text_gate, *text_mlp = parts(text_modulation, 6)
    of_image = image_heads(block.attn, modulated(block.norm1.norm(image), scale, shift))
    of_text = text_heads(block.attn, modulated(block.norm1_context.norm(text), text_scale, text_shift))
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(of_text, of_image, strict=True))
    mixed, made = attend(query, key, value, rotary, kept, dot_product)
    text_mixed, image_mixed = mixed.split([text.shape[1], image.shape[1]], dim=1)
    image = block.attn.to_out[0](image_mixed.contiguous()).mul_(gate.unsqueeze(1)).add_(image)
    text = block.attn.to_add_out(text_mixed.contiguous()).mul_(text_gate.unsqueeze(1)).add_(text)
    image = _through_mlp(image, block.norm2, block.ff, *image_mlp)
    text = _through_mlp(text, block.norm2_context, block.ff_context, *text_mlp)
    return image, text, made


def single_block(
    block: Block,
    tokens: Tensor,
    modulation: Tensor,
    rotary: Rotary,
    kept: KeyValue | None,
    dot_product: DotProduct = native,
) -> tuple[Tensor, KeyValue]:
    """Text and image as one sequence [1, L + N, D], attention and MLP side by side; the sequence, and its keys."""
    shift, scale, gate = parts(modulation, 3)
    normed = modulated(block.norm.norm(tokens), scale, shift)
    hidden = block.act_mlp(block.proj_mlp(normed))
    mixed, made = attend(*image_heads(block.attn, normed), rotary, kept, dot_product)
    return block.proj_out(torch.cat([mixed, hidden], dim=2)).mul_(gate.unsqueeze(1)).add_(tokens), made


def _through_mlp(tokens: Tensor, norm: Block, mlp: Block, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    updated: Tensor = mlp(modulated(norm(tokens), scale, shift)).mul_(gate.unsqueeze(1)).add_(tokens)
    return updated
