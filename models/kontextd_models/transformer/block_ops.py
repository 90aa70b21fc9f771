"""What a block does around its products and attention, as formulas. Knows tokens, weights and heads; knows no steps.

`BlockOps` is diffusers' to the bit. Kernels take the place of its methods one by one (`execution/kernel_ops.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kontextd_models.transformer.attention import DotProduct, Rotary, native, rotated
from kontextd_models.transformer.modulation import modulated

# A module of diffusers or torch. Any: diffusers' mixins hide from a checker that they are modules.
Module: TypeAlias = Any
# Tokens [1, L, D], or whatever else a layer takes in their place.
Rows: TypeAlias = Any


@dataclass(frozen=True)
class BlockOps:
    """Tokens and their updates are [1, L, D], scale, shift and gate [1, D]. An `update` is written over."""

    dot_product: DotProduct = native

    def normed(self, norm: Module, tokens: Tensor, scale: Tensor, shift: Tensor, reader: Module) -> Rows:
        """Tokens normed, scaled and shifted, as `reader` and the layers like it take them."""
        return modulated(norm(tokens), scale, shift)

    def gated(self, update: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return update.mul_(gate.unsqueeze(1)).add_(residual)

    def gated_and_normed(
        self,
        update: Tensor,
        gate: Tensor,
        residual: Tensor,
        norm: Module,
        scale: Tensor,
        shift: Tensor,
        reader: Module,
    ) -> tuple[Tensor, Rows]:
        """The sum, and the sum as `normed` makes it."""
        tokens = self.gated(update, gate, residual)
        return tokens, self.normed(norm, tokens, scale, shift, reader)

    def turned(self, norm: Module, heads: Tensor, rotary: Rotary) -> Tensor:
        """Heads [1, L, heads, head width] normed, and rotated by their position."""
        return rotated(norm(heads), rotary)

    def joined(self, norms: tuple[Module, Module], text: Tensor, image: Tensor, rotary: Rotary) -> Tensor:
        """Heads of text and of image, each by its norm, one behind the other and rotated."""
        return rotated(torch.cat([norms[0](text), norms[1](image)], dim=1), rotary)

    def projected(self, layer: Module, tokens: Tensor) -> Tensor:
        made: Tensor = layer(tokens)
        return made

    def through_mlp(self, mlp: Module, rows: Rows) -> Tensor:
        made: Tensor = mlp(rows)
        return made

    def way_out(self, layer: Module, activation: Module, mixed: Tensor, hidden: Tensor) -> Tensor:
        """Out of a single block: what attention made, beside the MLP's channels [1, L, 4 D], not yet activated."""
        made: Tensor = layer(torch.cat([mixed, activation(hidden)], dim=2))
        return made
