"""A preset: a row of data. Knows names and ranges; knows no torch, no files and no steps of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class StepKind(StrEnum):
    """What runs at a step. The values are the characters of a mask."""

    FULL = "F"  # every token
    CACHED = "c"  # text and output tokens, against keys and values kept of the reference
    SKIPPED = "."  # nothing: the velocity is forecast


@dataclass(frozen=True)
class Guard:
    """Runs a step that was to be skipped where the forecast has just been off.

    After a step that ran, this one too: if ‖velocity − its forecast‖ > `residual` · ‖velocity‖, a skipped step that
    follows at once runs after all, at most `extra_steps` times an image.
    """

    residual: float
    extra_steps: int

    def __post_init__(self) -> None:
        if not 0 < self.residual < math.inf:
            raise ValueError(f"guard: residual is {self.residual!r}; it must be a finite number above 0.")
        if self.extra_steps < 1:
            raise ValueError(f"guard: extra_steps is {self.extra_steps!r}; it must be at least 1.")


@dataclass(frozen=True)
class Preset:
    """How a request's steps are carried out. The default is exact: every step, every token.

    `computed` is the share of the steps that run at all: the first `prefix` in full, the last one always, the others
    evenly between. With `reuse_reference` those after the prefix keep the reference's keys and values of the last full
    step, and `refreshes` of them run in full again. `masks` give the kinds outright for a number of steps. A skipped
    step takes the last velocity (`forecast_order` 0) or the line through the last two (1). `modulation_ahead` (of all
    steps in one pass) and `trim_last_block` (to the output's tokens, the only ones that are read behind it) leave out
    nothing, and change results by their rounding alone.
    """

    summary: str = ""
    computed: float = 1.0
    prefix: int = 1
    reuse_reference: bool = False
    refreshes: int = 0
    forecast_order: int = 1
    modulation_ahead: bool = False
    trim_last_block: bool = False
    guard: Guard | None = None
    masks: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not 0 < self.computed <= 1:
            raise ValueError(f"computed is {self.computed!r}; it must be above 0 and at most 1.")
        if self.prefix < 1:
            raise ValueError(f"prefix is {self.prefix!r}; it must be at least 1: nothing can be forecast of nothing.")
        if self.refreshes < 0:
            raise ValueError(f"refreshes is {self.refreshes!r}; it must be at least 0.")
        if self.forecast_order not in (0, 1):
            raise ValueError(f"forecast_order is {self.forecast_order!r}; it must be 0 or 1.")
        for steps, mask in self.masks.items():
            _check_mask(steps, mask)

    @property
    def is_exact(self) -> bool:
        """True where every step runs every token, whatever the number of steps."""
        return (
            self.computed == 1 and not self.reuse_reference and all(set(mask) == {"F"} for mask in self.masks.values())
        )


# Exact but for rounding: what every row may do that promises no bit.
SHORTCUTS = Preset(modulation_ahead=True, trim_last_block=True)


def _check_mask(steps: int, mask: str) -> None:
    where = f"masks: the mask for {steps} steps is {mask!r}"
    if steps < 1:
        raise ValueError(f"{where}; it must be for at least one step.")
    if len(mask) != steps:
        raise ValueError(f"{where}; it must have {steps} characters, and has {len(mask)}.")
    if unknown := set(mask) - set(StepKind):
        raise ValueError(f"{where}; it holds {', '.join(sorted(unknown))}, and may hold F, c and . only.")
    if mask[0] != StepKind.FULL:
        raise ValueError(f"{where}; its first step must be F: before it there is nothing to keep or to forecast from.")
    if mask[-1] == StepKind.SKIPPED:
        raise ValueError(f"{where}; its last step must run (F or c).")
