"""The parts of FLUX.1 Kontext with random weights, for benchmarks and tests. Knows sizes and devices; knows no files.

The sizes of the real one are those of the `config.json` files of black-forest-labs/FLUX.1-Kontext-dev. Linears have
torch's own initialisation, U(±1/√in), under which nothing grows from block to block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any  # a pipeline and its parts: diffusers and transformers hide that they are modules

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

_END = 49407  # of a text, to CLIP's own tokenizer


@dataclass(frozen=True)
class Sizes:
    """Of all parts; the defaults are FLUX.1 Kontext's: 11.9 B parameters of transformer and 4.8 B of T5."""

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


def make_pipeline(sizes: Sizes, device: torch.device, dtype: torch.dtype, **texts: Any) -> Any:
    """A `FluxKontextPipeline`; `texts` are its encoders and tokenizers. A device gives the same weights each time."""
    from diffusers import FluxKontextPipeline  # it speaks on import, of optional packages

    torch.manual_seed(0)
    with born_on(device, dtype):
        transformer, vae = _transformer(sizes), _vae(sizes)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        transformer=_still(transformer),
        vae=_still(vae),
        **texts,
    )


def make_encoders(sizes: Sizes, device: torch.device, dtype: torch.dtype, end: int = _END) -> tuple[Any, Any]:
    """CLIP and T5. `end`: the token that ends a text for CLIP's tokenizer."""
    with born_on(device, dtype):
        clip, t5 = _clip(sizes, end), _t5(sizes)
    return _still(clip), _still(t5)


@contextmanager
def born_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are initialised on the device in `dtype`: 68 GB of float32 on the host would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _still(part: Any) -> Any:
    return part.requires_grad_(False).eval()


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


def _clip(sizes: Sizes, end: int) -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=sizes.pooled_width,
            intermediate_size=4 * sizes.pooled_width,
            num_hidden_layers=sizes.text_layers // 2 or 1,
            num_attention_heads=sizes.pooled_width // 64 or 1,
            max_position_embeddings=77,
            projection_dim=sizes.pooled_width,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
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
