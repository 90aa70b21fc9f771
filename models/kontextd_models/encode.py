"""Prompt and reference image to what the transformer reads. Knows the pipeline's encoders; knows no steps, no caches.

To the bit what `FluxKontextPipeline` makes of the same prompt and the same prepared image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

# A FluxKontextPipeline. Any: diffusers gives a pipeline its parts at run time, where no checker sees them.
Pipeline: TypeAlias = Any

_MAX_PROMPT_TOKENS = 512  # FluxKontextPipeline.check_inputs refuses more


@dataclass(frozen=True)
class EncodedPrompt:
    """`cut_tokens`: so many at the end of the prompt T5 did not get to see.

    CLIP reads 77 tokens at most and contributes one pooled vector: what only it does not see is not lost.
    """

    sequence: Tensor  # [1, L, D], T5
    pooled: Tensor  # [1, P], CLIP
    ids: Tensor  # [L, 3], zeros
    cut_tokens: int = 0

    @property
    def size_bytes(self) -> int:
        return _bytes(self.sequence, self.pooled, self.ids)

    def to(self, device: torch.device) -> EncodedPrompt:
        return EncodedPrompt(self.sequence.to(device), self.pooled.to(device), self.ids.to(device), self.cut_tokens)


@dataclass(frozen=True)
class EncodedReference:
    """The reference image in latent space, packed 2 × 2, and where each token lies: (1, y, x)."""

    latents: Tensor  # [1, M, C]
    ids: Tensor  # [M, 3]

    @property
    def size_bytes(self) -> int:
        return _bytes(self.latents, self.ids)

    def to(self, device: torch.device) -> EncodedReference:
        return EncodedReference(self.latents.to(device), self.ids.to(device))


def max_prompt_tokens(pipeline: Pipeline) -> int:
    """How many tokens of a prompt T5 reads: 512, or fewer where its tokenizer says so."""
    return min(_MAX_PROMPT_TOKENS, int(pipeline.tokenizer_2.model_max_length))


def encode_prompt(pipeline: Pipeline, prompt: str, max_tokens: int, device: torch.device) -> EncodedPrompt:
    """Encode with both encoders; text beyond their limits is cut, as diffusers does."""
    pooled = _read_by_clip(pipeline, prompt, device)
    sequence, cut_tokens = _read_by_t5(pipeline, prompt, max_tokens, device)
    ids = torch.zeros(sequence.shape[1], 3).to(device=device, dtype=pipeline.text_encoder.dtype)
    return EncodedPrompt(sequence, pooled, ids, cut_tokens)


def encode_reference(
    pipeline: Pipeline, image: Image.Image, dtype: torch.dtype, device: torch.device
) -> EncodedReference:
    """Encode an RGB image whose sides are multiples of 16, by the mode of the VAE's distribution."""
    pixels = pipeline.image_processor.preprocess(image, image.height, image.width).to(device=device, dtype=dtype)
    latents = pipeline._encode_vae_image(pixels, generator=None)  # [1, C/4, H/8, W/8]
    channels, height, width = latents.shape[1:]
    ids = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, dtype)
    ids[..., 0] = 1  # the output's tokens have 0 here
    return EncodedReference(pipeline._pack_latents(latents, 1, channels, height, width), ids)


def prepare_reference(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture as the model gets to see it: RGB, `width` × `height`."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def _read_by_clip(pipeline: Pipeline, prompt: str, device: torch.device) -> Tensor:
    tokens = pipeline.tokenizer(
        [prompt],
        padding="max_length",
        max_length=pipeline.tokenizer_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    pooled = pipeline.text_encoder(tokens.to(device), output_hidden_states=False).pooler_output
    embedded: Tensor = pooled.to(dtype=pipeline.text_encoder.dtype, device=device)
    return embedded


def _read_by_t5(pipeline: Pipeline, prompt: str, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    tokens = pipeline.tokenizer_2(
        [prompt], padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    ).input_ids
    sequence = pipeline.text_encoder_2(tokens.to(device), output_hidden_states=False)[0]
    full = int(tokens[0, -1]) != pipeline.tokenizer_2.pad_token_id
    cut_tokens = len(pipeline.tokenizer_2(prompt, verbose=False).input_ids) - max_tokens if full else 0
    return sequence.to(dtype=pipeline.text_encoder_2.dtype, device=device), cut_tokens


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
