"""What a block does around its products, by our kernels. Knows float8 layers; knows no order of blocks and no steps.

They round once where formulas in 16 bits round after every operation, and hand float8 layers rows that are quantised
from float32. Where a kernel has no GPU to run on, its reference does. The residual behind a block's last layer stays a
formula: what only reads and writes once is as fast from the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kontextd_kernels.fp8_linear import quantised_gelu, quantised_rows
from kontextd_kernels.modulated_norm import gated_norm, gated_norm_fp8, modulated_norm, modulated_norm_fp8
from kontextd_kernels.qk_norm_rope import normed_rotated, pair_normed_rotated
from torch import Tensor

from kontextd_models.execution.fp8 import Fp8Linear, Quantised
from kontextd_models.transformer.attention import Rotary
from kontextd_models.transformer.block_ops import BlockOps, Module, Rows


@dataclass(frozen=True)
class KernelOps(BlockOps):
    """As `BlockOps`, but for rounding. A batch holds one picture."""

    def normed(self, norm: Module, tokens: Tensor, scale: Tensor, shift: Tensor, reader: Module) -> Rows:
        if isinstance(reader, Fp8Linear):
            return Quantised(*modulated_norm_fp8(tokens[0], scale, shift, norm.eps), tokens.dtype)
        return modulated_norm(tokens[0], scale, shift, norm.eps)[None]

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
        given = update[0], gate, residual[0], scale, shift, norm.eps
        if isinstance(reader, Fp8Linear):
            tokens, codes, row_scale = gated_norm_fp8(*given)
            return tokens[None], Quantised(codes, row_scale, tokens.dtype)
        tokens, normed = gated_norm(*given)
        return tokens[None], normed[None]

    def turned(self, norm: Module, heads: Tensor, rotary: Rotary) -> Tensor:
        return normed_rotated(heads[0], norm.weight, *rotary, norm.eps)[None]

    def joined(self, norms: tuple[Module, Module], text: Tensor, image: Tensor, rotary: Rotary) -> Tensor:
        of_text, of_image = norms
        weights = of_text.weight, of_image.weight
        return pair_normed_rotated(text[0], image[0], *weights, *rotary, of_image.eps)[None]

    def projected(self, layer: Module, tokens: Tensor) -> Tensor:
        if not isinstance(layer, Fp8Linear):
            return super().projected(layer, tokens)
        return by_codes(layer, quantised_rows(tokens[0]), tokens.dtype)

    def through_mlp(self, mlp: Module, rows: Rows) -> Tensor:
        first, _, last = mlp.net  # a projection with GELU by tanh, a dropout, a projection
        if not isinstance(last, Fp8Linear):
            return super().through_mlp(mlp, rows)
        hidden = first.proj(rows)
        return by_codes(last, quantised_gelu(hidden[0]), hidden.dtype)

    def way_out(self, layer: Module, activation: Module, mixed: Tensor, hidden: Tensor) -> Tensor:
        if not isinstance(layer, Fp8Linear):
            return super().way_out(layer, activation, mixed, hidden)
        return by_codes(layer, quantised_gelu(hidden[0], mixed[0]), mixed.dtype)


def by_codes(layer: Fp8Linear, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """What a layer makes of codes and their scales: [1, L, out]."""
    made: Tensor = layer(Quantised(*rows, dtype))
    return made
