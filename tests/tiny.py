"""Builds tiny random FLUX.1 Kontext pipelines in the real folder format, in a fraction of a second. For tests only."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

PROMPT_TOKENS = 24
CARD = {
    "name": "tiny random model",
    "limits": {
        "preferred_sizes": [[64, 64], [80, 48], [48, 80]],
        "native_area": 64 * 64,
        "max_area": 128 * 128,
        "min_area": 32 * 32,
        "min_input_side": 16,
    },
}


def build(folder: Path, *, seed: int = 0, guidance_embeds: bool = True, max_shard_size: str = "10GB") -> Path:
    """A random pipeline in `folder`, with a `kontextd.json` whose sizes are small."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    pipeline = FluxKontextPipeline(
        scheduler=_scheduler(),
        vae=_lively(_vae()),
        text_encoder=_lively(_clip(len(clip_tokenizer), clip_tokenizer.eos_token_id)),
        tokenizer=clip_tokenizer,
        text_encoder_2=_lively(_t5(len(t5_tokenizer))),
        tokenizer_2=t5_tokenizer,
        transformer=_lively(_transformer(guidance_embeds)),
    )
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
    (folder / "kontextd.json").write_text(json.dumps(CARD))
    return folder


def _lively(module: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases off their initial ones and zeros, so that no weight is without effect."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return module.eval()


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _clip(vocab_size: int, eos: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=eos - 1,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def _t5(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1 Kontext's own settings."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with the 256 byte symbols, those that end a word, and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    learned = Tokenizer(models.Unigram())
    learned.normalizer = normalizers.NFKC()
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    learned.train_from_iterator(["the quick brown fox jumps over the lazy dog", "make it black and white"] * 4, trainer)
    learned.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    vocab = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=PROMPT_TOKENS)
