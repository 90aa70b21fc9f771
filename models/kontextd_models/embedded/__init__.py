"""The embedded demonstration model: a small FLUX.1 Kontext, trained here from nothing, that knows a list of edits.

It edits real photos on a CPU in seconds, so that everything around it can be tried and tested without other weights.
It is a demonstration, no product: any prompt that is not one of its instructions gives the photo back unchanged.
"""

from __future__ import annotations

from pathlib import Path


def embedded_model_dir() -> Path:
    """The diffusers folder that ships in the package."""
    return Path(__file__).parent / "model"


def sample_photo() -> Path:
    """A photo to try the model on: `chelsea` by Stéfan van der Walt, CC0."""
    return Path(__file__).parent / "samples" / "chelsea.jpg"


def lora_file(style: str) -> Path:
    """One of the LoRAs that ship for it, by the name of its style in `styles.STYLES`."""
    return Path(__file__).parent / "loras" / f"{style}.safetensors"
