"""Float8 layers in the place of full ones, and back to their masters. Knows modules and weights; knows no LoRAs.

The module tree and all names stay. A layer's weight holds codes, [out, in], and beside it lies a scale a row, [out, 1]:
weight ≈ codes · scale. Both are made of the master, the weight as it was loaded, and are made anew by whoever merges
into it: codes that were added to would lose most of a LoRA, whose deltas are smaller than the steps between codes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from kontextd_kernels.fp8_linear import fp8_linear, quantised_linear
from kontextd_kernels.lora_merge import merged_fp8
from torch import Tensor, nn

from kontextd_models.encode import Pipeline
from kontextd_models.execution.precision import fp8_layers
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.pristine import Masters, Room, choose, keep_pristine, parameters_of, size_of
from kontextd_models.records import MemoryMode

log = logging.getLogger(__name__)


class Quantised(NamedTuple):
    """Tokens [1, L, D] as codes [L, D] and their scales [L, 1]; `dtype` is what a product of them is to have."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype


class Fp8Linear(nn.Linear):
    """`weight` holds float8 codes; tokens [..., in] are quantised row by row as they come, unless they are already."""

    weight_scale: Tensor  # [out, 1], float32

    def forward(self, input: Tensor | Quantised) -> Tensor:  # the name that callers may use
        if isinstance(input, Quantised):
            codes, scale, dtype = input
            return quantised_linear(codes, scale, self.weight, self.weight_scale, self.bias, dtype)[None]
        rows = fp8_linear(input.flatten(0, -2), self.weight, self.weight_scale, self.bias)
        shaped: Tensor = rows.unflatten(0, input.shape[:-1])
        return shaped


def lower(pipeline: Pipeline, folder: Path, device: torch.device, mode: MemoryMode, planned_bytes: int) -> Masters:
    """Turn a pipeline that was just loaded from `folder` into float8 where it may be; return what keeps its masters.

    Layer by layer on the device, so that the full weights need not fit there. `planned_bytes` is what the model and its
    edits will take there: masters go where room is beside that.
    """
    parameters = parameters_of(pipeline)
    size, room = size_of(parameters), Room.beside_model(device, planned_bytes)
    place, reason = choose(size, room, device.type == "cuda")
    log.info("masters of the weights (%.1f GB) for fp8: %s, %s", size / 1e9, place.value, reason)
    pristine = keep_pristine(pipeline, folder, place, device)
    streams = mode not in (MemoryMode.RESIDENT, MemoryMode.ENCODERS_OFF)
    taken = 0
    with torch.no_grad():
        for name, layer in _layers(pipeline):
            master = pristine.weight(Parameter(Component.TRANSFORMER, f"{name}.weight"))
            taken += master.numel() * master.element_size()
            _lower(layer, master, device, torch.device("cpu") if streams else device)
    return Masters(pristine, place, size - taken)


def scales_of(pipeline: Pipeline) -> dict[Parameter, Tensor]:
    """The scales of all float8 weights, by the weight."""
    return {
        Parameter(Component.TRANSFORMER, f"{name}.weight"): module.weight_scale
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, Fp8Linear)
    }


def write_sum(base: Tensor, up: Tensor, down: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Codes and scales of base + up @ down, [out, in], quantised from the sum in float32, wherever these lie."""
    if codes.device == base.device:
        merged_fp8(base, up, down, codes=codes, scale=scale)
        return
    for resting, made in zip((codes, scale), merged_fp8(base, up, down), strict=True):
        resting.copy_(made)


def write(master: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Codes and scales of a whole weight, [out, in]."""
    write_sum(master, master.new_empty(len(master), 0), master.new_empty(0, master.shape[1]), codes, scale)


def _layers(pipeline: Pipeline) -> Iterator[tuple[str, nn.Linear]]:
    linears = {name: module for name, module in pipeline.transformer.named_modules() if isinstance(module, nn.Linear)}
    return ((name, linears[name]) for name in fp8_layers(linears))


def _lower(layer: nn.Linear, master: Tensor, device: torch.device, rests_on: torch.device) -> None:
    codes = torch.empty(master.shape, dtype=torch.float8_e4m3fn, device=rests_on)
    scale = torch.empty((len(master), 1), dtype=torch.float32, device=rests_on)
    write(master.to(device), codes, scale)
    layer.weight.data = codes  # the parameter stays the one that others know
    layer.register_buffer("weight_scale", scale, persistent=False)
    layer.__class__ = Fp8Linear
