"""What a delta is multiplied by, from alpha, rank and form. Knows one rule a form; knows no torch.

Low-rank and LoHa: alpha / r, or alpha / √r where rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732); 1 without
alpha. LoKr: likewise, with r of the product; with w1 and w2 both whole there is no r, and alpha is ignored. That is the
rule of LyCORIS (lycoris/modules/lokr.py: `use_w2 and use_w1` sets alpha to the rank) and of ComfyUI (comfy/
weight_adapter/lokr.py: alpha counts only where a product gave `dim`). A full difference is never scaled, and no value
that replaces a weight.
"""

from __future__ import annotations

import math
import struct

from kontextd_models.errors import LoraFileError
from kontextd_models.lora.entry import Entry, Kind

MAX_FACTOR = 1000.0  # alpha 1000 over rank 1; trainers make 0.004 (1/256) to 32
_FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


def factor_of(entry: Entry, alpha: float | None, rank: int | None, name: str) -> float:
    """By what the entry's delta is multiplied; `rank` None: its form has none. Raises `LoraFileError`."""
    if alpha is None or rank is None or entry.kind in (Kind.FULL, Kind.REPLACED):
        return 1.0
    factor = alpha / (math.sqrt(rank) if entry.rank_stabilised else rank)
    if not math.isfinite(factor) or factor == 0 or abs(factor) > MAX_FACTOR:
        raise LoraFileError(
            f"{name}: alpha {alpha:g} at rank {rank} multiplies {entry.parts[0].parameter.name} by {factor:g}; it must "
            f"not be 0, and {MAX_FACTOR:g} at most. Save it with the alpha it was trained with."
        )
    return factor


def number(dtype: str, raw: bytes) -> float:
    """The one number of a tensor, little-endian, of one of the dtypes that an alpha may have."""
    if dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if dtype == "F8_E5M2":  # the upper half of a float16
        return float(struct.unpack("<e", b"\0" + raw)[0])
    if dtype == "F8_E4M3":
        return _e4m3(raw[0])
    return float(struct.unpack("<" + _FORMATS[dtype], raw)[0])


def _e4m3(bits: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa, no infinities (arXiv:2209.05433)."""
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, bits >> 3 & 0xF, bits & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))
