"""diffusers' own `FluxKontextPipeline.__call__` on the parts of a loaded engine: the yardstick. Knows no checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from kontextd_models.encode import max_prompt_tokens
from kontextd_models.loading import LoadedModel


@dataclass(frozen=True)
class StockEdit:
    """One call. `snap_reference`: diffusers stretches the reference to one of Kontext's sizes, which is its default."""

    reference: Image.Image
    prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    snap_reference: bool = False


def snapped(picture: Image.Image, sizes: Iterable[tuple[int, int]]) -> Image.Image:
    """The reference as `snap_reference` has it, for a model with preferred sizes (width, height) of its own.

    diffusers knows Kontext's only, which for a small model lie far from everything it was trained on.
    """
    aspect = picture.width / picture.height
    _, width, height = min((abs(aspect - width / height), width, height) for width, height in sizes)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def stock_picture(model: LoadedModel, edit: StockEdit) -> Image.Image:
    picture: Image.Image = _call(model, edit, "pil")[0]
    return picture


def stock_latents(model: LoadedModel, edit: StockEdit) -> Tensor:
    """The packed latents [1, N, C] after the last step."""
    latents: Tensor = _call(model, edit, "latent")
    return latents


@torch.no_grad()
def _call(model: LoadedModel, edit: StockEdit, output_type: str) -> Any:  # Any: pictures or latents, by `output_type`
    pipeline: Any = model.pipeline  # Any: diffusers leaves its own attributes out of its types
    pipeline.set_progress_bar_config(disable=True)
    with _quiet():
        return pipeline(
            image=edit.reference,
            prompt=edit.prompt,
            height=edit.height,
            width=edit.width,
            num_inference_steps=edit.steps,
            guidance_scale=edit.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(edit.seed),
            output_type=output_type,
            max_sequence_length=max_prompt_tokens(pipeline),
            max_area=edit.width * edit.height,  # without it diffusers scales every size to 1 MP
            _auto_resize=edit.snap_reference,
        ).images


@contextmanager
def _quiet() -> Iterator[None]:
    """The pipeline repeats on stderr what the engine has said of a long prompt."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
