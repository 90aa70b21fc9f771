"""How much of a LoRA file the model has a place for. Plain values for logs, results and `kontextd lora inspect`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coverage:
    """`matched` of `total` tensors are used. `unmatched`: names of the others, in the file's words."""

    dialects: tuple[str, ...]
    matched: int
    total: int
    unmatched: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.matched == self.total
