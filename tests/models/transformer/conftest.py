"""The forward passes of one request on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from kontextd_models import EngineConfig
from kontextd_models.denoise import draw_noise
from kontextd_models.encode import EncodedPrompt, EncodedReference, encode_prompt, encode_reference
from kontextd_models.loading import LoadedModel, load_model
from kontextd_models.transformer.forward import Inputs
from kontextd_models.transformer.modulation import Conditions
from PIL import Image
from torch import Tensor

STEPS = 4
Requests = Callable[[LoadedModel], tuple[Inputs, Tensor]]


@pytest.fixture(scope="session")
def unguided_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes no guidance scale."""
    return tiny.build(tmp_path_factory.mktemp("models") / "unguided", guidance_embeds=False)


@pytest.fixture(params=["guided", "unguided", "bfloat16"])
def model(request: pytest.FixtureRequest, tiny_folder: Path, unguided_folder: Path) -> LoadedModel:
    folder = unguided_folder if request.param == "unguided" else tiny_folder
    dtype = "bfloat16" if request.param == "bfloat16" else "float32"
    return load_model(EngineConfig(model=folder, device="cpu", dtype=dtype))


@pytest.fixture
def made(photo: Callable[[int, int], Image.Image]) -> Requests:
    """What a request for 80×48 with a reference of 64×64 hands the transformer, and its noise."""

    def make(model: LoadedModel) -> tuple[Inputs, Tensor]:
        pipeline = model.pipeline
        with torch.no_grad():
            prompt: EncodedPrompt = encode_prompt(pipeline, "make it red", tiny.PROMPT_TOKENS, model.device)
            reference: EncodedReference = encode_reference(pipeline, photo(64, 64), model.dtype, model.device)
        noise = draw_noise(pipeline, 3, 80, 48, model.dtype, model.device)
        ids = pipeline._prepare_latent_image_ids(1, 48 // 16, 80 // 16, model.device, model.dtype)
        times = torch.tensor([1.0, 0.9, 0.6, 0.3], dtype=model.dtype)
        guidance = torch.full([1], 2.5) if pipeline.transformer.config.guidance_embeds else None
        return Inputs(prompt, reference, ids, Conditions(times, guidance, prompt.pooled)), noise

    return make
