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


def image_heads(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key (both normed) and value of tokens [1, L, D]: [1, L, heads, head width] each."""
    query, key, value = (_heads(attn, project(tokens)) for project in (attn.to_q, attn.to_k, attn.to_v))
    return attn.norm_q(query), attn.norm_k(key), value


def text_heads(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `image_heads`, through the projections that a double block has for text."""
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    query, key, value = (_heads(attn, project(tokens)) for project in projections)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def attend(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, kept: KeyValue | None, dot_product: DotProduct = native
) -> tuple[Tensor, KeyValue]:
    """Rotate query and key, and let the query look at key, value and what was `kept` of an earlier step.

    [1, L, heads, head width] each → [1, L, D], and the key and value of these tokens, ready to be kept.
    """
    made = KeyValue(rotated(key, rotary), value)
    looked_at = made if kept is None else made.followed_by(kept)
    mixed = dot_product(
        _heads_first(rotated(query, rotary)), _heads_first(looked_at.key), _heads_first(looked_at.value)
    )
    return mixed.permute(0, 2, 1, 3).flatten(2, 3), made


def rotated(heads: Tensor, rotary: Rotary) -> Tensor:
    """Each pair of neighbouring numbers turned by the angle of its token (RoFormer, Su et al. 2021), in float32."""
    cosine, sine = (angles[None, :, None, :] for angles in rotary)
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (heads.float() * cosine).add_(turned.float().mul_(sine)).to(heads.dtype)


def _heads_first(heads: Tensor) -> Tensor:
    return heads.permute(0, 2, 1, 3)


def _heads(attn: Attention, projected: Tensor) -> Tensor:
    heads: Tensor = projected.unflatten(-1, (-1, attn.head_dim))
    return heads
