"""Safetensors files, checked by their headers alone. Knows bytes, shards and tensor names; knows no torch.

Layout (safetensors, "Format"): 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data; the tensors cover the data without gap or overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kontextd_models.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_COPY_AGAIN = "Copy the file again."
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # whatever JSON may hold


@dataclass(frozen=True)
class TensorInfo:
    """`start` and `end` are bytes within the data of its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def check_weights(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """The tensors in `{stem}.safetensors`, or in the shards that `{stem}.safetensors.index.json` lists.

    Raises `ModelError` naming the file that is missing, cut off, or not what its header says.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    tensors: dict[str, TensorInfo] = {}
    if index.exists():
        tensors.update(_sharded(folder, index))
    if single.exists():  # beside an index either may be read, so both must be whole
        tensors.update(read_header(single))
    if tensors:
        return tensors
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds {pickles[0]} but no {single.name}: pickled weights are never read. "
            "Convert them to safetensors."
        )
    raise ModelError(f"{single} is missing, and so is {index.name}. Copy the model again, whole.")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name, once its header is sound and the file exactly as long as it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            header = opened.read(min(length, _MAX_HEADER_BYTES))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing. Copy the model again, whole.") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. Check its permissions.") from error
    if start == b"version ":  # of a Git LFS pointer: "version https://git-lfs.github.com/spec/v1"
        raise ModelError(f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull` in the model's folder.")
    if len(start) < 8 or len(header) < length:
        raise ModelError(f"{file} is truncated, or no safetensors file: {size} bytes, no whole header. {_COPY_AGAIN}")
    tensors = _parsed(file, header)
    _check_cover(file, tensors, size - 8 - length)
    return tensors


def _sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_shard: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            by_shard.setdefault(shard, []).append(name)
    except (OSError, *_MALFORMED) as error:
        raise ModelError(f"{index} holds no weight_map ({error}). {_COPY_AGAIN}") from error
    tensors: dict[str, TensorInfo] = {}
    for shard, names in by_shard.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index} lists {shard!r}; a shard is a .safetensors file beside its index.")
        found = read_header(folder / shard)
        missing = sorted(set(names) - found.keys())
        if missing:
            raise ModelError(f"{folder / shard} lacks {missing[0]}, which {index.name} says it holds. {_COPY_AGAIN}")
        tensors.update(found)
    return tensors


def _parsed(file: Path, header: bytes) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header)
        return {name: _tensor(entry) for name, entry in entries.items() if name != "__metadata__"}
    except _MALFORMED as error:
        raise ModelError(f"{file} has a safetensors header that makes no sense ({error}). {_COPY_AGAIN}") from error


def _tensor(entry: Mapping[str, object]) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"an entry is {entry}")
    start, end = offsets
    info = TensorInfo(dtype, tuple(int(side) for side in shape), int(start), int(end))
    if any(side < 0 for side in info.shape) or info.elements * _BITS[dtype] != 8 * (info.end - info.start):
        raise ValueError(f"{dtype} {shape} does not take the bytes {start} to {end}")
    return info


def _check_cover(file: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise ModelError(f"{file}: {name} begins at byte {tensor.start} of the data, not at {end}. {_COPY_AGAIN}")
        end = tensor.end
    if end != data_bytes:
        state = "truncated" if data_bytes < end else "longer than its header says"
        raise ModelError(f"{file} is {state}: {data_bytes} bytes of data where {end} are expected. {_COPY_AGAIN}")
