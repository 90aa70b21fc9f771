"""What a model is and what is chosen for it on this machine, for people and for machines. Loads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kontextd_models.embedded import embedded_model_dir
from kontextd_models.errors import InvalidValue
from kontextd_models.folder import ModelCard, check_folder
from kontextd_models.limits import ModelLimits
from kontextd_models.records import EngineConfig, MemoryMode

if TYPE_CHECKING:
    import torch


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


def choice(config: EngineConfig) -> Choice:
    """What `load_engine` would choose, by the memory that is free now. In seconds, where loading takes a minute.

    Raises `ModelError` naming the file at fault, and `InvalidValue` for a device or dtype that cannot be.
    """
    from kontextd_models import memory
    from kontextd_models.loading import pick_device, pick_dtype

    folder = check_folder(config.model or embedded_model_dir())
    limits = _under_ceiling(folder.card.limits, config.max_area)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    sizes = memory.sizes_of(folder, dtype.itemsize, limits.max_area)
    mode, reason = memory.choose(memory.free_bytes(device), sizes, device.type == "cuda", config.memory_mode)
    return Choice(folder.path, folder.card, limits, device, dtype, mode, reason)


def _under_ceiling(limits: ModelLimits, max_area: int | None) -> ModelLimits:
    try:
        return limits if max_area is None else replace(limits, max_area=max_area)
    except ValueError as error:
        raise InvalidValue(str(error), field="max_area") from error


def describe(model: Chosen) -> dict[str, object]:
    """The model's name and limits, and device, dtype and memory mode with the reason. Fit for JSON."""
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
    }


def as_text(model: Chosen) -> str:
    """The same for people. A demonstration model says so, and lists what it knows."""
    limits, dtype = model.limits, str(model.dtype).removeprefix("torch.")
    lines = [
        f"model     {model.card.name}",
        f"folder    {model.folder}",
        f"device    {model.device}, {dtype}",
        f"memory    {model.memory_mode.value}: {model.memory_reason}",
        f"sizes     {limits.min_area} to {limits.max_area} pixels, native {limits.native_area}, "
        f"aspect up to {limits.max_aspect:g}:1, sides from {limits.min_input_side} px",
    ]
    if model.card.demonstration:
        lines += ["", "This is a demonstration model. Any other prompt gives the photo back unchanged. It knows:"]
        lines += [f"  {instruction}" for instruction in model.card.instructions]
    return "\n".join(lines)
