"""What is measured, in which process, within which time. Knows names and seconds; knows no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

STEPS = 28
LORAS = 3
DEADLINE_S = 520.0  # of all parts; the table, the plot and the processes' ends fit in what is left of nine minutes
START_BUDGET_S = 220.0  # of a process: import torch, make the weights, compile, with our kernels and without
LOG_FILE = "gpu.log"  # what the engine says of its choices
# Seconds on one H100: what the project promises itself (28 steps, 1 MP from 1 MP, LoRAs merged or not).
_GOALS = {"none bf16": 8.0, "none fp8": 5.8}
_GOALS_IN_ANY_PRECISION = {"regular": 2.7, "high": 1.6}


class Work(StrEnum):
    """What a part does: a function of `edits.py` or `others.py` each."""

    STOCK = "stock"  # diffusers' own pipeline
    EDIT = "edit"  # ours, with a preset
    SIZES = "sizes"
    TRACE = "trace"
    STAGES = "stages"


@dataclass(frozen=True)
class Part:
    """One thing to measure. Parts of a group share a process and its weights; `budget_s` is for a GPU."""

    group: str
    work: Work
    budget_s: float
    precision: str = "bf16"
    preset: str = ""
    loras: int = 0
    compiled: bool = False

    @property
    def name(self) -> str:
        loras = f", {self.loras} LoRAs" if self.loras else ""
        match self.work:
            case Work.STOCK:
                return f"stock diffusers, {'compiled' if self.compiled else 'eager'}{loras}"
            case Work.EDIT:
                return f"{self.preset} {self.precision}{loras}"
            case Work.STAGES:
                return "stages beside the steps"
        return f"{self.work.value} {self.precision}"

    @property
    def goal_s(self) -> float | None:
        return _GOALS_IN_ANY_PRECISION.get(self.preset) or _GOALS.get(f"{self.preset} {self.precision}")


@dataclass(frozen=True)
class Options:
    """How everything is measured. `tiny`: a model that shows on any CPU that all parts work, and nothing else."""

    device: str
    tiny: bool
    out: Path

    @property
    def judges_goals(self) -> bool:
        """They are for the full size on a GPU."""
        return not self.tiny and self.device != "cpu"


def all_parts() -> list[Part]:
    """Of each group, those worth most first, should time run out."""
    return [
        *(Part("stock", Work.STOCK, 60, loras=loras) for loras in (0, LORAS)),
        Part("stock", Work.STAGES, 40),
        *(Part("stock", Work.STOCK, 70, loras=loras, compiled=True) for loras in (0, LORAS)),
        *_ours("fp8"),
        *_ours("bf16"),
    ]


def _ours(precision: str) -> Iterator[Part]:
    group, presets = f"ours, {precision}", ("none", "regular", "high")
    for index, preset in enumerate(presets):
        yield Part(group, Work.EDIT, 100 if index == 0 else 60, precision, preset)  # the first one compiles
    yield Part(group, Work.TRACE, 30, precision)
    for preset in presets:
        yield Part(group, Work.EDIT, 40, precision, preset, LORAS)
    yield Part(group, Work.SIZES, 60, precision)
