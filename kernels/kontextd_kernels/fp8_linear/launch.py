"""The door to fp8_linear: checks what it is given and picks the way for the device. It can be compiled as it stands.

On CUDA from compute capability 8.9 on it is `torch._scaled_mm` with a scale a row, the one product of fp8 that torch
has: for bf16, and widths that are multiples of 16. Everywhere else it is the reference, which shows the numbers and
saves no time. fp8 tensor cores add up in about 14 bits between two additions in fp32, which is what `use_fast_accum`
leaves out: DeepSeek-V3 (arXiv:2412.19437, 3.3.2) found errors of up to 2 % of a result over K = 4096 without them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.fp8_linear import reference

_WIDTH = 16  # `_scaled_mm` takes multiples of 16 bytes
_FIRST_CAPABILITY = (8, 9)  # Ada and Hopper


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(codes_x @ codesᵀ) · scale_x · scaleᵀ + bias, x quantised row by row: [T, out] in the dtype of x.

    x is [T, in] in bf16, fp16 or fp32; codes [out, in] in float8_e4m3fn and scale [out, 1] in fp32 are what
    `lora_merge.merged_fp8` makes; bias is [out]. ValueError says what does not fit.
    """
    _check(x, codes, scale, bias)
    if _goes_to_scaled_mm(x, codes):
        codes_x, scale_x = reference.quantised(x)
        return torch._scaled_mm(
            codes_x.contiguous(),
            codes.t(),
            scale_a=scale_x,
            scale_b=scale.t(),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    return reference.fp8_linear(x, codes, scale, bias)


def multiplies_fp8(device_type: str, capability: tuple[int, int]) -> bool:
    """Whether a device of this kind and compute capability has tensor cores for fp8."""
    return device_type == "cuda" and capability >= _FIRST_CAPABILITY


def _goes_to_scaled_mm(x: Tensor, codes: Tensor) -> bool:
    fits = x.dtype == torch.bfloat16 and codes.shape[0] % _WIDTH == 0 and codes.shape[1] % _WIDTH == 0
    return fits and codes.is_contiguous() and x.is_cuda and multiplies_fp8("cuda", _capability(x.device))


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _check(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)} in {x.dtype}; it must be [T, in] in bf16, fp16 or fp32")
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(f"codes are {codes.dtype} and scale {scale.dtype}; they must be float8_e4m3fn and float32")
    if codes.dim() != 2 or codes.shape[1] != x.shape[1] or scale.shape != (codes.shape[0], 1):
        raise ValueError(
            f"codes {list(codes.shape)} with scale {list(scale.shape)} do not fit x {list(x.shape)}: "
            "it takes codes [out, in] and scale [out, 1] for x [T, in]"
        )
    if bias is not None and bias.shape != (codes.shape[0],):
        raise ValueError(f"bias is {list(bias.shape)}; for codes {list(codes.shape)} it must be [{codes.shape[0]}]")
