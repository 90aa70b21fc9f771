"""From a LoRA file to a checked `Adapter` in host memory. Knows files and forms; knows no weights of the model.

In stages, each of which refuses what the next must not see: the header, names → entries, shapes against the model's,
and only then tensors, read once and hashed as they are read. Memory: the tensors that are used, and one more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kontextd_models.errors import LoraFileError
from kontextd_models.lora.adapter import Adapter, Delta, Form, Full, LoHa, LoKr, LowRank, Replaced
from kontextd_models.lora.entry import BESIDE, Entry, Kind, Part
from kontextd_models.lora.factors import factor_of, number
from kontextd_models.lora.file_checks import CheckedFile, open_checked
from kontextd_models.lora.layout import Layout, Parameter
from kontextd_models.lora.matching import check, match
from kontextd_models.lora.shapes import Norm, norm_of, rank_of
from kontextd_models.records import LoraLimits
from kontextd_models.weight_files import TensorInfo

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Of an element of a factor, and of a delta. Weights are about 1; so no product and no sum comes near float32's end.
_MAX_VALUE = 1e6


def read_adapter(path: Path, layout: Layout, limits: LoraLimits, name: str = "") -> Adapter:
    """The file at `path`, whole, for the model of that layout; messages call it `name`.

    What the model has no place for is named in the adapter's coverage. Raises `LoraFileError` and `LoraMismatch`.
    """
    with open_checked(path, limits, name) as file:
        normalised, coverage = match(file, layout)
        check(file, normalised, layout, limits)
        tensors, alphas, key = _read(file, normalised.entries)
    peaks = {name: _peak(file.name, name, tensor) for name, tensor in tensors.items()}
    deltas: dict[Parameter, list[Delta]] = {}
    for entry in normalised.entries:
        alpha = alphas.get(entry.tensors.get("alpha", ""), entry.alpha)
        factor = factor_of(entry, alpha, rank_of(entry, file.tensors), file.name)
        _check_size(entry, factor, peaks, file)
        form, magnitude = _form(entry, tensors, factor), _magnitude(entry, tensors, file, layout)
        for part in entry.parts:
            deltas.setdefault(part.parameter, []).append(_delta(form, magnitude, part))
        for part in entry.bias_parts:
            bias = Full(tensors[entry.tensors["bias"]], factor)
            deltas.setdefault(part.parameter, []).append(_delta(bias, None, part))
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Adapter(key, {name: tuple(found) for name, found in deltas.items()}, coverage, size_bytes)


def _read(file: CheckedFile, entries: tuple[Entry, ...]) -> tuple[dict[str, Tensor], dict[str, float], str]:
    """The tensors that entries name, the alphas among them as numbers, and the SHA-256 of the file."""
    alphas = {entry.tensors["alpha"] for entry in entries if "alpha" in entry.tensors}
    wanted = {key for entry in entries for key in entry.tensors.values()}
    raw = {key: torch.empty(file.tensors[key].end - file.tensors[key].start, dtype=torch.uint8) for key in wanted}
    sha256 = file.read_into({key: tensor.numpy().data for key, tensor in raw.items()})
    tensors = {key: _typed(raw[key], file.tensors[key]) for key in sorted(wanted - alphas)}
    return tensors, {key: number(file.tensors[key].dtype, raw[key].numpy().tobytes()) for key in alphas}, sha256


def _typed(raw: Tensor, info: TensorInfo) -> Tensor:
    return raw.view(_DTYPES[info.dtype]).reshape(info.shape)


def _peak(file_name: str, name: str, tensor: Tensor) -> float:
    """The largest absolute value. Raises `LoraFileError` where one is NaN, infinite, or absurd."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch has no extremes of float8
    low, high = torch.aminmax(wide)  # NaN if there is one; 50 times as fast as isfinite on 128 MiB of bfloat16
    peak = max(abs(float(low)), abs(float(high)))
    if not peak <= _MAX_VALUE:  # nor a NaN
        worst = float(low if abs(low) > abs(high) else high)
        raise LoraFileError(
            f"{file_name}: {name} holds the value {worst:g}, where weights are about 1. "
            "The file is damaged, or its training failed; use an earlier checkpoint."
        )
    return peak


def _check_size(entry: Entry, factor: float, peaks: Mapping[str, float], file: CheckedFile) -> None:
    """No element of the delta can be absurdly large: a bound from the largest elements of its factors."""
    largest = {slot: peaks[key] for slot, key in entry.tensors.items() if slot != "alpha"}
    bound = abs(factor)
    for slot, key in entry.tensors.items():
        if slot in BESIDE:
            continue
        bound *= largest[slot]
        if slot in ("down", "w1_b", "w2_b"):  # a sum of r products
            bound *= file.tensors[key].shape[0]
    bound = max(bound, largest.get("dora_scale", 0.0), abs(factor) * largest.get("bias", 0.0))
    if not bound <= _MAX_VALUE:
        raise LoraFileError(
            f"{file.name} could change {entry.parts[0].parameter.name} by {bound:.3g}, where weights are about 1. "
            "The file is damaged, or its training failed."
        )


def _form(entry: Entry, tensors: Mapping[str, Tensor], factor: float) -> Form:
    of = {slot: tensors[key] for slot, key in entry.tensors.items() if slot != "alpha"}
    match entry.kind:
        case Kind.LOW_RANK:
            return LowRank(of["up"], of["down"], factor)
        case Kind.LOKR:
            return LoKr(_whole_or_product(of, "w1"), _whole_or_product(of, "w2"), factor)
        case Kind.LOHA:
            return LoHa((of["w1_a"], of["w1_b"]), (of["w2_a"], of["w2_b"]), factor)
        case Kind.FULL:
            return Full(of["diff"])
        case Kind.REPLACED:
            return Replaced(of["value"])


def _whole_or_product(of: Mapping[str, Tensor], slot: str) -> Tensor | tuple[Tensor, Tensor]:
    return of[slot] if slot in of else (of[f"{slot}_a"], of[f"{slot}_b"])


def _magnitude(entry: Entry, tensors: Mapping[str, Tensor], file: CheckedFile, layout: Layout) -> Tensor | None:
    """[out, 1] or [1, in]."""
    norm = norm_of(entry, file.tensors, layout, file.name)
    if norm is None:
        return None
    magnitude = tensors[entry.tensors["dora_scale"]]
    return magnitude.reshape(-1, 1) if norm is Norm.ROWS else magnitude


def _delta(form: Form, magnitude: Tensor | None, part: Part) -> Delta:
    """The rows of a part; the tensors stay views of the file's, so that what parts share is there once."""
    rows = slice(part.start, part.stop)
    if magnitude is not None and magnitude.shape[1] == 1:
        magnitude = magnitude[rows]
    match form:
        case LowRank(up, down, factor):
            return Delta(LowRank(up[rows], down, factor), 0, part.stop - part.start, part.at, magnitude)
        case Full(diff, factor):
            return Delta(Full(diff[rows], factor), 0, part.stop - part.start, part.at, magnitude)
        case Replaced(value):
            return Delta(Replaced(value[rows]), 0, part.stop - part.start, part.at, magnitude)
        case _:
            return Delta(form, part.start, part.stop, part.at, magnitude)
