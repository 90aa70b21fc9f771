"""What a key begins with: the component it is of, and who writes so. Knows the starts of names; knows no modules.

Sources: the savers of diffusers, peft, sd-scripts (`LORA_PREFIX_…`), OneTrainer (`convert_flux_lora.py`), LyCORIS
(`LORA_PREFIX`), and what ComfyUI's `model_lora_keys_unet` and `model_lora_keys_clip` look for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kontextd_models.lora.layout import Component


@dataclass(frozen=True)
class Prefix:
    """`flat`: what follows has underscores for dots. `dialect` None: that of the spelling of what follows."""

    text: str
    component: Component
    dialect: str | None = None
    flat: bool = False


_PEFT = "PEFT"
_COMFY = "ComfyUI"
_KOHYA = "kohya"

# A longer prefix stands before one that it begins with.
_PREFIXES = (
    Prefix("lora_unet_", Component.TRANSFORMER, _KOHYA, flat=True),
    Prefix("lora_te1_", Component.CLIP, _KOHYA, flat=True),
    Prefix("lora_te_", Component.CLIP, _KOHYA, flat=True),
    Prefix("lora_te2_", Component.T5, _KOHYA, flat=True),  # sd-scripts until 2024-09, OneTrainer
    Prefix("lora_te3_", Component.T5, _KOHYA, flat=True),  # sd-scripts since
    Prefix("lora_transformer_", Component.TRANSFORMER, "OneTrainer", flat=True),
    Prefix("lycoris_", Component.TRANSFORMER, "LyCORIS", flat=True),
    Prefix("clip_l.", Component.CLIP, "OneTrainer"),
    Prefix("t5.", Component.T5, "OneTrainer"),
    Prefix("text_encoders.clip_l.transformer.", Component.CLIP, _COMFY),
    Prefix("text_encoders.t5xxl.transformer.", Component.T5, _COMFY),
    Prefix("text_encoder.base_model.model.", Component.CLIP, _PEFT),
    Prefix("text_encoder.", Component.CLIP),
    Prefix("text_encoder_2.base_model.model.", Component.T5, _PEFT),
    Prefix("text_encoder_2.", Component.T5),
    Prefix("transformer.base_model.model.", Component.TRANSFORMER, _PEFT),
    Prefix("transformer.", Component.TRANSFORMER),
    Prefix("base_model.model.", Component.TRANSFORMER, _PEFT),
    Prefix("diffusion_model.", Component.TRANSFORMER, _COMFY),
    Prefix("model.diffusion_model.", Component.TRANSFORMER, _COMFY),
    Prefix("", Component.TRANSFORMER),
)
_FAL = {(_PEFT, "BFL"): "fal trainer"}  # peft over the reference implementation's names


def readings(name: str) -> Iterator[tuple[Prefix, str]]:
    """Each prefix that the name begins with, and the rest of the name."""
    for prefix in _PREFIXES:
        if name.startswith(prefix.text):
            yield prefix, name[len(prefix.text) :]


def dialect(prefix: Prefix, spelling: str) -> str:
    """The usual name of a spelling under a prefix."""
    if prefix.dialect is None:
        return spelling
    return _FAL.get((prefix.dialect, spelling), prefix.dialect)
