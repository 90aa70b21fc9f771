"""FLUX.1 Kontext with random weights as the engine would have it. Knows sizes; knows no files, no clocks, no presets.

Speed does not depend on the values of weights (but for the power that random ones draw).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kontextd_models.acceleration.cost import Shape
from kontextd_models.acceleration.table import SHIPPED, read_table
from kontextd_models.encode import EncodedPrompt, EncodedReference
from kontextd_models.folder import ModelCard
from kontextd_models.limits import KONTEXT_PREFERRED_SIZES
from kontextd_models.loading import LoadedModel
from kontextd_models.pretrained import quiet
from kontextd_models.random_weights import Sizes as OfParts
from kontextd_models.random_weights import make_pipeline
from kontextd_models.records import MemoryMode
from torch import Tensor, nn

Size = tuple[int, int]  # width and height in pixels
PIXELS_A_TOKEN = 16


@dataclass(frozen=True)
class Sizes(OfParts):
    """`shrink` divides the sides of every picture."""

    shrink: int = 1

    @property
    def native(self) -> Size:
        return self.shrunk((1024, 1024))

    @property
    def preferred(self) -> tuple[Size, ...]:
        return tuple(map(self.shrunk, KONTEXT_PREFERRED_SIZES))

    def shrunk(self, size: Size) -> Size:
        grid = PIXELS_A_TOKEN
        width, height = (max(1, side // self.shrink // grid) * grid for side in size)
        return width, height


FULL = Sizes()
TINY = Sizes(
    double_blocks=1,
    single_blocks=2,
    heads=2,
    head_width=32,
    rope=(4, 14, 14),
    text_width=64,
    text_layers=1,
    pooled_width=32,
    text_tokens=24,
    vae_channels=(8, 16, 16, 16),
    vae_groups=8,
    shrink=4,
)


def make_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Transformer and VAE as the engine would have them after loading. The text encoders are empty stand-ins."""
    card = ModelCard("random weights")
    return LoadedModel(
        pipeline=_pipeline(sizes, device, dtype),
        folder=Path(),
        card=card,
        limits=card.limits,
        presets=read_table(SHIPPED),
        device=device,
        dtype=dtype,
        memory_mode=MemoryMode.RESIDENT,
        memory_reason="there are no files to stream from",
    )


def make_inputs(sizes: Sizes, model: LoadedModel, size: Size) -> tuple[EncodedPrompt, EncodedReference, Tensor]:
    """What the encoders would give, and noise [1, N, C], for a picture of `size` and a reference of the same."""
    generator = torch.Generator(model.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)

    columns, rows = (side // PIXELS_A_TOKEN for side in size)
    channels = model.pipeline.transformer.config.in_channels
    ids = model.pipeline._prepare_latent_image_ids(1, rows, columns, model.device, model.dtype)
    ids[..., 0] = 1
    text_ids = torch.zeros(sizes.text_tokens, 3, device=model.device, dtype=model.dtype)
    prompt = EncodedPrompt(random(1, sizes.text_tokens, sizes.text_width), random(1, sizes.pooled_width), text_ids)
    reference = EncodedReference(random(1, rows * columns, channels), ids)
    return prompt, reference, random(1, rows * columns, channels)


def shape_of(sizes: Sizes, model: LoadedModel, size: Size) -> Shape:
    """For the FLOPs of a picture of `size` from a reference of the same."""
    tokens = size[0] * size[1] // PIXELS_A_TOKEN**2
    return Shape.of(model.pipeline.transformer.config, tokens, tokens, sizes.text_tokens)


def _pipeline(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    with quiet():
        pipeline = make_pipeline(
            sizes,
            device,
            dtype,
            text_encoder=_Absent(device, dtype),
            tokenizer=None,
            text_encoder_2=_Absent(device, dtype),
            tokenizer_2=_Tokenizer(sizes.text_tokens),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class _Tokenizer:
    """All that is asked of one here."""

    model_max_length: int


class _Absent(nn.Module):
    """Where a text encoder would be: it has no weights, and the pipeline asks nothing else of it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype
