"""Tensors in a poisoned neighbourhood: an op that reads beside its input gives inf or NaN, and writing there is seen.

The poison is infinity, and NaN where a dtype has none: a maximum may pass over NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MARGIN = 3  # columns before and after; odd, so that rows are not aligned
ROWS = 2  # above and below


def poisoned(tensor: Tensor) -> Tensor:
    """The same values inside a larger tensor of poison, each [i, ...] a row of it, and all of [columns] one row."""
    rows, columns = _rows_and_columns(tensor)
    poison = math.nan if tensor.itemsize == 1 else math.inf
    around = torch.full((rows + 2 * ROWS, columns + 2 * MARGIN), poison, device=tensor.device).to(tensor.dtype)
    inside = around[ROWS : ROWS + rows, MARGIN : MARGIN + columns]
    return inside.copy_(tensor.reshape(rows, columns)).view(tensor.shape)


def untouched(tensor: Tensor) -> bool:
    """Whether everything around a poisoned tensor is still poison."""
    rows, columns = _rows_and_columns(tensor)
    width = columns + 2 * MARGIN
    kept = ~tensor.as_strided((rows + 2 * ROWS, width), (width, 1), 0).float().isfinite()
    kept[ROWS : ROWS + rows, MARGIN : MARGIN + columns] = True
    return bool(kept.all())


def _rows_and_columns(tensor: Tensor) -> tuple[int, int]:
    return (1, len(tensor)) if tensor.dim() == 1 else (len(tensor), math.prod(tensor.shape[1:]))
