"""Stage "export": the averaged weights of all stages as one diffusers folder, in float16 to keep it small."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file, save_file

from kontextd_models.acceleration.table import PRESETS_FILE
from kontextd_models.checksums import record
from kontextd_models.embedded import architecture
from kontextd_models.embedded.edits import NAMES
from kontextd_models.embedded.loop import averaged
from kontextd_models.embedded.train_text import Reader
from kontextd_models.encode import Pipeline
from kontextd_models.limits import ModelLimits
from kontextd_models.resolution import preferred_sizes

_NATIVE, _LARGEST, _SMALLEST = 256**2, 512**2, 128**2
_IDENTITY_PROMPT = "keep it as it is"


def card() -> dict[str, object]:
    """`kontextd.json`: what the model is, what it knows, what sizes it takes."""
    limits = ModelLimits(
        preferred_sizes=preferred_sizes(_NATIVE), native_area=_NATIVE, max_area=_LARGEST, min_area=_SMALLEST
    )
    return {
        "name": "kontextd embedded demonstration model",
        "demonstration": True,
        "instructions": list(NAMES),
        "identity_prompt": _IDENTITY_PROMPT,
        "limits": asdict(limits),
    }


def export(work: Path, out: Path) -> None:
    """Write the folder `out` anew from the checkpoints in `work`."""
    reader = Reader(work)
    reader.load_state_dict(averaged(work / "text.safetensors"))
    vae = architecture.vae()
    vae.load_state_dict(averaged(work / "vae.safetensors"))
    transformer = architecture.transformer()
    transformer.load_state_dict(averaged(work / "flow.safetensors"))
    pipeline: Pipeline = FluxKontextPipeline(
        scheduler=architecture.scheduler(),
        vae=vae,
        text_encoder=reader.clip,
        tokenizer=reader.clip_tokenizer,
        text_encoder_2=reader.t5,
        tokenizer_2=reader.t5_tokenizer,
        transformer=transformer,
    )
    presets = out / PRESETS_FILE  # chosen for the model, not made by its training
    rows = presets.read_text(encoding="utf-8") if presets.exists() else None
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out, safe_serialization=True)
    for weights in out.rglob("*.safetensors"):
        _write_halved(weights, load_file(weights))
    (out / "kontextd.json").write_text(json.dumps(card(), indent=2) + "\n")
    if rows is not None:
        presets.write_text(rows, encoding="utf-8")
    record(out)


def replace_weights(part: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put other weights into one part of an exported folder, such as `folder / "transformer"`."""
    (weights,) = part.glob("*.safetensors")
    _write_halved(weights, tensors)
    record(part.parent)


def _write_halved(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    halved = {name: value.half().contiguous() for name, value in tensors.items()}
    for name, value in halved.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} leaves the range of float16")
    save_file(halved, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone; the folder is installed for everybody
