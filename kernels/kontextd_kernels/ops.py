"""The table of all ops, one row each: what the tests and the benchmark read. Knows no kernels."""

from __future__ import annotations

from kontextd_kernels.lora_merge import rows
from kontextd_kernels.op import Op

OPS: tuple[Op, ...] = (rows.MERGED, rows.MERGED_FP8)
