"""The denoise loop, as a generator over diffusers' parts. Knows latents; knows no prompts, images, caches or requests.

With an exact preset to the bit `FluxKontextPipeline.__call__` (diffusers 0.42) without true CFG, IP adapters and
callbacks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontextd_models.acceleration.planning import Plan, plan
from kontextd_models.acceleration.preset import Preset, StepKind
from kontextd_models.acceleration.steps import Steps
from kontextd_models.encode import EncodedPrompt, EncodedReference, Pipeline
from kontextd_models.loading import LoadedModel
from kontextd_models.records import MemoryMode
from kontextd_models.transformer.forward import Forward, Inputs, Stock, Trim, WrittenOut
from kontextd_models.transformer.modulation import Conditions


@dataclass(frozen=True)
class Denoised:
    """After a step: `latents` at noise level `sigma`; the `velocity` that led there, made as `kind` says. [1, N, C].

    The image the model has in mind is `latents - sigma * velocity`.
    """

    latents: Tensor
    velocity: Tensor
    sigma: float
    kind: StepKind


@dataclass(frozen=True)
class Schedule:
    """The noise levels of every image of a request. `sigmas` are those of [S + 1]; the last one is 0."""

    scheduler: Any  # as the pipeline is; of this request's own: the pipeline's carries state from call to call
    sigmas: list[float]

    @classmethod
    def of(cls, pipeline: Pipeline, tokens: int, steps: int, device: torch.device) -> Schedule:
        """The levels for `steps` Euler steps of an image of so many tokens."""
        scheduler = copy.copy(pipeline.scheduler)  # `set_timesteps` replaces what it changes
        config = scheduler.config
        mu = shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
        scheduler.set_begin_index(0)
        return cls(scheduler, scheduler.sigmas.tolist())

    def times(self, dtype: torch.dtype) -> Tensor:
        """What the transformer is told of each step, 0..1: [S]."""
        times: Tensor = self.scheduler.timesteps.to(dtype) / 1000
        return times


def draw_noise(
    pipeline: Pipeline, seed: int, width: int, height: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Packed noise [1, N, C] for an image, drawn on the CPU so that a seed means the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    channels = pipeline.transformer.config.in_channels // 4
    latents: Tensor = pipeline.prepare_latents(None, 1, channels, height, width, dtype, device, generator)[0]
    return latents


@dataclass(frozen=True)
class Trajectory:
    """The way from noise to image, for all images of a request: they share everything but their noise."""

    schedule: Schedule
    forward: Forward
    plan: Plan

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        prompt: EncodedPrompt,
        reference: EncodedReference,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
        preset: Preset,
    ) -> Trajectory:
        """For images of `size` (width, height). Streamed weights run every step that runs with every token."""
        pipeline, device, dtype = model.pipeline, model.device, prompt.sequence.dtype
        factor = 2 * pipeline.vae_scale_factor  # pixels a token
        columns, rows = size[0] // factor, size[1] // factor
        output_ids = pipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)  # [N, 3]
        schedule = Schedule.of(pipeline, rows * columns, steps, device)
        conditions = Conditions(schedule.times(dtype), _guidance(pipeline, guidance_scale, device), prompt.pooled)
        inputs = Inputs(prompt, reference, output_ids, conditions)
        forward = _forward(model, inputs, preset)
        return cls(schedule, forward, plan(preset, steps, keeps_reference=forward.keeps))

    def run(self, noise: Tensor) -> Iterator[Denoised]:
        """Yield after each Euler step from `noise` [1, N, C] to an image. Nothing of one run is seen by the next."""
        steps, latents, sigmas = Steps(self.forward, self.plan), noise, self.schedule.sigmas
        scheduler = copy.copy(self.schedule.scheduler)  # it counts its steps
        for index, timestep in enumerate(scheduler.timesteps):
            velocity, kind = steps.velocity(index, sigmas[index], latents)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            yield Denoised(latents, velocity, sigmas[index + 1], kind)


def decode(pipeline: Pipeline, latents: Tensor, width: int, height: int) -> Image.Image:
    """Packed latents [1, N, C] to an RGB image."""
    config = pipeline.vae.config
    unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    pixels = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def shift(tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """μ, the time shift for an image of so many tokens: linear between the two anchors (FLUX.1, `get_lin_function`).

    The order of the operations is diffusers' `calculate_shift`, so that no bit differs.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)


def _forward(model: LoadedModel, inputs: Inputs, preset: Preset) -> Forward:
    if model.memory_mode not in (MemoryMode.RESIDENT, MemoryMode.ENCODERS_OFF):
        return Stock(model.pipeline.transformer, inputs)
    rounds_anyway = not model.blocks.is_plain  # no bit is promised then, and both are free
    return WrittenOut(
        model.pipeline.transformer,
        inputs,
        modulation_ahead=preset.modulation_ahead or rounds_anyway,
        trim=Trim.ALWAYS if preset.trim_last_block or rounds_anyway else Trim.WHERE_EQUAL,
        blocks=model.blocks,
    )


def _guidance(pipeline: Pipeline, scale: float, device: torch.device) -> Tensor | None:
    if not pipeline.transformer.config.guidance_embeds:
        return None
    return torch.full([1], scale, device=device, dtype=torch.float32)
