"""The table of all ops, one row each: what the tests and the benchmark read. Knows no kernels."""

from __future__ import annotations

from kontextd_kernels.fp8_linear.rows import FP8_LINEAR
from kontextd_kernels.lora_merge.rows import MERGED, MERGED_FP8
from kontextd_kernels.op import Op

OPS: tuple[Op, ...] = (MERGED, MERGED_FP8, FP8_LINEAR)
