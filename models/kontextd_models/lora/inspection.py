"""What a LoRA file is, and how much of it a model can use, for people. Knows headers and alphas; knows no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kontextd_models.errors import LoraError
from kontextd_models.lora.coverage import Coverage
from kontextd_models.lora.entry import Entry, Normalised
from kontextd_models.lora.factors import number
from kontextd_models.lora.file_checks import CheckedFile, open_checked
from kontextd_models.lora.layout import Layout
from kontextd_models.lora.matching import architecture_of, check, foreign_to, match
from kontextd_models.lora.metadata import Description, description_of
from kontextd_models.lora.shapes import NUMBERS, rank_of
from kontextd_models.records import LoraLimits


@dataclass(frozen=True)
class Ranks:
    lowest: int
    highest: int
    most_common: int


@dataclass(frozen=True)
class Inspection:
    """`problem`: why the model cannot use the file, as `read_adapter` would say; empty where its header shows none.

    `forms`, `modules` and `dtypes` count matrices by form, parameters by component, and tensors by dtype. `ranks` is
    None, and `alphas` are none, where the forms have none. `looks_like` is empty where something matches that is no
    other model's.
    """

    name: str
    sha256: str
    size_bytes: int
    dtypes: Mapping[str, int]
    coverage: Coverage
    forms: Mapping[str, int]
    dora_count: int
    ranks: Ranks | None
    alphas: tuple[float, ...]
    modules: Mapping[str, int]
    description: Description
    looks_like: str = ""
    problem: str = ""


def inspect(path: Path, layout: Layout, limits: LoraLimits, name: str = "") -> Inspection:
    """Look a file over; messages call it `name`. Reads it once, for its SHA-256, and keeps none of its matrices.

    Raises `LoraFileError` where it is no sound safetensors file. What does not fit the model is told, not raised.
    """
    with open_checked(path, limits, name) as file:
        normalised, coverage = match(file, layout)
        problem = _problem(file, normalised, layout, limits)
        entries = normalised.entries
        alphas, sha256 = _alphas(file, entries)
    ranks = Counter(rank for entry in entries if (rank := _rank(entry, file)) is not None)
    parameters = {part.parameter for entry in entries for part in entry.all_parts}
    return Inspection(
        name=file.name,
        sha256=sha256,
        size_bytes=file.size_bytes,
        dtypes=_counted(info.dtype for info in file.tensors.values()),
        coverage=coverage,
        forms=_counted(entry.kind.value for entry in entries),
        dora_count=sum("dora_scale" in entry.tensors for entry in entries),
        ranks=Ranks(min(ranks), max(ranks), ranks.most_common(1)[0][0]) if ranks else None,
        alphas=alphas,
        modules=_counted(parameter.component.value for parameter in parameters),
        description=description_of(file.metadata),
        looks_like=(foreign_to(file, normalised) or "") if entries else architecture_of(file),
        problem=problem,
    )


def _problem(file: CheckedFile, normalised: Normalised, layout: Layout, limits: LoraLimits) -> str:
    try:
        check(file, normalised, layout, limits)
    except LoraError as error:
        return str(error)
    return ""


def _rank(entry: Entry, file: CheckedFile) -> int | None:
    """None too for a tensor without sides, which `problem` tells of."""
    try:
        return rank_of(entry, file.tensors)
    except IndexError:
        return None


def _alphas(file: CheckedFile, entries: tuple[Entry, ...]) -> tuple[tuple[float, ...], str]:
    """The different alphas of the entries, ascending, and the SHA-256 of the file."""
    keys = {entry.tensors["alpha"] for entry in entries if "alpha" in entry.tensors}
    infos = {key: file.tensors[key] for key in keys}
    infos = {key: info for key, info in infos.items() if info.elements == 1 and info.dtype in NUMBERS}
    buffers = {key: memoryview(bytearray(info.end - info.start)) for key, info in infos.items()}
    sha256 = file.read_into(buffers)
    found = {number(infos[key].dtype, bytes(buffer)) for key, buffer in buffers.items()}
    found |= {entry.alpha for entry in entries if entry.alpha is not None and "alpha" not in entry.tensors}
    return tuple(sorted(found)), sha256


def _counted(values: Iterable[str]) -> Mapping[str, int]:
    return dict(sorted(Counter(values).items()))
