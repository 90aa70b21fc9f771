"""Checkers from a folder that the operator brings. Knows two formats of transformers and diffusers; decides nothing.

- `ViTForImageClassification` with a label "nsfw", such as Falconsai/nsfw_image_detection;
- `StableDiffusionSafetyChecker`, such as CompVis/stable-diffusion-safety-checker.

`config.json` says which. Safetensors only, off-line, on the CPU; the classes are named here: no code of a folder runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from kontextd_models.errors import ModelError
from kontextd_models.pretrained import load_weights, quiet
from kontextd_models.safety.checker import Checker
from kontextd_models.weight_files import check_weights

VIT_THRESHOLD = 0.85  # BFL's Kontext tool for Falconsai's weights (black-forest-labs/flux, src/flux/content_filters.py)
_LABEL = "nsfw"
# The class rounds how far a concept is exceeded to 3 decimals and flags what is above 0; 0.001 is the least such value.
_CONCEPT_THRESHOLD = 0.0005
_SPECIAL_CARE = 0.01  # what a match of a special-care concept takes off the other concepts' thresholds

Processor = Callable[..., Mapping[str, Tensor]]


def load_folder(folder: Path) -> Checker:
    """The checker in `folder`, tried on one image. Raises `ModelError` naming the file at fault."""
    config = _read_config(folder / "config.json")
    if not (folder / "preprocessor_config.json").is_file():
        raise ModelError(
            f"{folder / 'preprocessor_config.json'} is missing. Put the checker's own beside its config.json."
        )
    check_weights(folder, "model")
    architectures = config.get("architectures")
    matching = [load for name, load in _LOADERS.items() if architectures == [name]]
    if not matching:
        known = " or ".join(_LOADERS)
        raise ModelError(f"{folder / 'config.json'} has the architectures {architectures}; a checker is a {known}.")
    with quiet():
        checker = matching[0](folder)
    _try_out(checker, folder)
    return checker


class VitChecker:
    """Scores are the probability of the label "nsfw"."""

    threshold = VIT_THRESHOLD

    def __init__(self, name: str, model: nn.Module, process: Processor, label: int) -> None:
        self.name = name
        self._model = model
        self._process = process
        self._label = label

    @classmethod
    def load(cls, folder: Path) -> VitChecker:
        from transformers import ViTForImageClassification, ViTImageProcessorPil

        model = _load_model(ViTForImageClassification, folder)
        labels = [index for index, label in model.config.id2label.items() if label.lower() == _LABEL]
        if len(labels) != 1:
            found = ", ".join(map(str, model.config.id2label.values()))
            raise ModelError(f"{folder / 'config.json'} has the labels {found}; one, and one only, must be {_LABEL!r}.")
        return cls(str(folder), model, _load_processor(ViTImageProcessorPil, folder), labels[0])

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        return [self._score(image) for image in images]

    def _score(self, image: Image.Image) -> float:
        logits = self._model(pixel_values=_pixels(self._process, image)).logits  # [1, L]
        return float(logits.softmax(-1)[0, self._label])


class ConceptChecker:
    """Scores are how far the nearest of the model's unsafe concepts exceeds its own threshold, in cosine.

    As in `StableDiffusionSafetyChecker.forward` (diffusers), which gives verdicts only and takes NaN for safe.
    """

    threshold = _CONCEPT_THRESHOLD

    def __init__(self, name: str, model: Any, process: Processor) -> None:  # Any: diffusers' class is untyped
        self.name = name
        self._model = model
        self._process = process

    @classmethod
    def load(cls, folder: Path) -> ConceptChecker:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessorPil

        process = _load_processor(CLIPImageProcessorPil, folder)
        return cls(str(folder), _load_model(StableDiffusionSafetyChecker, folder), process)

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        return [self._score(image) for image in images]

    def _score(self, image: Image.Image) -> float:
        model = self._model
        embedding = model.visual_projection(model.vision_model(_pixels(self._process, image))[1])  # [1, D]
        special = _exceeded(embedding, model.special_care_embeds, model.special_care_embeds_weights)
        concepts = _exceeded(embedding, model.concept_embeds, model.concept_embeds_weights)
        allowance = _SPECIAL_CARE if bool((special.round(decimals=3) > 0).any()) else 0.0
        exceeded = (concepts + allowance).max().round(decimals=3)
        return float(exceeded + 0.0 * special.sum())  # NaN among the special ones must show too


def _exceeded(embedding: Tensor, concepts: Tensor, thresholds: Tensor) -> Tensor:
    """How far the cosine to each of K concepts [K, D] exceeds its threshold [K]."""
    return functional.cosine_similarity(embedding, concepts, dim=-1) - thresholds


_LOADERS: Mapping[str, Callable[[Path], Checker]] = {
    "ViTForImageClassification": VitChecker.load,
    "StableDiffusionSafetyChecker": ConceptChecker.load,
}


def _pixels(process: Processor, image: Image.Image) -> Tensor:
    """[1, 3, H, W] as the model was trained on."""
    return process(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]


def _read_config(file: Path) -> dict[str, Any]:  # Any: JSON
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        remedy = f"A safety checker is 'embedded', or the folder of a {' or '.join(_LOADERS)}."
        raise ModelError(f"{file} is missing. {remedy}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}. Copy it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object. Copy it again.")
    return config


def _load_model(kind: Any, folder: Path) -> Any:  # Any: the loaders of both libraries are untyped
    model, _ = load_weights(kind, folder, torch.float32)
    return model


def _load_processor(kind: Any, folder: Path) -> Processor:  # Any: the loader is untyped
    try:
        processor: Processor = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it promises no set of classes
        raise ModelError(f"{folder / 'preprocessor_config.json'} cannot be used: {error}. Copy it again.") from error
    return processor


def _try_out(checker: Checker, folder: Path) -> None:
    """A folder whose parts do not fit is refused now, not at the first edit."""
    try:
        scores = checker.scores([Image.new("RGB", (96, 64), "grey")])
    except Exception as error:  # the parts of the folder decide what it is
        raise ModelError(f"{folder} fails on a test image: {error}. Copy the checker again.") from error
    if not all(map(math.isfinite, scores)):
        raise ModelError(f"{folder} scores a test image {scores}: its weights are damaged. Copy them again.")
