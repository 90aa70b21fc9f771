"""Whether the matrices of a LoRA file fit the model, from its header alone. Knows shapes and limits; reads no tensors.

A LoRA of another width is never padded or cut to fit: that would change the picture, and nobody would know why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kontextd_models.errors import LoraFileError, LoraMismatch
from kontextd_models.lora.entry import BESIDE, Entry, Kind, Part
from kontextd_models.lora.layout import Layout
from kontextd_models.records import LoraLimits
from kontextd_models.weight_files import TensorInfo

Shape = tuple[int, ...]
Tensors = Mapping[str, TensorInfo]

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
NUMBERS = FLOATS | {"I64", "I32", "I16", "U8", "I8"}  # alpha: LyCORIS saves a whole one as an integer

_INNER = ("down", "w2_b", "w1_b")  # the factors [r, in] of products


class Norm(Enum):
    """What the magnitude of a DoRA belongs to."""

    ROWS = auto()  # [out], of peft; [out, 1], of LyCORIS with wd_on_output
    COLUMNS = auto()  # [1, in], of LyCORIS without it


@dataclass(frozen=True)
class _Misfit:
    """A matrix that is not of the model's shape."""

    called: str
    theirs: Shape
    ours: Shape


def check_entries(entries: Sequence[Entry], tensors: Tensors, layout: Layout, limits: LoraLimits, name: str) -> None:
    """Every matrix has its parameter's shape, and every form is sound in itself; `name` is the file's, for messages.

    Raises `LoraMismatch` naming the parameter and both shapes, and `LoraFileError` for what fits no model.
    """
    misfits: list[_Misfit] = []
    for entry in entries:
        _check_dtypes(entry, tensors, name)
        misfit = _misfit(entry.parts, _shape(entry, tensors, name), layout)
        if misfit is None and entry.bias_parts:
            misfit = _misfit(entry.bias_parts, tensors[entry.tensors["bias"]].shape, layout)
        if misfit:
            misfits.append(misfit)
            continue
        _check_ranks(entry, tensors, limits, name)
        norm_of(entry, tensors, layout, name)
    if misfits:
        raise _mismatch(misfits, len(entries), name)


def rank_of(entry: Entry, tensors: Tensors) -> int | None:
    """The r that alpha is divided by; None where no factor of the form is a product.

    Two products of one entry with an alpha have the same, which `check_entries` saw to.
    """
    return next((tensors[entry.tensors[slot]].shape[0] for slot in _INNER if slot in entry.tensors), None)


def has_alpha(entry: Entry) -> bool:
    return "alpha" in entry.tensors or entry.alpha is not None


def norm_of(entry: Entry, tensors: Tensors, layout: Layout, name: str) -> Norm | None:
    """What the magnitude of an entry that fits is normed over; None without one. A square [n] is peft's, of rows."""
    key = entry.tensors.get("dora_scale")
    if key is None:
        return None
    ours, shape = _model_shape(entry.parts, layout), tensors[key].shape
    if len(ours) == 2 and shape in ((ours[0],), (ours[0], 1)):
        return Norm.ROWS
    if len(ours) != 2 or shape != (1, ours[1]):
        raise LoraMismatch(
            f"{name}: {key} has the shape {_text(shape)}; the magnitudes of {_called(entry.parts)}, {_text(ours)} in "
            "this model, are one a row or one a column. Use a LoRA that was trained for this model."
        )
    if len(entry.parts) > 1:
        raise LoraFileError(
            f"{name}: {key} holds magnitudes of columns over a matrix whose rows lie in {len(entry.parts)} places of "
            "this model, and each has norms of its own. Convert it to magnitudes of rows, or to a plain LoRA."
        )
    return Norm.COLUMNS


def _check_dtypes(entry: Entry, tensors: Tensors, name: str) -> None:
    for slot, key in entry.tensors.items():
        info = tensors[key]
        if info.dtype not in (NUMBERS if slot == "alpha" else FLOATS):
            raise LoraFileError(
                f"{name}: {key} is of dtype {info.dtype}. Save it as one of {', '.join(sorted(FLOATS))}."
            )
        if slot == "alpha" and info.elements != 1:
            raise LoraFileError(f"{name}: {key} has the shape {_text(info.shape)}; an alpha is one number.")


