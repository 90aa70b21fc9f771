"""Weights of sets that were merged before, so that such a set is a copy. Knows tensors and bytes; knows no forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kontextd_models.cache import ByteLRU
from kontextd_models.lora.layout import Parameter


@dataclass(frozen=True)
class MergedSet:
    """Every weight that the set changes, as it was written."""

    weights: Mapping[Parameter, Tensor]
    size_bytes: int


class MergedSets:
    """By the set's key, the least recently used ones forgotten first. A set over the budget is not copied at all."""

    def __init__(self, budget_bytes: int) -> None:
        self._sets = ByteLRU[MergedSet](budget_bytes)

    def get(self, key: str) -> Mapping[Parameter, Tensor]:
        """The weights of the set; none where it is not kept."""
        found = self._sets.get(key)
        return found.weights if found else {}

    def keep(self, key: str, weights: Mapping[Parameter, Tensor]) -> None:
        """Copies of the weights, where they lie."""
        size_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
        if size_bytes <= self._sets.budget_bytes:
            copies = {parameter: weight.detach().clone() for parameter, weight in weights.items()}
            self._sets.put(key, MergedSet(copies, size_bytes))

    def clear(self) -> None:
        """Forget all of them."""
        self._sets.clear()
