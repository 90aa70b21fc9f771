"""The weights of a process and what has been done to them. Knows models and LoRAs; knows no parts and no clocks."""

from __future__ import annotations

from functools import cached_property

import torch
from kontextd_models.lora.merging import Scaled
from torch import Tensor

from gpu_parts import ours
from gpu_parts.loras import random_loras
from gpu_parts.model import FULL, TINY, make_inputs, make_model, shape_of
from gpu_parts.parts import LORAS, Options

GUIDANCE = 2.5


class Stand:
    """A random Kontext on the device, inputs at the native size, and diffusers' answer to them."""

    def __init__(self, options: Options) -> None:
        self.options, self.sizes = options, TINY if options.tiny else FULL
        self.device = torch.device(options.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = make_model(self.sizes, self.device, dtype)
        self.inputs = make_inputs(self.sizes, self.model, self.sizes.native)
        self.shape = shape_of(self.sizes, self.model, self.sizes.native)
        self.first_velocity = self._first_velocity()
        self._worn = 0

    def run_in(self, precision: str) -> None:
        """Have the model run as the engine would run it in that precision. Once in a process, before any LoRA."""
        traced = self.options.tiny and self.device.type == "cpu"
        self.model = ours.set_up(self.model, precision, self.shape.output_tokens, traced=traced)

    def wear(self, count: int) -> bool:
        """Merge `count` of the LoRAs, or none; whether anything had to be written."""
        changed = count != self._worn
        if changed:
            self.model.merger.merge(self._loras[:count])
            self._worn = count
        return changed

    @cached_property
    def _loras(self) -> list[Scaled]:
        return random_loras(self.model, LORAS)

    @torch.no_grad()
    def _first_velocity(self) -> Tensor:
        """[1, N, C] of diffusers' own forward, eager, at the first step of any schedule (σ = 1)."""
        prompt, reference, noise = self.inputs
        output_ids = reference.ids.clone()
        output_ids[..., 0] = 0
        velocity: Tensor = self.model.pipeline.transformer(
            hidden_states=torch.cat([noise, reference.latents], dim=1),
            timestep=torch.ones(1, device=self.device, dtype=noise.dtype),
            guidance=torch.full([1], GUIDANCE, device=self.device),
            pooled_projections=prompt.pooled,
            encoder_hidden_states=prompt.sequence,
            txt_ids=prompt.ids,
            img_ids=torch.cat([output_ids, reference.ids]),
            return_dict=False,
        )[0]
        return velocity[:, : noise.shape[1]]
