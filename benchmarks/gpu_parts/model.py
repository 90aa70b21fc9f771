"""FLUX.1 Kontext with random weights, made on the device. Knows sizes; knows no files, no clocks and no presets.

Speed does not depend on the values of weights (but for the power that random ones draw), so the sizes are all that is
taken from the real model: its `config.json` files. Linears have torch's own initialisation, U(±1/√in), under which
nothing grows from block to block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from kontextd_models.acceleration.cost import Shape
from kontextd_models.acceleration.table import SHIPPED, read_table
from kontextd_models.encode import EncodedPrompt, EncodedReference
from kontextd_models.folder import ModelCard
from kontextd_models.limits import KONTEXT_PREFERRED_SIZES
from kontextd_models.loading import LoadedModel
from kontextd_models.pretrained import quiet
from kontextd_models.records import MemoryMode
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

Size = tuple[int, int]  # width and height in pixels
PIXELS_A_TOKEN = 16


@dataclass(frozen=True)
class Sizes:
    """Of all parts. `shrink` divides the sides of every picture."""

    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_width: int = 128
    rope: tuple[int, int, int] = (16, 56, 56)
    text_width: int = 4096
    text_layers: int = 24
    pooled_width: int = 768
    text_tokens: int = 512
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_groups: int = 32
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


def make_encoders(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """CLIP and T5."""
    with _born_on(device, dtype):
        clip, t5 = _clip(sizes), _t5(sizes)
    for encoder in (clip, t5):
        encoder.requires_grad_(False).eval()
    return clip, t5


def _pipeline(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    with quiet():
        from diffusers import FluxKontextPipeline  # it speaks on import, of optional packages

        torch.manual_seed(0)
        with _born_on(device, dtype):
            transformer, vae = _transformer(sizes), _vae(sizes)
        for part in (transformer, vae):
            part.requires_grad_(False).eval()
        pipeline: Any = FluxKontextPipeline(  # Any: diffusers gives a pipeline its parts at run time
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=vae,
            text_encoder=_Absent(device, dtype),
            tokenizer=None,
            text_encoder_2=_Absent(device, dtype),
            tokenizer_2=_Tokenizer(sizes.text_tokens),
            transformer=transformer,
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


@contextmanager
def _born_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are initialised on the device in `dtype`: 48 GB of float32 on the host would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _transformer(sizes: Sizes) -> Any:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_width,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.pooled_width,
        guidance_embeds=True,
        axes_dims_rope=sizes.rope,
    )


def _vae(sizes: Sizes) -> Any:
    return AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=sizes.vae_groups,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(sizes: Sizes) -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=sizes.pooled_width,
            intermediate_size=4 * sizes.pooled_width,
            num_hidden_layers=sizes.text_layers // 2 or 1,
            num_attention_heads=sizes.pooled_width // 64 or 1,
            max_position_embeddings=77,
            projection_dim=sizes.pooled_width,
        )
    )


def _t5(sizes: Sizes) -> Any:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=sizes.text_width,
            d_kv=64,
            d_ff=5 * sizes.text_width // 2,
            num_layers=sizes.text_layers,
            num_heads=sizes.text_width // 64,
            feed_forward_proj="gated-gelu",
        )
    )
