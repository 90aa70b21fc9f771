"""What the header of a LoRA file says, in the model's own terms. Knows parameters and shapes; knows no tensors.

An `Entry` is one matrix of the file. A file may have one matrix where the model has several parameters (q, k and v in
one): its `parts` say which rows go where. Nothing else is ever split, so every form and every model size is covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kontextd_models.lora.layout import Parameter


class Kind(StrEnum):
    """How the delta ΔW [out, in] is written down. `tensors` of an entry has the slots named here."""

    LOW_RANK = "low-rank"  # "up" [out, r] @ "down" [r, in]
    LOKR = "LoKr"  # kron(w1, w2); "w1" or "w1_a" @ "w1_b"; "w2" or "w2_a" @ "w2_b"
    LOHA = "LoHa"  # ("w1_a" @ "w1_b") ⊙ ("w2_a" @ "w2_b")
    FULL = "full difference"  # "diff" [out, in] or [n]
    REPLACED = "replaced"  # "value" [out, in] or [n], which stands for the weight itself: ΔW = value − W


# Slots of an entry that are no part of its matrix.
BESIDE = frozenset({"alpha", "dora_scale", "bias"})


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of the file's matrix are those of `parameter` from its row `at` on."""

    parameter: Parameter
    start: int
    stop: int
    at: int = 0


@dataclass(frozen=True)
class Entry:
    """`tensors` maps slots to keys of the file: those of its kind, and those of `BESIDE` that it has.

    The delta is multiplied by alpha / r, or by alpha / √r where `rank_stabilised`; by 1 where there is no alpha. FULL
    and REPLACED never are. `alpha` is that of the file's metadata, for an entry without a tensor of its own for it.
    "bias" [out] is multiplied likewise and added to the biases at `bias_parts`, which are as `parts`.
    """

    kind: Kind
    tensors: Mapping[str, str]
    parts: tuple[Part, ...]
    alpha: float | None = None
    rank_stabilised: bool = False
    bias_parts: tuple[Part, ...] = ()

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """Every row that is changed."""
        return self.parts + self.bias_parts


@dataclass(frozen=True)
class Normalised:
    """All of a file's entries; the keys of tensors that no entry has; and what kinds of names it has."""

    entries: tuple[Entry, ...]
    unmatched: tuple[str, ...]
    dialects: tuple[str, ...]  # "diffusers", "kohya", …: sorted, one for most files
