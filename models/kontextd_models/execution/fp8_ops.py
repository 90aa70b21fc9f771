"""What a block does around float8 products, as formulas that quantise rows once. Knows layers; knows no steps."""

from __future__ import annotations

from dataclasses import dataclass

from kontextd_kernels.fp8_linear.reference import quantised
from torch import Tensor

from kontextd_models.execution.fp8 import Fp8Linear, Quantised
from kontextd_models.transformer.block_ops import BlockOps, Module, Rows


@dataclass(frozen=True)
class Fp8Ops(BlockOps):
    """To the bit as `BlockOps`, where each layer quantises what it is handed: torch's compiler does not see that up to
    four layers do so with the same rows.
    """

    def normed(self, norm: Module, tokens: Tensor, scale: Tensor, shift: Tensor, reader: Module) -> Rows:
        rows = super().normed(norm, tokens, scale, shift, reader)
        return Quantised(*quantised(rows[0]), rows.dtype) if isinstance(reader, Fp8Linear) else rows