def _misfit(parts: Sequence[Part], theirs: Shape, layout: Layout) -> _Misfit | None:
    ours = _model_shape(parts, layout)
    for part in parts:
        rows, *columns = layout[part.parameter]
        if theirs != (ours[0], *columns) or part.at + part.stop - part.start > rows:
            return _Misfit(_called(parts), theirs, ours)
    return None


def _model_shape(parts: Sequence[Part], layout: Layout) -> Shape:
    """What the file's matrix must be like: as many rows as all its parts have, as wide as they are."""
    return (max(part.stop for part in parts), *layout[parts[0].parameter][1:])


def _check_ranks(entry: Entry, tensors: Tensors, limits: LoraLimits, name: str) -> None:
    ranks = {tensors[entry.tensors[slot]].shape[0] for slot in _INNER if slot in entry.tensors}
    if max(ranks, default=0) > limits.max_rank:
        raise LoraFileError(
            f"{name}: {_called(entry.parts)} has rank {max(ranks)}; the most allowed is {limits.max_rank}. "
            "Resize it to a lower rank, or raise the limit."
        )
    if len(ranks) > 1 and has_alpha(entry):
        raise LoraFileError(
            f"{name}: {_called(entry.parts)} is made of products of the ranks {' and '.join(map(str, sorted(ranks)))}, "
            "so it is not known which one its alpha is divided by. Save it with one rank."
        )


def _shape(entry: Entry, tensors: Tensors, name: str) -> Shape:
    """The shape of the matrix that the entry's tensors make. Raises `LoraFileError` where they make none."""
    shapes = {slot: tensors[key].shape for slot, key in entry.tensors.items() if slot not in BESIDE}
    try:
        found = _SHAPE_OF[entry.kind](shapes)
    except ValueError as error:
        every = ", ".join(f"{slot} {_text(shape)}" for slot, shape in shapes.items())
        raise LoraFileError(
            f"{name}: the parts of {_called(entry.parts)} do not make a matrix: {every}. Download it again, or train "
            "it anew."
        ) from error
    if 0 in found:
        raise LoraFileError(f"{name}: {_called(entry.parts)} has a side of 0: {_text(found)}. Download it again.")
    return found


def _product(left: Shape, right: Shape) -> Shape:
    (rows, rank), (rank_again, columns) = left, right
    if rank != rank_again or rank == 0:
        raise ValueError("the ranks differ")
    return rows, columns


def _low_rank(shapes: Mapping[str, Shape]) -> Shape:
    return _product(shapes["up"], shapes["down"])


def _loha(shapes: Mapping[str, Shape]) -> Shape:
    first, second = _product(shapes["w1_a"], shapes["w1_b"]), _product(shapes["w2_a"], shapes["w2_b"])
    if first != second:
        raise ValueError("the products differ")
    return first


def _lokr(shapes: Mapping[str, Shape]) -> Shape:
    (a, b), (c, d) = (
        shapes[whole] if whole in shapes else _product(shapes[f"{whole}_a"], shapes[f"{whole}_b"])
        for whole in ("w1", "w2")
    )
    return a * c, b * d


def _full(shapes: Mapping[str, Shape]) -> Shape:
    return shapes["diff"]


def _replaced(shapes: Mapping[str, Shape]) -> Shape:
    return shapes["value"]


_SHAPE_OF: Mapping[Kind, Callable[[Mapping[str, Shape]], Shape]] = {
    Kind.LOW_RANK: _low_rank,
    Kind.LOHA: _loha,
    Kind.LOKR: _lokr,
    Kind.FULL: _full,
    Kind.REPLACED: _replaced,
}


def _mismatch(misfits: list[_Misfit], total: int, name: str) -> LoraMismatch:
    first = misfits[0]
    shapes = f"{first.called} is {_text(first.ours)} in this model and {_text(first.theirs)} in the file"
    if len(misfits) == 1:
        return LoraMismatch(f"{name} does not fit: {shapes}. Use a LoRA that was trained for this model.")
    return LoraMismatch(
        f"{name} does not fit: {len(misfits)} of its {total} matrices have other shapes than this model's; {shapes}. "
        "It was made for a model of another size."
    )


def _called(parts: Sequence[Part]) -> str:
    return parts[0].parameter.name + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")


def _text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
