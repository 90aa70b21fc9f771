"""The Triton kernel that quantises rows to float8, one row a program. Knows addresses and strides; checks nothing.

    values = beside | gelu(hidden)                                     [T, D + M]; D or M may be 0
    scale = max over the row of |values| / largest_code; codes = round(values / scale)

A row is walked twice, a tile at a time: first for its peak, then for its codes, of what the first walk left in the
caches. Rows may lie apart (`…_row` is their distance in elements), what is in a row may not. Addresses of rows are
64-bit and every load and store is masked, so that any shape will do. Imported only where triton is, by `triton_way`.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # typed only where triton is installed
def quantise_rows_kernel(
    beside: tl.tensor,
    hidden: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    beside_columns: int,
    hidden_columns: int,
    beside_row: int,
    hidden_row: int,
    codes_row: int,
    scale_row: int,
    largest_code: tl.constexpr,
    least_scale: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """codes [T, D + M] and scale [T, 1].

    Where x is above 0 gelu grows with it, and below 0 it is never further from 0 than 0.1701: of a row with a larger
    value the peak is the gelu of the largest x, and gelu itself, of which special functions are the cost, is computed
    once for each value. Only rows of nothing but small values are walked for it once more.
    """
    row = tl.program_id(0).to(tl.int64)
    beside += row * beside_row
    hidden += row * hidden_row
    codes += row * codes_row

    largest = tl.zeros((block,), tl.float32)
    for start in range(0, beside_columns, block):
        largest = tl.maximum(largest, tl.abs(loaded(beside, start, beside_columns, block)))
    highest = tl.zeros((block,), tl.float32)
    for start in range(0, hidden_columns, block):
        highest = tl.maximum(highest, loaded(hidden, start, hidden_columns, block))
    peak = tl.maximum(tl.max(largest), gelu(tl.max(highest)))
    if peak < 0.1701:
        for start in range(0, hidden_columns, block):
            largest = tl.maximum(largest, tl.abs(gelu(loaded(hidden, start, hidden_columns, block))))
        peak = tl.max(largest)
    row_scale = tl.maximum(peak / largest_code, least_scale)
    tl.store(scale + row * scale_row, row_scale)

    for start in range(0, beside_columns, block):
        values = loaded(beside, start, beside_columns, block)
        store_codes(codes, values, 1.0 / row_scale, start, beside_columns, block)
    for start in range(0, hidden_columns, block):
        values = gelu(loaded(hidden, start, hidden_columns, block))
        store_codes(codes + beside_columns, values, 1.0 / row_scale, start, hidden_columns, block)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def loaded(row: tl.tensor, start: int, columns: int, block: tl.constexpr) -> tl.tensor:
    """A tile of a row: [block] in fp32, 0 behind its end."""
    at = start + tl.arange(0, block)
    return tl.load(row + at, mask=at < columns, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def gelu(x: tl.tensor) -> tl.tensor:
    """x / 2 · (1 + tanh(u)) with u = √(2 / π) · (x + 0.044715 x³) (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    (1 + tanh(u)) / 2 is 1 / (1 + exp(−2u)), which loses nothing where tanh is near −1.
    """
    exponent = x * (-2.302208198 - 0.1029432397 * x * x)  # −2u / ln 2
    return x * (1.0 / (1.0 + tl.exp2(exponent)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_codes(
    codes: tl.tensor, values: tl.tensor, inverse: tl.tensor, start: int, columns: int, block: tl.constexpr
) -> None:
    """A tile of a row, of which no value is larger than what becomes the largest code."""
    at = start + tl.arange(0, block)
    tl.store(codes + at, (values * inverse).to(tl.float8e4nv), mask=at < columns)
