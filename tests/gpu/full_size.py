"""A randomly initialised FLUX.1 Kontext, built in place on a device and never written to disk. For tests only.

`full` has the sizes of the real one, 34 GB in bfloat16. `small` has the same structure at a size for a CPU, so that
`make test` proves the code that `make test-gpu` runs. The tokenizers are those of a tiny model's folder: what they say
does not matter to random encoders, how long it is does.

`python tests/gpu/full_size.py SIZE DEVICE TOKENIZERS` prints the model's fingerprint from a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from kontextd_models import EngineConfig, MemoryMode, memory
from kontextd_models.acceleration.table import presets_of
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import fingerprint
from kontextd_models.folder import ModelCard, read_card
from kontextd_models.loading import LoadedModel, pick_device, pick_dtype
from kontextd_models.random_weights import Sizes, make_encoders, make_pipeline
from transformers import CLIPTokenizer, T5TokenizerFast

SIZES = {
    "full": Sizes(),
    "small": Sizes(
        double_blocks=2,
        single_blocks=3,
        heads=2,
        head_width=32,
        rope=(4, 14, 14),
        text_width=64,
        text_layers=4,
        pooled_width=32,
        text_tokens=32,
        vae_channels=(8, 16, 32, 32),
        vae_groups=8,
    ),
}


def load(size: str, tokenizers: Path, config: EngineConfig) -> Engine:
    """An engine around a model that was never in a folder, with its weights where `config` wants them."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    mode = MemoryMode.RESIDENT if config.memory_mode is MemoryMode.AUTO else config.memory_mode
    pipeline = build(SIZES[size], tokenizers, device, dtype)
    if mode is not MemoryMode.RESIDENT:
        pipeline.to("cpu")  # from where weights are streamed
        torch.cuda.empty_cache()
    memory.place(pipeline, mode, device)
    card = ModelCard("random full-size model") if size == "full" else read_card(tokenizers)
    presets = presets_of(tokenizers, config.presets)
    return Engine(
        LoadedModel(pipeline, tokenizers, card, card.limits, presets, device, dtype, mode, "asked for"), config
    )


def build(sizes: Sizes, tokenizers: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline with all parts on `device`. The same device gives the same weights each time."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer", local_files_only=True)
    tokenizer_2 = T5TokenizerFast.from_pretrained(
        tokenizers / "tokenizer_2", local_files_only=True, model_max_length=sizes.text_tokens
    )
    torch.manual_seed(1)
    clip, t5 = make_encoders(sizes, device, dtype, tokenizer.eos_token_id)
    return make_pipeline(
        sizes, device, dtype, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=tokenizer_2
    )


if __name__ == "__main__":
    print(fingerprint(load(sys.argv[1], Path(sys.argv[3]), EngineConfig(device=sys.argv[2]))))
