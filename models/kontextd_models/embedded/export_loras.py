"""Stage "loras", its end: what peft trained, as files in the dialects of the field. Knows key names; trains nothing.

Each of the LoRAs that ship is in another dialect, so that what is read in the wild is read here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kontextd_models.embedded import lora_file
from kontextd_models.lora.dialects.names import Module, modules
from kontextd_models.lora.layout import Layout

# (up [out, r], down [r, in]) by diffusers' name of the linear. alpha is r.
Factors = Mapping[str, tuple[Tensor, Tensor]]
Named = Iterator[tuple[str, Tensor]]


def export_lora(style: str, trained: Path, layout: Layout) -> Path:
    """Write the LoRA that ships from what `train_loras` left, in float16; return the file."""
    tensors = load_file(trained)
    stems = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    factors = {stem: (tensors[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_A.weight"]) for stem in stems}
    path = lora_file(style)
    path.parent.mkdir(exist_ok=True)
    written = {name: value.half().contiguous() for name, value in DIALECTS[style](factors, layout)}
    save_file(written, path, metadata=_metadata(style, factors))
    path.chmod(0o644)  # safetensors leaves it to its owner alone
    return path


def _diffusers(factors: Factors, layout: Layout) -> Named:
    for stem, (up, down) in factors.items():
        yield f"transformer.{stem}.lora_A.weight", down
        yield f"transformer.{stem}.lora_B.weight", up


def _onetrainer(factors: Factors, layout: Layout) -> Named:
    for stem, (up, down) in factors.items():
        yield from _with_alpha(f"lora_transformer_{stem.replace('.', '_')}", up, down)


def _comfyui(factors: Factors, layout: Layout) -> Named:
    for name, (up, down) in _fused(factors, layout):
        yield f"diffusion_model.{name}.lora_A.weight", down
        yield f"diffusion_model.{name}.lora_B.weight", up


def _kohya(factors: Factors, layout: Layout) -> Named:
    for name, (up, down) in _fused(factors, layout):
        yield from _with_alpha(f"lora_unet_{name.replace('.', '_')}", up, down)


DIALECTS: Mapping[str, Callable[[Factors, Layout], Named]] = {
    "duotone": _diffusers,
    "vignette": _kohya,
    "pixelate": _comfyui,
    "line-drawing": _onetrainer,
}


def _with_alpha(name: str, up: Tensor, down: Tensor) -> Named:
    yield f"{name}.lora_down.weight", down
    yield f"{name}.lora_up.weight", up
    yield f"{name}.alpha", torch.tensor(float(down.shape[0]))


def _fused(factors: Factors, layout: Layout) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The same deltas under the reference implementation's names, which has q, k and v in one matrix."""
    spelled = [(name, _stems(module)) for name, module in modules(layout) if module.spelling == "BFL"]
    written: set[str] = set()
    for name, stems in sorted(spelled, key=lambda found: -len(found[1])):  # linear1 goes before linear1_qkv
        if all(stem in factors and stem not in written for stem in stems):
            written.update(stems)
            ups, downs = zip(*(factors[stem] for stem in stems), strict=True)
            yield name, (torch.block_diag(*ups), torch.cat(downs))


def _stems(module: Module) -> list[str]:
    return [part.parameter.name.removesuffix(".weight") for part in module.parts]


def _metadata(style: str, factors: Factors) -> dict[str, str]:
    ranks = {down.shape[0] for _, down in factors.values()}
    return {
        "modelspec.title": f"kontextd demonstration LoRA: {style}",
        "modelspec.description": "For the demonstration model in kontextd's package, and for no other.",
        "modelspec.license": "Apache-2.0",
        "rank": json.dumps(sorted(ranks)),
    }
