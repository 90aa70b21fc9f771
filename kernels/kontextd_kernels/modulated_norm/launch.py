"""The door to modulated_norm: checks what it is given, makes memory for the result, and picks the way for the device.

Each function is an op of torch, `torch.ops.kontextd.<its name>`, behind checks: a compiler does not look into it, and
takes any number of rows without compiling anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.device import FLOATS, goes_to_triton
from kontextd_kernels.modulated_norm import reference
from kontextd_kernels.modulated_norm.reference import EPS

WIDEST = 2**14  # a program of the kernel holds a row in registers, and no wider one fits


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """N = (x − mean) / √(var + eps) · (1 + scale) + shift, computed in fp32 and rounded once: [T, D] in x's dtype.

    x is [T, D] in bf16, fp16 or fp32; rows may lie apart, what is in a row may not. scale and shift are [D], or [1, D]
    as a model makes them for one image, in any of these dtypes. x may be up to 1e16, of which fp32 can add up the
    squares. ValueError says what does not fit. Results are in memory of their own.
    """
    check(eps, {"x": x}, {"scale": scale, "shift": shift})
    result: Tensor = torch.ops.kontextd.modulated_norm(x, scale, shift, eps)
    return result


def modulated_norm_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(codes, row_scale) of N, unrounded: row_scale = max over the row of |N| / 448; codes = round(N / row_scale).

    codes are [T, D] in float8_e4m3fn, row_scale [T, 1] in fp32; the rest is as for `modulated_norm`. On CUDA it needs
    compute capability 8.9.
    """
    check(eps, {"x": x}, {"scale": scale, "shift": shift})
    result: tuple[Tensor, Tensor] = torch.ops.kontextd.modulated_norm_fp8(x, scale, shift, eps)
    return result


def gated_norm(
    update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """tokens = round(residual + gate · update), and `modulated_norm` of these: both [T, D] in the residual's dtype.

    update and residual are as x is there, gate as scale and shift.
    """
    check(eps, {"residual": residual, "update": update}, {"gate": gate, "scale": scale, "shift": shift})
    result: tuple[Tensor, Tensor] = torch.ops.kontextd.gated_norm(update, gate, residual, scale, shift, eps)
    return result


def gated_norm_fp8(
    update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, codes, row_scale): tokens as of `gated_norm`, and `modulated_norm_fp8` of these."""
    check(eps, {"residual": residual, "update": update}, {"gate": gate, "scale": scale, "shift": shift})
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.kontextd.gated_norm_fp8(update, gate, residual, scale, shift, eps)
    return result


@torch.library.custom_op("kontextd::modulated_norm", mutates_args=())
def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    if not fits_triton(x):
        return reference.modulated_norm(x, scale, shift, eps)
    from kontextd_kernels.modulated_norm.triton_way import norm

    normed = like(x)
    norm(x, scale, shift, eps, normed)
    return normed


@torch.library.custom_op("kontextd::modulated_norm_fp8", mutates_args=())
def _modulated_norm_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not fits_triton(x):
        return reference.modulated_norm_fp8(x, scale, shift, eps)
    from kontextd_kernels.modulated_norm.triton_way import norm

    codes, row_scale = like_fp8(x)
    norm(x, scale, shift, eps, codes, row_scale)
    return codes, row_scale


@torch.library.custom_op("kontextd::gated_norm", mutates_args=())
def _gated_norm(
    update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not fits_triton(residual):
        return reference.gated_norm(update, gate, residual, scale, shift, eps)
    from kontextd_kernels.modulated_norm.triton_way import norm

    tokens, normed = like(residual), like(residual)
    norm(residual, scale, shift, eps, normed, update=update, gate=gate, tokens=tokens)
    return tokens, normed


@torch.library.custom_op("kontextd::gated_norm_fp8", mutates_args=())
def _gated_norm_fp8(
    update: Tensor, gate: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not fits_triton(residual):
        return reference.gated_norm_fp8(update, gate, residual, scale, shift, eps)
    from kontextd_kernels.modulated_norm.triton_way import norm

    tokens, (codes, row_scale) = like(residual), like_fp8(residual)
    norm(residual, scale, shift, eps, codes, row_scale, update=update, gate=gate, tokens=tokens)
    return tokens, codes, row_scale


def like(x: Tensor) -> Tensor:
    """Memory for [T, D] in the dtype of x, contiguous whatever x is."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def like_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for codes [T, D] and their row_scale [T, 1]."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)


# What a compiler is told of the results: their shapes, dtypes and devices.
_modulated_norm.register_fake(lambda x, *_: like(x))
_modulated_norm_fp8.register_fake(lambda x, *_: like_fp8(x))
_gated_norm.register_fake(lambda update, gate, residual, *_: (like(residual), like(residual)))
_gated_norm_fp8.register_fake(lambda update, gate, residual, *_: (like(residual), *like_fp8(residual)))


def check(eps: float, rows: dict[str, Tensor], channels: dict[str, Tensor]) -> None:
    """Raises ValueError unless all rows are [T, D] and all channels [D] or [1, D], on one device."""
    (first, x), *_ = rows.items()
    if not eps > 0:
        raise ValueError(f"eps is {eps} and must be more than 0: a row of equal values has no deviation to divide by")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{first} is {list(x.shape)} and must be [T, D], neither of them 0")
    for name, tensor in rows.items():
        check_tensor(name, tensor, x.device)
        if tensor.shape != x.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} and {first} {list(x.shape)}; they must be alike")
    width = x.shape[1]
    for name, tensor in channels.items():
        check_tensor(name, tensor, x.device)
        if tensor.shape not in ((width,), (1, width)):
            raise ValueError(f"{name} is {list(tensor.shape)}; beside {first} {list(x.shape)} it must be [{width}]")


def check_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype} and must be one of {', '.join(map(str, FLOATS))}; convert it first")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the rows on {device}; move one of them first")
    if tensor.dim() == 0 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; "
            "the last dimension must be contiguous: call .contiguous() first"
        )


def fits_triton(x: Tensor) -> bool:
    return x.shape[1] <= WIDEST and goes_to_triton(x)
