"""Attention over tokens of one picture. Knows heads and rotary positions; knows no blocks and no steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# A FluxAttention. Any: diffusers' mixins hide from a checker that it is a module.
Attention: TypeAlias = Any
Rotary: TypeAlias = tuple[Tensor, Tensor]  # cosine and sine by position, [L, head width] each, float32
# Of query [1, heads, L, head width], key and value [1, heads, M, head width]: [1, heads, L, head width].
DotProduct: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query · keyᵀ / √width) · value, by what torch chooses: as diffusers does it."""
    return functional.scaled_dot_product_attention(query, key, value)


class KeyValue(NamedTuple):
    """Keys, normed and rotated, and values: [1, L, heads, head width] each."""

    key: Tensor
    value: Tensor

    def tail(self, start: int) -> KeyValue:
        """A copy of the tokens from `start` on: a view would hold all of them, and one stride of it tell how many."""
        key, value = (tensor[:, start:].clone(memory_format=torch.contiguous_format) for tensor in self)
        return KeyValue(key, value)

    def followed_by(self, other: KeyValue) -> KeyValue:
        return KeyValue(torch.cat([self.key, other.key], dim=1), torch.cat([self.value, other.value], dim=1))

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


def heads_of(attn: Attention, layer: Attention, rows: Any) -> Tensor:
    """What a layer projects from L tokens, as `attn` has its heads: [1, L, heads, head width]."""
    heads: Tensor = layer(rows).unflatten(-1, (-1, attn.head_dim))
    return heads


def attend(query: Tensor, made: KeyValue, kept: KeyValue | None, dot_product: DotProduct) -> Tensor:
    """Let the query look at keys and values that were just made, and at what was `kept` of an earlier step.

    [1, L, heads, head width], normed and rotated, → [1, L, D].
    """
    looked_at = made if kept is None else made.followed_by(kept)
    mixed = dot_product(_heads_first(query), _heads_first(looked_at.key), _heads_first(looked_at.value))
    return mixed.permute(0, 2, 1, 3).flatten(2, 3)


def rotated(heads: Tensor, rotary: Rotary) -> Tensor:
    """Each pair of neighbouring numbers turned by the angle of its token (RoFormer, Su et al. 2021), in float32."""
    cosine, sine = (angles[None, :, None, :] for angles in rotary)
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (heads.float() * cosine).add_(turned.float().mul_(sine)).to(heads.dtype)


def _heads_first(heads: Tensor) -> Tensor:
    return heads.permute(0, 2, 1, 3)
