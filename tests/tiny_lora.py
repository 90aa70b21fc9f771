"""Writes small LoRA files for the tiny models, in diffusers' names. For tests only; knows no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

WIDTH = 32  # of the tiny transformer
MODULES = tuple(
    f"transformer.{name}"
    for name in (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.1.attn.to_v",
    )
)


def write(
    path: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    unknown: int = 0,
    width: int = WIDTH,
    trigger: str = "",
    modules: Sequence[str] = MODULES,
) -> Path:
    """A LoRA of `rank` on three matrices, with so many tensors more that no model has a place for."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = random.normal(0, 0.3, (rank, width))
        tensors[f"{module}.lora_B.weight"] = random.normal(0, 0.3, (width, rank))
    for number in range(unknown):
        tensors[f"transformer.no_such_block.{number}.lora_A.weight"] = random.normal(0, 0.3, (rank, width))
    path.write_bytes(_file({name: value.astype("<f4") for name, value in tensors.items()}, trigger))
    return path


def _file(tensors: Mapping[str, np.ndarray], trigger: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"modelspec.trigger_phrase": trigger}} if trigger else {}
    end = 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in tensors.values())
