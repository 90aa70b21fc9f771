"""Puts the tensors of a file together to matrices of the model. Knows slots and modules; reads no values.

Every tensor is in exactly one entry, or in `unmatched`: a form that is not whole, or whole but not supported, is
unmatched with all its tensors, never read in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from kontextd_models.errors import LoraFileError
from kontextd_models.lora.dialects.metadata import AdapterConfig, configs
from kontextd_models.lora.dialects.names import Module, Names
from kontextd_models.lora.dialects.prefixes import dialect, readings
from kontextd_models.lora.dialects.suffixes import ALPHA, BIAS, DORA_SCALE, Slot, parsed
from kontextd_models.lora.entry import Entry, Kind, Normalised, Part
from kontextd_models.lora.layout import Component, Layout, Parameter
from kontextd_models.weight_files import TensorInfo

# The slots of each form that is whole.
_WHOLE: Mapping[Kind, tuple[frozenset[str], ...]] = {
    Kind.LOW_RANK: (frozenset({"up", "down"}),),
    Kind.LOKR: tuple(
        frozenset((*first, *second)) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
    ),
    Kind.LOHA: (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    Kind.FULL: (frozenset({"diff"}),),
    Kind.REPLACED: (frozenset({"value"}),),
}


@dataclass
class _Matrix:
    """The tensors of a file that belong to the same rows of the model. `name` is the module's, after the prefix."""

    name: str
    module: Module
    dialects: set[str] = field(default_factory=set)
    slots: dict[Slot, str] = field(default_factory=dict)

    def of_weight(self, kind: Kind) -> dict[str, str]:
        return {slot.name: key for slot, key in self.slots.items() if slot.kind is kind and not slot.of_bias}


def normalise(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], layout: Layout) -> Normalised:
    """The entries of a file with these tensors, in its order, for a model of this layout.

    Raises `LoraFileError` where the file spells a matrix twice, or its metadata makes no sense.
    """
    names, said = Names(layout), configs(metadata)
    entries: list[Entry] = []
    dialects: dict[bool, set[str]] = {True: set(), False: set()}
    for matrix in _matrices(tensors, names):
        found = list(_entries(matrix, said[matrix.module.component], names))
        entries += found
        if found:
            dialects[matrix.module.component is Component.TRANSFORMER] |= matrix.dialects
    if all(entry.kind is Kind.REPLACED for entry in entries):  # a checkpoint of the whole model has such tensors too
        return Normalised((), tuple(tensors), ())
    _check_spelled_once(entries)
    taken = {key for entry in entries for key in entry.tensors.values()}
    unmatched = tuple(key for key in tensors if key not in taken)
    # Text encoders have fewer spellings than trainers: they name a dialect only where the transformer does not.
    return Normalised(tuple(entries), unmatched, tuple(sorted(dialects[True] or dialects[False])))


def _matrices(keys: Iterable[str], names: Names) -> Iterable[_Matrix]:
    matrices: dict[tuple[Part, ...], _Matrix] = {}
    for key in keys:
        end = parsed(key)
        found = _module(end[0], names) if end else None
        if end is None or found is None:
            continue
        name, module, spoken = found
        matrix = matrices.setdefault(module.parts, _Matrix(name, module))
        other = matrix.slots.setdefault(end[1], key)
        if other != key:
            raise _twice(key, other, module.parts[0].parameter)
        matrix.dialects.add(spoken)
    return matrices.values()


def _module(name: str, names: Names) -> tuple[str, Module, str] | None:
    """The module's name without its prefix, the module, and the dialect."""
    for prefix, rest in readings(name):
        module = names.find(prefix.component, rest, flat=prefix.flat)
        if module:
            return rest, module, dialect(prefix, module.spelling)
    return None


def _entries(matrix: _Matrix, config: AdapterConfig, names: Names) -> Iterator[Entry]:
    whole = [kind for kind in Kind if frozenset(matrix.of_weight(kind)) in _WHOLE[kind]]
    if len(whole) > 1:
        first, second = (next(iter(matrix.of_weight(kind).values())) for kind in whole[:2])
        raise _twice(first, second, matrix.module.parts[0].parameter)
    biases = names.biases(matrix.module)
    if whole:
        yield _entry(matrix, whole[0], config, biases or ())
    bias = matrix.slots.get(Slot(Kind.FULL, "diff", of_bias=True))
    if bias and biases:
        yield Entry(Kind.FULL, {"diff": bias}, biases)


def _entry(matrix: _Matrix, kind: Kind, config: AdapterConfig, biases: tuple[Part, ...]) -> Entry:
    """A bias is taken only with a plain pair: peft has none with DoRA."""
    beside = {slot.name: matrix.slots[slot] for slot in (ALPHA, DORA_SCALE, BIAS) if slot in matrix.slots}
    if kind is not Kind.LOW_RANK or "dora_scale" in beside or not biases:
        beside.pop("bias", None)
    entry = Entry(
        kind,
        {**matrix.of_weight(kind), **beside},
        matrix.module.parts,
        bias_parts=biases if "bias" in beside else (),
    )
    if kind in (Kind.FULL, Kind.REPLACED) or "alpha" in beside:
        return entry
    return replace(entry, alpha=config.alpha_of(matrix.name), rank_stabilised=config.rank_stabilised)


def _check_spelled_once(entries: Iterable[Entry]) -> None:
    """No two entries change the same rows: the file has q, k and v in one and each by itself, say."""
    taken: dict[Parameter, list[tuple[int, int, str]]] = {}
    for entry in entries:
        for part in entry.all_parts:
            key = next(iter(entry.tensors.values()))
            taken.setdefault(part.parameter, []).append((part.at, part.at + part.stop - part.start, key))
    for parameter, rows in taken.items():
        rows.sort()
        for (_, stop, first), (start, _, second) in pairwise(rows):
            if start < stop:
                raise _twice(first, second, parameter)


def _twice(first: str, second: str, parameter: Parameter) -> LoraFileError:
    return LoraFileError(
        f"{first} and {second} are both for {parameter.name} of the {parameter.component.value}, and one of them has "
        "to be wrong. Keep the tensors of one trainer, and remove the others."
    )
