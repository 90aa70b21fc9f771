"""The door to lora_merge: checks what it is given, makes room for the result, and picks the way for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_kernels.device import FLOATS, goes_to_triton
from kontextd_kernels.lora_merge import bfloat16_way, plain


@torch.no_grad()
def merged(base: Tensor, up: Tensor, down: Tensor, out: Tensor | None = None) -> Tensor:
    """out = round(base + up @ down), summed in fp32 and rounded once.

    base and out are [out, in], up [out, R], down [R, in], each bf16, fp16 or fp32; rows may lie apart, what is in a
    row may not. `up` and `down` are the factors of all adapters side by side, strengths multiplied into `up`; R = 0
    gives the base itself. `out` may be a live weight, never memory of an input: the base stays pristine. ValueError
    says what does not fit. On CUDA it returns before the work is done, like any op of torch.
    """
    check_inputs(base, up, down)
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    check_output("out", out, base.shape, FLOATS, (base, up, down))
    if goes_to_triton(base):
        from kontextd_kernels.lora_merge.triton_way import merge

        merge(base, up, down, out)
    elif base.device.type == "cpu" and bfloat16_way.fits(base, up, out):
        bfloat16_way.merge(base, up, down, out)
    else:
        plain.merge(base, up, down, out)
    return out


@torch.no_grad()
def merged_fp8(
    base: Tensor, up: Tensor, down: Tensor, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(codes, scale): S = base + up @ down in fp32; scale = max over the row of |S| / 448; codes = round(S / scale).

    codes are [out, in] in float8_e4m3fn, scale [out, 1] in fp32; the rest is as for `merged`. S is never rounded to
    anything else between. On CUDA it needs compute capability 8.9.
    """
    check_inputs(base, up, down)
    if codes is None:
        codes = torch.empty(base.shape, dtype=torch.float8_e4m3fn, device=base.device)
    if scale is None:
        scale = torch.empty((base.shape[0], 1), dtype=torch.float32, device=base.device)
    check_output("codes", codes, base.shape, (torch.float8_e4m3fn,), (base, up, down, scale))
    check_output("scale", scale, torch.Size((base.shape[0], 1)), (torch.float32,), (base, up, down, codes))
    if goes_to_triton(base):
        from kontextd_kernels.lora_merge.triton_way import merge_fp8

        merge_fp8(base, up, down, codes, scale)
    else:
        plain.merge_fp8(base, up, down, codes, scale)
    return codes, scale


def check_inputs(base: Tensor, up: Tensor, down: Tensor) -> None:
    for name, tensor in (("base", base), ("up", up), ("down", down)):
        check_tensor(name, tensor, FLOATS, base.device)
    if base.numel() == 0:
        raise ValueError(f"base is empty, {list(base.shape)}: there is nothing to merge into")
    rank = up.shape[1]
    if up.shape[0] != base.shape[0] or down.shape != (rank, base.shape[1]):
        raise ValueError(
            f"up {list(up.shape)} @ down {list(down.shape)} does not fit base {list(base.shape)}: "
            "it takes up [out, R] and down [R, in] for a base [out, in]"
        )


def check_output(
    name: str, tensor: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...], others: tuple[Tensor, ...]
) -> None:
    check_tensor(name, tensor, dtypes, others[0].device)
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)} and must be {list(shape)}")
    if any(overlap(tensor, other) for other in others):
        raise ValueError(
            f"{name} shares memory with another argument; give it memory of its own. "
            "A base that was written to is no longer pristine, and every later merge would start from it."
        )


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype} and must be one of {', '.join(map(str, dtypes))}; convert it first")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and base on {device}; move one of them first")
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; "
            "it must have two dimensions, of which the last is contiguous: call .contiguous() first"
        )
    if tensor.shape[0] > 1 and tensor.numel() and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(f"the rows of {name} overlap, their stride is {tensor.stride(0)}; call .contiguous() first")


def overlap(one: Tensor, other: Tensor) -> bool:
    (start, stop), (other_start, other_stop) = span(one), span(other)
    return start < other_stop and other_start < stop


def span(tensor: Tensor) -> tuple[int, int]:
    """The bytes from the first element to the last: [start, stop)."""
    if tensor.numel() == 0:
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()
