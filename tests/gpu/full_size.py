"""A randomly initialised FLUX.1 Kontext, built in place on a device and never written to disk. For tests only.

`FULL` has the sizes of the real one (the `config.json` files of black-forest-labs/FLUX.1-Kontext-dev): 11.9 B
parameters of transformer and 4.8 B of T5, 34 GB in bfloat16. `SMALL` has the same structure at a size for a CPU, so
that `make test` proves the code that `make test-gpu` runs. The tokenizers are those of a tiny model's folder: what they
say does not matter to random encoders, how long it is does.

`python tests/gpu/full_size.py SHAPE DEVICE TOKENIZERS` prints the model's fingerprint from a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from kontextd_models import EngineConfig, MemoryMode, memory
from kontextd_models.acceleration.table import presets_of
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import fingerprint
from kontextd_models.folder import ModelCard, read_card
from kontextd_models.loading import LoadedModel, pick_device, pick_dtype
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


@dataclass(frozen=True)
class Shape:
    double_blocks: int
    single_blocks: int
    heads: int
    head_width: int
    rope: tuple[int, int, int]
    t5_width: int
    t5_inner: int
    t5_heads: int
    t5_layers: int
    clip_width: int
    clip_layers: int
    clip_heads: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_groups: int
    prompt_tokens: int


FULL = Shape(
    double_blocks=19,
    single_blocks=38,
    heads=24,
    head_width=128,
    rope=(16, 56, 56),
    t5_width=4096,
    t5_inner=10240,
    t5_heads=64,
    t5_layers=24,
    clip_width=768,
    clip_layers=12,
    clip_heads=12,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    vae_groups=32,
    prompt_tokens=512,
)
SMALL = Shape(
    double_blocks=2,
    single_blocks=3,
    heads=2,
    head_width=32,
    rope=(4, 14, 14),
    t5_width=64,
    t5_inner=96,
    t5_heads=4,
    t5_layers=2,
    clip_width=32,
    clip_layers=2,
    clip_heads=4,
    vae_channels=(8, 16, 32, 32),
    vae_layers=2,
    vae_groups=8,
    prompt_tokens=32,
)


SHAPES = {"full": FULL, "small": SMALL}


def load(shape: Shape, tokenizers: Path, config: EngineConfig) -> Engine:
    """An engine around a model that was never in a folder, with its weights where `config` wants them."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    mode = MemoryMode.RESIDENT if config.memory_mode is MemoryMode.AUTO else config.memory_mode
    pipeline = build(shape, tokenizers, device, dtype)
    if mode is not MemoryMode.RESIDENT:
        pipeline.to("cpu")  # from where weights are streamed
        torch.cuda.empty_cache()
    memory.place(pipeline, mode, device)
    card = ModelCard("random full-size model") if shape is FULL else read_card(tokenizers)
    presets = presets_of(tokenizers, config.presets)
    return Engine(
        LoadedModel(pipeline, tokenizers, card, card.limits, presets, device, dtype, mode, "asked for"), config
    )


def build(shape: Shape, tokenizers: Path, device: torch.device, dtype: torch.dtype) -> FluxKontextPipeline:
    """The pipeline with all parts on `device`. The same device gives the same weights each time."""
    torch.manual_seed(0)
    clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer", local_files_only=True)
    t5_tokenizer = T5TokenizerFast.from_pretrained(
        tokenizers / "tokenizer_2", local_files_only=True, model_max_length=shape.prompt_tokens
    )
    with _born_on(device, dtype):
        transformer, vae = _transformer(shape), _vae(shape)
        clip, t5 = _clip(shape, clip_tokenizer.eos_token_id), _t5(shape)
    for part in (transformer, vae, clip, t5):
        part.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


@contextmanager
def _born_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are initialised on the device in `dtype`: 68 GB of float32 on the host would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _transformer(shape: Shape) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=shape.double_blocks,
        num_single_layers=shape.single_blocks,
        attention_head_dim=shape.head_width,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.t5_width,
        pooled_projection_dim=shape.clip_width,
        guidance_embeds=True,
        axes_dims_rope=shape.rope,
    )


def _vae(shape: Shape) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=shape.vae_layers,
        latent_channels=16,
        norm_num_groups=shape.vae_groups,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(shape: Shape, eos: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=shape.clip_width,
            intermediate_size=4 * shape.clip_width,
            num_hidden_layers=shape.clip_layers,
            num_attention_heads=shape.clip_heads,
            max_position_embeddings=77,
            projection_dim=shape.clip_width,
            bos_token_id=eos - 1,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def _t5(shape: Shape) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=shape.t5_width,
            d_kv=shape.t5_width // shape.t5_heads,
            d_ff=shape.t5_inner,
            num_layers=shape.t5_layers,
            num_heads=shape.t5_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.1,
            tie_word_embeddings=False,
        )
    )


if __name__ == "__main__":
    print(fingerprint(load(SHAPES[sys.argv[1]], Path(sys.argv[3]), EngineConfig(device=sys.argv[2]))))
