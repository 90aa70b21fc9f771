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

from kontextd_models.transformer.attention import KeyValue, Rotary, attend, heads_of
from kontextd_models.transformer.block_ops import BlockOps
from kontextd_models.transformer.modulation import Block, parts

# What a way to run the blocks has to be: the functions below are one.
Double: TypeAlias = Callable[
    [Block, Tensor, Tensor, Tensor, Tensor, Rotary, KeyValue | None], tuple[Tensor, Tensor, KeyValue]
]
Single: TypeAlias = Callable[[Block, Tensor, Tensor, Rotary, KeyValue | None], tuple[Tensor, KeyValue]]
LastSingle: TypeAlias = Callable[[Block, Tensor, Tensor, Rotary, KeyValue | None, int, Rotary], tuple[Tensor, KeyValue]]

FORMULAS = BlockOps()


def double_block(
    block: Block,
    image: Tensor,
    text: Tensor,
    image_modulation: Tensor,
    text_modulation: Tensor,
    rotary: Rotary,
    kept: KeyValue | None,
    ops: BlockOps = FORMULAS,
) -> tuple[Tensor, Tensor, KeyValue]:
    """Image [1, N, D] and text [1, L, D] with weights of their own, joined in attention; both, and their keys."""
    attn = block.attn
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts(image_modulation, 6)
    text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = parts(text_modulation, 6)
    of_image = ops.normed(block.norm1.norm, image, scale, shift, attn.to_q)
    of_text = ops.normed(block.norm1_context.norm, text, text_scale, text_shift, attn.add_q_proj)
    layers = ((attn.add_q_proj, attn.to_q), (attn.add_k_proj, attn.to_k), (attn.add_v_proj, attn.to_v))
    queries, keys, values = (
        (heads_of(attn, from_text, of_text), heads_of(attn, from_image, of_image)) for from_text, from_image in layers
    )
    query = ops.joined((attn.norm_added_q, attn.norm_q), *queries, rotary)
    made = KeyValue(ops.joined((attn.norm_added_k, attn.norm_k), *keys, rotary), torch.cat(values, dim=1))
    mixed = attend(query, made, kept, ops.dot_product)
    text_mixed, image_mixed = mixed.split([text.shape[1], image.shape[1]], dim=1)
    update = ops.projected(attn.to_out[0], image_mixed.contiguous())
    image, of_image = ops.gated_and_normed(update, gate, image, block.norm2, mlp_scale, mlp_shift, block.ff.net[0].proj)
    update = ops.projected(attn.to_add_out, text_mixed.contiguous())
    text, of_text = ops.gated_and_normed(
        update, text_gate, text, block.norm2_context, text_mlp_scale, text_mlp_shift, block.ff_context.net[0].proj
    )
    image = ops.gated(ops.through_mlp(block.ff, of_image), mlp_gate, image)
    text = ops.gated(ops.through_mlp(block.ff_context, of_text), text_mlp_gate, text)
    return image, text, made


def single_block(
    block: Block,
    tokens: Tensor,
    modulation: Tensor,
    rotary: Rotary,
    kept: KeyValue | None,
    ops: BlockOps = FORMULAS,
) -> tuple[Tensor, KeyValue]:
    """Text and image as one sequence [1, L + N, D], attention and MLP side by side; the sequence, and its keys."""
    attn = block.attn
    shift, scale, gate = parts(modulation, 3)
    rows = ops.normed(block.norm.norm, tokens, scale, shift, attn.to_q)
    hidden = block.proj_mlp(rows)
    query, key, value = (heads_of(attn, layer, rows) for layer in (attn.to_q, attn.to_k, attn.to_v))
    made = KeyValue(ops.turned(attn.norm_k, key, rotary), value)
    mixed = attend(ops.turned(attn.norm_q, query, rotary), made, kept, ops.dot_product)
    return ops.gated(ops.way_out(block.proj_out, block.act_mlp, mixed, hidden), gate, tokens), made


def last_single_block(
    block: Block,
    tokens: Tensor,
    modulation: Tensor,
    rotary: Rotary,
    kept: KeyValue | None,
    text_tokens: int,
    of_output: Rotary,
    ops: BlockOps = FORMULAS,
) -> tuple[Tensor, KeyValue]:
    """As `single_block`, of the output's tokens [1, N, D] alone: the others are looked at, and nobody reads them again.

    The output stands behind so many tokens of text; `of_output` is its part of the positions.
    """
    attn = block.attn
    output = slice(text_tokens, text_tokens + len(of_output[0]))
    shift, scale, gate = parts(modulation, 3)
    rows = ops.normed(block.norm.norm, tokens, scale, shift, attn.to_q)
    hidden = block.proj_mlp(rows[:, output])
    query = ops.turned(attn.norm_q, heads_of(attn, attn.to_q, rows[:, output]), of_output)
    key, value = (heads_of(attn, layer, rows) for layer in (attn.to_k, attn.to_v))
    made = KeyValue(ops.turned(attn.norm_k, key, rotary), value)
    mixed = attend(query, made, kept, ops.dot_product)
    return ops.gated(ops.way_out(block.proj_out, block.act_mlp, mixed, hidden), gate, tokens[:, output]), made
