"""The table of all ops, one row each: what the tests and the benchmark read. Knows no kernels."""

from __future__ import annotations

from kontextd_kernels.fp8_linear.rows import FP8_LINEAR, QUANTISED_GELU, QUANTISED_ROWS
from kontextd_kernels.lora_merge.rows import MERGED, MERGED_FP8
from kontextd_kernels.modulated_norm.rows import NORMS
from kontextd_kernels.op import Op
from kontextd_kernels.qk_norm_rope.rows import NORMED_ROTATED, PAIR_NORMED_ROTATED

OPS: tuple[Op, ...] = (
    MERGED,
    MERGED_FP8,
    FP8_LINEAR,
    QUANTISED_ROWS,
    QUANTISED_GELU,
    NORMED_ROTATED,
    PAIR_NORMED_ROTATED,
    *NORMS,
)
