"""The Triton kernel of modulated_norm, one row a program. Knows addresses and strides; checks nothing.

    values = x, or round(x + gate · update) where there is an update        [D], in registers from here on
    N = (values − mean) / √(var + eps) · (1 + scale) + shift

Rows may lie apart (`…_row` is their distance in elements), what is in a row may not. Addresses of rows are 64-bit and
every load and store is masked, so that any shape will do. Imported only where triton is, by `triton_way`.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # typed only where triton is installed
def norm_kernel(
    x: tl.tensor,
    update: tl.tensor | None,
    gate: tl.tensor | None,
    scale: tl.tensor,
    shift: tl.tensor,
    tokens: tl.tensor | None,
    normed: tl.tensor,
    row_scale: tl.tensor | None,
    width: int,
    eps: float,
    x_row: int,
    update_row: int,
    tokens_row: int,
    normed_row: int,
    row_scale_row: int,
    largest_code: tl.constexpr,
    least_scale: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """normed = round(N), or the codes of N where there is memory for its `row_scale`; tokens = values where gated."""
    row = tl.program_id(0).to(tl.int64)
    # 8 side by side to a thread, 16 bytes of bf16. Codes alone would get 16, and change threads before they are stored.
    columns = tl.max_contiguous(tl.arange(0, block), 8)
    inside = columns < width
    x += row * x_row
    if update is not None:
        update += row * update_row
    values, first = summed(x, update, gate, columns, inside), summed(x, update, gate, 0, width > 0)
    if tokens is not None:
        tl.store(tokens + row * tokens_row + columns, values, mask=inside)

    shifted = tl.where(inside, values.to(tl.float32) - first.to(tl.float32), 0.0)
    centred = tl.where(inside, shifted - tl.sum(shifted) / width, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / width + eps)
    factor = 1 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    result = centred * inverse * factor + tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)

    if row_scale is not None:
        step = tl.maximum(tl.max(tl.abs(result)) / largest_code, least_scale)  # the result is 0 outside
        tl.store(row_scale + row * row_scale_row, step)
        result = tl.clamp(result * (1.0 / step), -largest_code, largest_code)
    tl.store(normed + row * normed_row + columns, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def summed(
    x: tl.tensor, update: tl.tensor | None, gate: tl.tensor | None, columns: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """x, or round(x + gate · update), in these columns of a row: in the dtype of x, 0 outside."""
    values = tl.load(x + columns, mask=inside, other=0.0)
    if update is not None:
        gates = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
        updates = tl.load(update + columns, mask=inside, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + gates * updates).to(x.dtype.element_ty)
    return values
