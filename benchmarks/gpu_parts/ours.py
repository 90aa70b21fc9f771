"""From a model in memory to one that runs as the engine would run it: precision, attention, compilation.

The engine does the same while it loads a folder (`kontextd_models.loading`). Knows its settings; knows no clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from kontextd_models.execution import blocks as execution_blocks
from kontextd_models.execution import fp8
from kontextd_models.execution.compilation import compiled
from kontextd_models.execution.planning import Device, choose_precision, plan_execution
from kontextd_models.loading import LoadedModel
from kontextd_models.records import EngineConfig

_SETTINGS = {"bf16": "full", "fp8": "fp8"}


def set_up(model: LoadedModel, precision: str, image_tokens: int, *, traced: bool) -> LoadedModel:
    """The model in "bf16" or "fp8", everything else at its default, compiled where there is a GPU.

    `traced`: compiled anywhere, by torch's backend "eager". Graphs are traced and guarded as for the real compiler, and
    then run as they are: it shows what would be compiled, and when.
    """
    device = model.device
    config = EngineConfig(precision=_SETTINGS[precision], compile="on" if traced else "auto")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    kind = Device(capability, model.dtype == torch.bfloat16)
    plan = plan_execution(config, choose_precision(config, model.presets, kind), kind, model.memory_mode)
    masters = fp8.lower(model.pipeline, model.folder, device, model.memory_mode, 0) if plan.fp8 else None
    by_eager = mock.patch.object(execution_blocks, "compiled", partial(compiled, backend="eager"))
    with by_eager if traced else nullcontext():
        blocks = execution_blocks.open_blocks(
            plan, model.pipeline, device, model.dtype, image_tokens, config.compile_cache
        )
    return replace(model, execution=plan, blocks=blocks, masters=masters)


def told(model: LoadedModel) -> Mapping[str, object]:
    """What runs now, what it fell back to, and what came of ways that were tried beside it."""
    return {
        "precision": model.execution.precision,
        "blocks": model.blocks.way,
        "notes": list(model.notes),
        "tried": list(model.blocks.tried),
    }
