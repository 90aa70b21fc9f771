"""From a checked model folder to a pipeline on a device. Knows the loaders of both libraries; knows no requests.

Always off-line: every loader is given a folder and told to look nowhere else. The classes are named here, not taken
from the folder, and weights are safetensors, so nothing that lies in the folder is ever run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from kontextd_models import memory
from kontextd_models.acceleration.table import PresetTable, presets_of
from kontextd_models.embedded import embedded_model_dir
from kontextd_models.encode import Pipeline
from kontextd_models.errors import InvalidValue
from kontextd_models.execution import fp8
from kontextd_models.execution.blocks import NATIVE, Blocks, open_blocks
from kontextd_models.execution.planning import (
    Device,
    ExecutionPlan,
    choose_precision,
    plan_execution,
    reuses_reference,
)
from kontextd_models.folder import ModelCard, ModelFolder, check_folder
from kontextd_models.limits import ModelLimits
from kontextd_models.lora.merging import Merger, open_merger
from kontextd_models.lora.pristine import Masters
from kontextd_models.pretrained import load_part, load_weights, quiet
from kontextd_models.records import EngineConfig, MemoryMode

log = logging.getLogger(__name__)

# Any: the loaders of both libraries are untyped.
_WITHOUT_WEIGHTS: Mapping[str, Any] = {
    "scheduler": FlowMatchEulerDiscreteScheduler,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": T5Tokenizer,
}
_WITH_WEIGHTS: Mapping[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadingPlan:
    """What loading a model now would choose, by the memory that is free now. `sizes` are those of a placed model."""

    source: ModelFolder
    limits: ModelLimits  # the card's, under the operator's ceiling
    presets: PresetTable
    device: torch.device
    dtype: torch.dtype
    sizes: memory.ModelSizes
    free_bytes: int  # on the device
    memory_mode: MemoryMode
    memory_reason: str
    execution: ExecutionPlan

    @property
    def needed_bytes(self) -> int:
        """On the device, for the model and its edits."""
        return memory.needs(self.sizes)[self.memory_mode] if self.device.type == "cuda" else 0


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline whose weights lie where `memory_mode` wants them, and what its folder says of it.

    `masters` keep the weights as they were loaded, where `execution` has turned some into float8. An edit holds `busy`:
    the weights are what its LoRAs make of them, for all engines around this model.
    """

    pipeline: Pipeline
    folder: Path
    card: ModelCard
    limits: ModelLimits  # the card's, under the operator's ceiling
    presets: PresetTable
    device: torch.device
    dtype: torch.dtype
    memory_mode: MemoryMode
    memory_reason: str
    execution: ExecutionPlan = field(default_factory=ExecutionPlan)
    blocks: Blocks = NATIVE
    masters: Masters | None = None
    busy: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and cannot be, and what failed since and runs otherwise."""
        return (*self.execution.notes, *self.blocks.notes)

    @property
    def numerics(self) -> str:
        """What decides the numbers beside device and weights: such as "float32", or "bfloat16, fp8 blocks"."""
        told = [str(self.dtype).removeprefix("torch.")]
        told += ["fp8 blocks"] if self.execution.fp8 else []
        told += [] if self.blocks.is_plain else [f"blocks {self.blocks.way}"]
        return ", ".join(told)

    @cached_property
    def merger(self) -> Merger:
        """The one writer of these weights, for all engines around this model: it alone knows what is merged."""
        return open_merger(self.pipeline, self.folder, self.device, self.memory_mode, self.masters)


def load_model(config: EngineConfig) -> LoadedModel:
    """Check the folder, load it, and place its weights.

    Raises `ModelError` naming the file at fault, and `InvalidValue` for a setting that cannot be.
    """
    plan = plan_loading(config)
    _announce(plan, config)
    device, mode = plan.device, plan.memory_mode
    folder, card = plan.source.path, plan.source.card
    pipeline = load_pipeline(folder, plan.dtype)
    masters = fp8.lower(pipeline, folder, device, mode, plan.needed_bytes) if plan.execution.fp8 else None
    memory.place(pipeline, mode, device)
    native_tokens = card.limits.native_area // card.limits.grid**2
    blocks = open_blocks(plan.execution, pipeline, device, plan.dtype, native_tokens, config.compile_cache)
    return LoadedModel(
        pipeline, folder, card, plan.limits, plan.presets, device, plan.dtype, mode, plan.memory_reason,
        plan.execution, blocks, masters,
    )  # fmt: skip


def plan_loading(config: EngineConfig) -> LoadingPlan:
    """In seconds, where loading takes a minute. Raises what `load_model` raises, for the same reasons."""
    folder = check_folder(config.model or embedded_model_dir())
    limits, presets = _limits(folder.card.limits, config.max_area), presets_of(folder.path, config.presets)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    is_cuda = device.type == "cuda"
    kind = Device(torch.cuda.get_device_capability(device) if is_cuda else None, dtype == torch.bfloat16)
    precision = choose_precision(config, presets, kind)
    keeps = reuses_reference(presets.rows.values())
    sizes = memory.sizes_of(folder, dtype.itemsize, limits.max_area, fp8=precision[0], keeps_reference=keeps)
    free = memory.free_bytes(device)
    mode, reason = memory.choose(free, sizes, is_cuda, config.memory_mode)
    execution = plan_execution(config, precision, kind, mode, keeps_reference=keeps)
    return LoadingPlan(folder, limits, presets, device, dtype, sizes, free, mode, reason, execution)


def _announce(plan: LoadingPlan, config: EngineConfig) -> None:
    """Into the log: what was chosen, and loudly what was not asked for so."""
    folder, device, mode = plan.source, plan.device, plan.memory_mode
    if device.type == "cpu" and config.device == "auto" and not folder.card.demonstration:
        log.warning("torch sees no GPU: %s will run on the CPU, which is slow. Try `kontextd doctor`.", folder.path)
    as_asked = config.memory_mode in (MemoryMode.AUTO, mode) and plan.needed_bytes <= plan.free_bytes
    level = logging.INFO if as_asked else logging.WARNING
    name, reason = folder.card.name, plan.memory_reason
    log.log(level, "%s on %s in %s: memory mode %s, %s", name, device, plan.dtype, mode.value, reason)
    for note in plan.execution.notes:
        log.warning("%s", note)


def load_pipeline(path: Path, dtype: torch.dtype) -> Pipeline:
    """The pipeline of a checked folder, in host memory. Raises `ModelError`."""
    with quiet():
        from diffusers import FluxKontextPipeline  # it speaks on import, of optional packages

        parts = {name: load_part(kind, path / name) for name, kind in _WITHOUT_WEIGHTS.items()}
        parts |= {name: _with_weights(kind, path / name, dtype) for name, kind in _WITH_WEIGHTS.items()}
        return FluxKontextPipeline(**parts)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first CUDA device, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidValue(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N.", field="device") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidValue(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N.", field="device")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InvalidValue(f"device is {name!r}, but {count} CUDA devices are visible. Try cpu.", field="device")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on CUDA and float32 on the CPU, where it is nine times faster."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise InvalidValue(f"dtype is {name!r}; it must be auto, {' or '.join(_DTYPES)}.", field="dtype")
    return _DTYPES[name]


def _limits(limits: ModelLimits, max_area: int | None) -> ModelLimits:
    if max_area is None:
        return limits
    try:
        return replace(limits, max_area=max_area)
    except ValueError as error:
        raise InvalidValue(str(error), field="max_area") from error


def _with_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:  # Any: the loaders are untyped
    module, unused = load_weights(kind, folder, dtype)
    if unused:
        log.warning("%s: %d tensors are not used, %s for one", folder, len(unused), unused[0])
    return module
