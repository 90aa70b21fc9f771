"""The door to fp8_linear: checks what it is given and picks the way for the device.

The product on CUDA from compute capability 8.9 on is `torch._scaled_mm` with a scale a row, the one product of fp8 that
torch has: for bf16, and widths that are multiples of 16. Everywhere else it is the reference, which shows the numbers
and saves no time. fp8 tensor cores add up in about 14 bits between two additions in fp32, which is what
`use_fast_accum` leaves out: DeepSeek-V3 (arXiv:2412.19437, 3.3.2) found errors of up to 2 % of a result over K = 4096
without them.

`fp8_linear` and `quantised_linear` can be compiled as they stand. `quantised_rows` and `quantised_gelu` are ops of
torch, `kontextd::` and their names: its compiler does not look inside, and may leave the number of tokens open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.device import FLOATS, goes_to_triton
from kontextd_kernels.fp8_linear import reference

_WIDTH = 16  # `_scaled_mm` takes multiples of 16 bytes
_FIRST_CAPABILITY = (8, 9)  # Ada and Hopper


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(codes_x @ codesᵀ) · scale_x · scaleᵀ + bias, x quantised row by row: [T, out] in the dtype of x.

    x is [T, in] in bf16, fp16 or fp32; codes [out, in] in float8_e4m3fn and scale [out, 1] in fp32 are what
    `lora_merge.merged_fp8` makes; bias is [out]. What quantises x is plain torch, which a compiler may fuse with what
    made x. ValueError says what does not fit.
    """
    _check_rows("x", x)
    _check_weight(x, codes, scale, bias)
    return _product(*reference.quantised(x), codes, scale, bias, x.dtype)


def quantised_linear(
    codes_x: Tensor, scale_x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of `fp8_linear` alone, of rows that are quantised: [T, out] in `dtype`: bf16, fp16 or fp32.

    codes_x [T, in] and scale_x [T, 1] are what `quantised_rows` and `quantised_gelu` make. ValueError says what does
    not fit.
    """
    is_fp8 = codes_x.dtype == torch.float8_e4m3fn and scale_x.dtype == torch.float32
    if not is_fp8 or codes_x.dim() != 2 or scale_x.shape != (codes_x.shape[0], 1):
        raise ValueError(
            f"codes_x are {list(codes_x.shape)} in {codes_x.dtype} and scale_x {list(scale_x.shape)} in "
            f"{scale_x.dtype}; they must be [T, in] in float8_e4m3fn and [T, 1] in float32"
        )
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; it must be bf16, fp16 or fp32")
    _check_weight(codes_x, codes, scale, bias)
    return _product(codes_x, scale_x, codes, scale, bias, dtype)


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale): scale = max over the row of |x| / 448, codes = round(x / scale). Both contiguous.

    x is [T, in] in bf16, fp16 or fp32, rows may lie apart; codes are [T, in] in float8_e4m3fn, scale is [T, 1] in fp32.
    T may be 0. ValueError says what does not fit. There is no gradient.
    """
    _check_rows("x", x)
    _check_layout("x", x)
    made: tuple[Tensor, Tensor] = torch.ops.kontextd.quantised_rows(x)
    return made


def quantised_gelu(hidden: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `quantised_rows` of [beside | gelu(hidden)], which is nowhere in memory: codes [T, D + M], scale [T, 1].

    hidden is [T, M] and beside [T, D], each bf16, fp16 or fp32; gelu is that by tanh, computed in fp32.
    """
    _check_rows("hidden", hidden)
    _check_layout("hidden", hidden)
    if beside is not None:
        _check_rows("beside", beside)
        _check_layout("beside", beside)
        if beside.shape[0] != hidden.shape[0] or beside.device != hidden.device:
            raise ValueError(
                f"beside is {list(beside.shape)} on {beside.device} and hidden {list(hidden.shape)} on "
                f"{hidden.device}; they must have as many rows, on one device"
            )
    made: tuple[Tensor, Tensor] = torch.ops.kontextd.quantised_gelu(hidden, beside)
    return made


def multiplies_fp8(device_type: str, capability: tuple[int, int]) -> bool:
    """Whether a device of this kind and compute capability has tensor cores for fp8."""
    return device_type == "cuda" and capability >= _FIRST_CAPABILITY


@torch.library.custom_op("kontextd::quantised_rows", mutates_args=())
def _quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if not _is_quantised_by_triton(x):
        return reference.quantised(x)
    from kontextd_kernels.fp8_linear.triton_way import quantise

    codes, scale = _room_for(x)
    quantise(x, x[:, :0], codes, scale)
    return codes, scale


@torch.library.custom_op("kontextd::quantised_gelu", mutates_args=())
def _quantised_gelu(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    if not _is_quantised_by_triton(hidden):
        return reference.quantised_gelu(hidden, beside)
    from kontextd_kernels.fp8_linear.triton_way import quantise

    codes, scale = _room_for(hidden, beside)
    quantise(hidden[:, :0] if beside is None else beside, hidden, codes, scale)
    return codes, scale


def _room_for(*parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Memory for codes and scale of rows that have these parts side by side."""
    there = [part for part in parts if part is not None]
    tokens, columns = there[0].shape[0], sum(part.shape[1] for part in there)
    codes = there[0].new_empty((tokens, columns), dtype=torch.float8_e4m3fn)
    return codes, codes.new_empty((tokens, 1), dtype=torch.float32)


# What a compiler is told of the results: their shapes, dtypes and devices.
_quantised_rows.register_fake(_room_for)
_quantised_gelu.register_fake(_room_for)


def _product(
    codes_x: Tensor, scale_x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not _goes_to_scaled_mm(codes, dtype):
        return reference.quantised_linear(codes_x, scale_x, codes, scale, bias, dtype)
    return torch._scaled_mm(
        codes_x.contiguous(),
        codes.t(),
        scale_a=scale_x,
        scale_b=scale.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _goes_to_scaled_mm(codes: Tensor, dtype: torch.dtype) -> bool:
    fits = dtype == torch.bfloat16 and codes.shape[0] % _WIDTH == 0 and codes.shape[1] % _WIDTH == 0
    return fits and codes.is_contiguous() and codes.is_cuda and multiplies_fp8("cuda", _capability(codes.device))


def _is_quantised_by_triton(x: Tensor) -> bool:
    return goes_to_triton(x) and multiplies_fp8("cuda", _capability(x.device))


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _check_rows(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS or x.dim() != 2:
        raise ValueError(f"{name} is {list(x.shape)} in {x.dtype}; it must be [T, in] in bf16, fp16 or fp32")


def _check_layout(name: str, x: Tensor) -> None:
    if x.shape[1] == 0 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} is {list(x.shape)} with strides {list(x.stride())}; "
            "a row must have columns, one behind the other: call .contiguous() first"
        )


def _check_weight(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(f"codes are {codes.dtype} and scale {scale.dtype}; they must be float8_e4m3fn and float32")
    if codes.dim() != 2 or codes.shape[1] != x.shape[1] or scale.shape != (codes.shape[0], 1):
        raise ValueError(
            f"codes {list(codes.shape)} with scale {list(scale.shape)} do not fit x {list(x.shape)}: "
            "it takes codes [out, in] and scale [out, 1] for x [T, in]"
        )
    if bias is not None and bias.shape != (codes.shape[0],):
        raise ValueError(f"bias is {list(bias.shape)}; for codes {list(codes.shape)} it must be [{codes.shape[0]}]")
