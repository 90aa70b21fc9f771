"""The denoise loop, as a generator over diffusers' parts. Knows latents; knows no prompts, images, caches or requests.

To the bit `FluxKontextPipeline.__call__` (diffusers 0.42) without true CFG, IP adapters and callbacks.
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

from kontextd_models.encode import EncodedPrompt, EncodedReference, Pipeline


@dataclass(frozen=True)
class Noise:
    """Where an image begins: packed noise and where each token lies, (0, y, x)."""

    latents: Tensor  # [1, N, C]
    ids: Tensor  # [N, 3]


@dataclass(frozen=True)
class Denoised:
    """After a step: `latents` at noise level `sigma`, and the `velocity` that led there. [1, N, C] both.

    The image the model has in mind is `latents - sigma * velocity`.
    """

    latents: Tensor
    velocity: Tensor
    sigma: float


def draw_noise(
    pipeline: Pipeline, seed: int, width: int, height: int, dtype: torch.dtype, device: torch.device
) -> Noise:
    """Noise for a `width` × `height` image, drawn on the CPU so that a seed means the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    channels = pipeline.transformer.config.in_channels // 4
    latents, _, ids, _ = pipeline.prepare_latents(None, 1, channels, height, width, dtype, device, generator)
    return Noise(latents, ids)


def denoise(
    pipeline: Pipeline,
    noise: Noise,
    prompt: EncodedPrompt,
    reference: EncodedReference,
    steps: int,
    guidance_scale: float,
) -> Iterator[Denoised]:
    """Yield after each of `steps` Euler steps from noise to image."""
    latents, count = noise.latents, noise.latents.shape[1]
    scheduler = _scheduler(pipeline, count, steps, latents.device)
    sigmas = scheduler.sigmas.tolist()  # of [steps + 1]; the last one is 0
    times = scheduler.timesteps.to(latents.dtype) / 1000  # [steps]
    guidance = _guidance(pipeline, guidance_scale, latents.device)
    ids = torch.cat([noise.ids, reference.ids], dim=0)  # [N + M, 3]
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = pipeline.transformer(
            hidden_states=torch.cat([latents, reference.latents], dim=1),  # [1, N + M, C]
            timestep=times[index : index + 1],
            guidance=guidance,
            pooled_projections=prompt.pooled,
            encoder_hidden_states=prompt.sequence,
            txt_ids=prompt.ids,
            img_ids=ids,
            return_dict=False,
        )[0][:, :count]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        yield Denoised(latents, velocity, sigmas[index + 1])


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


def _scheduler(pipeline: Pipeline, tokens: int, steps: int, device: torch.device) -> Any:  # as the pipeline is
    """A scheduler of this image's own, set to its noise levels: the pipeline's carries state from call to call."""
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
    return scheduler


def _guidance(pipeline: Pipeline, scale: float, device: torch.device) -> Tensor | None:
    if not pipeline.transformer.config.guidance_embeds:
        return None
    return torch.full([1], scale, device=device, dtype=torch.float32)
