"""Safetensors files, checked by their headers alone. Knows bytes, shards and tensor names; knows no torch.

Layout (safetensors, "Format"): 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data; the tensors cover the data without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kontextd_models.errors import ModelError

LFS_POINTER = b"version https://git-lfs"  # how the small text begins that stands for a file in Git LFS
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_MAX_SIDES, _MAX_SIDE = 16, 2**48  # far over any tensor
_START_BYTES = 64  # enough to tell what a file is that is no safetensors file
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

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Header:
    """`raw`: the bytes before the data, the eight of the length included. `size_bytes`: of the whole file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    raw: bytes
    size_bytes: int


class HeaderFault(Exception):
    """Why a file is no sound safetensors file: words that follow its name. `start`: its first bytes."""

    start = b""


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
        with file.open("rb") as opened:
            return dict(header_of(opened).tensors)
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing. Copy the model again, whole.") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. Check its permissions.") from error
    except HeaderFault as fault:
        if fault.start.startswith(LFS_POINTER):
            message = f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull` in the model's folder."
            raise ModelError(message) from fault
        raise ModelError(f"{file}{fault}. {_COPY_AGAIN}") from fault


def header_of(opened: BinaryIO, max_bytes: int = _MAX_HEADER_BYTES, max_tensors: int | None = None) -> Header:
    """The header of a file that was just opened, once it is sound; then the file stands where its data begin.

    Reads `max_bytes` of it at most. Raises `HeaderFault`, and `OSError` as it is.
    """
    size = os.fstat(opened.fileno()).st_size
    start = opened.read(8)
    length = int.from_bytes(start, "little")
    text = opened.read(min(length, max_bytes))
    try:
        if len(start) < 8 or len(text) < length:
            raise HeaderFault(f" is truncated, or no safetensors file: {size} bytes, no whole header")
        tensors, metadata = _parsed(text, max_tensors)
        _check_cover(tensors, size - 8 - length)
    except HeaderFault as fault:
        fault.start = (start + text)[:_START_BYTES]
        raise
    return Header(tensors, metadata, start + text, size)


def clipped(text: str, limit: int = 200) -> str:
    """A text of a file as a message may hold it: printable, and not longer than `limit`."""
    short = text if len(text) <= limit else f"{text[:limit]}…"
    return short if short.isprintable() else ascii(short)[1:-1]


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


def _parsed(text: bytes, max_tensors: int | None) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(entries, dict):
            raise TypeError(f"a {type(entries).__name__}, not an object")
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("__metadata__ holds other things than texts")
        if max_tensors is not None and len(entries) > max_tensors:  # before it takes seconds to look at each
            raise HeaderFault(f" has {len(entries)} tensors; the most allowed is {max_tensors}")
        return {name: _tensor(entry) for name, entry in entries.items()}, metadata
    except _MALFORMED as error:
        raise HeaderFault(f" has a safetensors header that makes no sense ({clipped(str(error))})") from error


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:  # the format forbids it, and readers differ in which one they take
            raise ValueError(f"{clipped(name)} is there twice")
        found[name] = value
    return found


def _tensor(entry: Mapping[str, object]) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"an entry is {entry}")
    start, end = offsets
    if any(type(number) is not int for number in (*shape, start, end)):
        raise TypeError(f"shape {shape} and data_offsets {offsets} are not all whole numbers")
    if len(shape) > _MAX_SIDES or any(not 0 <= side < _MAX_SIDE for side in shape):  # before they are multiplied
        raise ValueError(f"shape {shape} is none")
    info = TensorInfo(dtype, tuple(shape), start, end)
    if info.elements * _BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{dtype} {shape} does not take the bytes {start} to {end}")
    return info


def _check_cover(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise HeaderFault(f": {clipped(name)} begins at byte {tensor.start} of the data, not at {end}")
        end = tensor.end
    if end != data_bytes:
        state = "truncated" if data_bytes < end else "longer than its header says"
        raise HeaderFault(f" is {state}: {data_bytes} bytes of data where {end} are expected")
