"""The Triton kernels of lora_merge, one tile of the weight a program. Know addresses and strides; check nothing.

    S = float32(base) + up @ down        base, S [out, in]; up [out, R]; down [R, in]

Rows may lie apart (`…_row` is their distance in elements), what is in a row may not. Every address is 64-bit and every
load and store is masked, so that any shape will do. Imported only where triton is, by `triton_way`.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]  # an optional package
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # typed only where triton is installed
def merge_kernel(
    base: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    rank: int,
    base_row: int,
    up_row: int,
    down_row: int,
    out_row: int,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    block_rank: tl.constexpr,
) -> None:
    """out = round(S)."""
    rows, columns = stretch(tl.program_id(1), block_out)[:, None], stretch(tl.program_id(0), block_in)[None, :]
    rows_inside, columns_inside = rows < out_features, columns < in_features
    dtype: tl.constexpr = out.dtype.element_ty
    sums = summed(
        base + rows * base_row + columns,
        up + rows * up_row,
        down + columns,
        down_row,
        rank,
        rows_inside,
        columns_inside,
        block_rank,
        dtype == tl.float32,
    )
    tl.store(out + rows * out_row + columns, sums.to(dtype), mask=rows_inside & columns_inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def peak_kernel(
    base: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    peaks: tl.tensor,
    out_features: int,
    in_features: int,
    rank: int,
    base_row: int,
    up_row: int,
    down_row: int,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    block_rank: tl.constexpr,
) -> None:
    """peaks[tile, row] = max of |S| over this tile of columns: [tiles, out], contiguous, fp32."""
    rows, columns = stretch(tl.program_id(1), block_out)[:, None], stretch(tl.program_id(0), block_in)[None, :]
    rows_inside = rows < out_features
    sums = summed(
        base + rows * base_row + columns,
        up + rows * up_row,
        down + columns,
        down_row,
        rank,
        rows_inside,
        columns < in_features,
        block_rank,
        False,
    )
    line = peaks + tl.program_id(0).to(tl.int64) * out_features
    tl.store(line + rows, tl.max(tl.abs(sums), axis=1, keep_dims=True), mask=rows_inside)  # S is 0 outside


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def quantise_kernel(
    base: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    peaks: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    out_features: int,
    in_features: int,
    rank: int,
    base_row: int,
    up_row: int,
    down_row: int,
    codes_row: int,
    scale_row: int,
    largest_code: tl.constexpr,
    least_scale: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    block_rank: tl.constexpr,
) -> None:
    """scale = max over `peaks` / largest_code; codes = round(S / scale).

    From the last tile to the first: what `peak_kernel` read last is still in the L2 cache.
    """
    tile_out, tile_in = tl.num_programs(1) - 1 - tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
    rows, columns = stretch(tile_out, block_out)[:, None], stretch(tile_in, block_in)[None, :]
    rows_inside, columns_inside = rows < out_features, columns < in_features
    row_scale = scale_of(peaks, out_features, tl.num_programs(0), rows, rows_inside, largest_code, least_scale)
    if tile_in == 0:
        tl.store(scale + rows * scale_row, row_scale, mask=rows_inside)
    sums = summed(
        base + rows * base_row + columns,
        up + rows * up_row,
        down + columns,
        down_row,
        rank,
        rows_inside,
        columns_inside,
        block_rank,
        False,
    )
    steps = tl.clamp(sums * (1.0 / row_scale), -largest_code, largest_code)
    tl.store(codes + rows * codes_row + columns, steps.to(tl.float8e4nv), mask=rows_inside & columns_inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def stretch(tile: tl.tensor, size: tl.constexpr) -> tl.tensor:
    """The indices of tile number `tile`: [size], 64-bit."""
    return tile.to(tl.int64) * size + tl.arange(0, size)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scale_of(
    peaks: tl.tensor,
    out_features: int,
    tiles: int,
    rows: tl.tensor,
    rows_inside: tl.tensor,
    largest_code: tl.constexpr,
    least_scale: tl.constexpr,
) -> tl.tensor:
    """The scale of each row, [rows, 1], from its peaks in all tiles of columns."""
    peak = tl.zeros(rows.shape, tl.float32)
    for tile in range(tiles):
        line = peaks + tl.cast(tile, tl.int64) * out_features
        peak = tl.maximum(peak, tl.load(line + rows, mask=rows_inside, other=0.0))
    return tl.maximum(peak / largest_code, least_scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def summed(
    base: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    down_row: int,
    rank: int,
    rows_inside: tl.tensor,
    columns_inside: tl.tensor,
    block_rank: tl.constexpr,
    whole: tl.constexpr,
) -> tl.tensor:
    """S of one tile, 0 outside the weight.

    `base` is the address of each weight of the tile, `up` of the first factor in each row, [rows, 1], `down` of the
    first in each column, [1, columns].
    """
    delta = tl.zeros(base.shape, tl.float32)
    for start in range(0, rank, block_rank):
        ranks = start + tl.arange(0, block_rank)
        left = tl.load(up + ranks[None, :], mask=rows_inside & (ranks < rank)[None, :], other=0.0)
        addresses = down + ranks[:, None].to(tl.int64) * down_row
        right = tl.load(addresses, mask=columns_inside & (ranks < rank)[:, None], other=0.0)
        delta = multiplied(left, right, delta, whole)
    # Loaded last: held during the loop, it takes a third more registers and leaves room for fewer tiles at a time.
    weights = tl.load(base, mask=rows_inside & columns_inside, other=0.0)
    return weights.to(tl.float32) + delta


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def multiplied(left: tl.tensor, right: tl.tensor, sums: tl.tensor, whole: tl.constexpr) -> tl.tensor:
    """sums + left @ right, on tensor cores unless `whole`.

    Products of two bf16 or of two fp16 are exact in fp32. Any other factor is cut in two, x ≈ high + low with both
    bf16, which loses 2^-17 of it; low · low is left out, at most 2^-16 of the product. `whole` multiplies in fp32, for
    results that are not rounded to 16 bits or less: it is many times slower.
    """
    if whole:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), sums, input_precision="ieee")
    if left.dtype == right.dtype and left.dtype != tl.float32:
        return tl.dot(left, right, sums)
    left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
    if left.dtype != tl.bfloat16:
        left_low = (left.to(tl.float32) - left_high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(left_low, right_high, sums)
    if right.dtype != tl.bfloat16:
        right_low = (right.to(tl.float32) - right_high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(left_high, right_low, sums)
    return tl.dot(left_high, right_high, sums)
