"""The way to `dialect_files.py`, and the layouts of a tiny and of the real model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from kontextd_models.lora.layout import Layout, layout_of
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path: only this folder knows dialect_files.py


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> FluxKontextPipeline:
    """Random weights, for all tests of a run: do not change them."""
    return FluxKontextPipeline.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def tiny_layout(tiny_pipeline: FluxKontextPipeline) -> Layout:
    return layout_of(tiny_pipeline)


@pytest.fixture(scope="session")
def full_layout() -> Layout:
    """FLUX.1 Kontext [dev]: 19 and 38 blocks, 3072 wide; no weights."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        )
    return layout_of(SimpleNamespace(transformer=transformer, text_encoder=clip, text_encoder_2=t5))
