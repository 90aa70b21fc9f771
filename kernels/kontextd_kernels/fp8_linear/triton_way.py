"""How the Triton kernel that quantises rows is launched: tile and warps. Checks nothing; imports triton.

kernels/README.md says what else was thought of.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
from torch import Tensor

from kontextd_kernels.fp8_linear.kernel import quantise_rows_kernel
from kontextd_kernels.lora_merge.reference import LARGEST_CODE, LEAST_SCALE

LARGEST_BLOCK = 4096


def quantise(beside: Tensor, hidden: Tensor, codes: Tensor, scale: Tensor) -> None:
    """codes [T, D + M] and scale [T, 1] of beside [T, D] and gelu(hidden [T, M]); either may have no columns."""
    block, num_warps = tile(max(beside.shape[1], hidden.shape[1]))
    with torch.cuda.device_of(hidden):
        quantise_rows_kernel[(len(hidden),)](
            beside,
            hidden,
            codes,
            scale,
            beside.shape[1],
            hidden.shape[1],
            *(tensor.stride(0) for tensor in (beside, hidden, codes, scale)),
            largest_code=LARGEST_CODE,
            least_scale=LEAST_SCALE,
            block=block,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said outright: what is meant by saying nothing changes in Triton 3.10
        )


def tile(columns: int) -> tuple[int, int]:
    """Columns at a time, and warps: 16 values a thread, whose codes are one store of 16 bytes.

    By the compiler's report for Hopper that takes 48 registers a thread: of the widest tile five rows run at a time on
    a multiprocessor, and five of 15360 in bf16, 150 KB, stay in its L1 for the second walk. Not measured.
    """
    block = min(triton.next_power_of_2(columns), LARGEST_BLOCK)
    return block, max(1, block // 512)
