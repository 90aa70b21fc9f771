"""What a model is and what is chosen for it on this machine, for people and for machines. Loads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kontextd_models.folder import ModelCard
from kontextd_models.limits import ModelLimits
from kontextd_models.records import EngineConfig, MemoryMode

if TYPE_CHECKING:
    import torch

    from kontextd_models.execution.planning import ExecutionPlan


class Chosen(Protocol):
    """What there is to say of a model, loaded or not: a `LoadedModel` has it too."""

    @property
    def folder(self) -> Path: ...
    @property
    def card(self) -> ModelCard: ...
    @property
    def limits(self) -> ModelLimits: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def memory_mode(self) -> MemoryMode: ...
    @property
    def memory_reason(self) -> str: ...
    @property
    def execution(self) -> ExecutionPlan: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Choice:
    """What loading a model now would choose."""

    folder: Path
    card: ModelCard
    limits: ModelLimits
    device: torch.device
    dtype: torch.dtype
    memory_mode: MemoryMode
    memory_reason: str
    execution: ExecutionPlan
    notes: tuple[str, ...]


def choice(config: EngineConfig) -> Choice:
    """What `load_engine` would choose, by the memory that is free now. In seconds, where loading takes a minute.

    Raises `ModelError` naming the file at fault, and `InvalidValue` for a setting that cannot be.
    """
    from kontextd_models.loading import plan_loading

    plan = plan_loading(config)
    mode, reason, execution = plan.memory_mode, plan.memory_reason, plan.execution
    folder, card = plan.source.path, plan.source.card
    return Choice(folder, card, plan.limits, plan.device, plan.dtype, mode, reason, execution, execution.notes)


def describe(model: Chosen) -> dict[str, object]:
    """The model's name and limits, and what is chosen for it on this machine, with reasons. Fit for JSON."""
    return {
        "name": model.card.name,
        "demonstration": model.card.demonstration,
        "instructions": list(model.card.instructions),
        "folder": str(model.folder),
        "limits": asdict(model.limits),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory_mode": model.memory_mode.value,
        "memory_reason": model.memory_reason,
        "precision": model.execution.precision,
        "compiled": model.execution.compiled,
        "notes": list(model.notes),
    }


def as_text(model: Chosen) -> str:
    """The same for people. A demonstration model says so, and lists what it knows."""
    limits, dtype = model.limits, str(model.dtype).removeprefix("torch.")
    lines = [
        f"model     {model.card.name}",
        f"folder    {model.folder}",
        f"device    {model.device}, {dtype}",
        f"memory    {model.memory_mode.value}: {model.memory_reason}",
        f"blocks    {', '.join(_ways(model.execution))}",
        f"sizes     {limits.min_area} to {limits.max_area} pixels, native {limits.native_area}, "
        f"aspect up to {limits.max_aspect:g}:1, sides from {limits.min_input_side} px",
    ]
    lines += [f"note      {note}" for note in model.notes]
    if model.card.demonstration:
        lines += ["", "This is a demonstration model. Any other prompt gives the photo back unchanged. It knows:"]
        lines += [f"  {instruction}" for instruction in model.card.instructions]
    return "\n".join(lines)


def _ways(execution: ExecutionPlan) -> tuple[str, ...]:
    attention = "fastest that is right" if execution.attention == "auto" else execution.attention
    compiled = "compiled" if execution.compiled else "not compiled"
    kernels = {"off": "no kernels", "on": "kernels", "auto": "kernels where they are faster"}[execution.kernels]
    return f"{execution.precision} precision", compiled, f"attention {attention}", kernels
