"""Random LoRAs, and the model's weights with some of them. Knows adapters; knows no files and no clocks."""

from __future__ import annotations

import re

import torch
from kontextd_models.loading import LoadedModel
from kontextd_models.lora.adapter import Adapter, Delta, LowRank
from kontextd_models.lora.coverage import Coverage
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.merging import Scaled
from torch import Tensor, nn

RANK = 16
_SCALE = 0.8
# Attention and MLP of every block, as trainers have it; not the modulation.
_LINEARS = re.compile(r"blocks\.\d+\.(attn|ff|ff_context|proj_mlp|proj_out)\b")


def random_loras(model: LoadedModel, count: int) -> list[Scaled]:
    """Each on the device and of every linear in the blocks."""
    linears = {
        name: module.weight.shape
        for name, module in model.pipeline.transformer.named_modules()
        if isinstance(module, nn.Linear) and _LINEARS.search(name)
    }
    return [(_adapter(model, index, linears), _SCALE) for index in range(count)]


def _adapter(model: LoadedModel, index: int, linears: dict[str, torch.Size]) -> Adapter:
    generator = torch.Generator(model.device).manual_seed(index)

    def random(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=model.device, dtype=model.dtype)
        return 0.01 * drawn

    deltas = {
        Parameter(Component.TRANSFORMER, f"{name}.weight"): (
            Delta(LowRank(random(rows, RANK), random(RANK, columns), 1.0), 0, rows),
        )
        for name, (rows, columns) in linears.items()
    }
    size_bytes = RANK * sum(map(sum, linears.values())) * model.dtype.itemsize
    count = 2 * len(linears)
    return Adapter(f"random {index}", deltas, Coverage(("random",), count, count), size_bytes)
