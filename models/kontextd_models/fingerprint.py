"""The fixed edits of the proofs, and one boiled down to a SHA-256: two engines agree if they print the same.

Knows engines; judges nothing. `python -m kontextd_models.fingerprint MODEL DEVICE DTYPE MODE MAX_AREA` prints the
SHA-256 from a process of its own; MODEL "-" is the embedded demonstration model, MAX_AREA "-" the model's own.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from kontextd_models import Done, EditRequest, EngineConfig, MemoryMode, ResolutionMode, load_engine
from kontextd_models.acceleration.table import SHIPPED
from kontextd_models.pictures import PICTURES, picture_at
from kontextd_models.resolution import plan

if TYPE_CHECKING:
    from kontextd_models.engine import Engine

SEED, GUIDANCE = 7, 2.5
_STEPS = 2
_PROMPT = "make it black and white"


def fingerprint(engine: Engine) -> str:
    """Of the picture that this engine makes of a photo at the model's native area."""
    done = fixed_edit(engine, photo_at(native_size(engine, 1.5)), _PROMPT, _STEPS)
    return hashlib.sha256(done.images[0].tobytes()).hexdigest()


def fixed_edit(engine: Engine, picture: Image.Image, prompt: str, steps: int, *, checked: bool = False) -> Done:
    """At the picture's own size, always with the same seed and guidance."""
    request = EditRequest(picture, prompt, steps, seed=SEED, guidance_scale=GUIDANCE, enable_safety_checker=checked)
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def native_size(engine: Engine, aspect: float) -> tuple[int, int]:
    """The (width, height) that `auto` makes of an aspect, so that an edit at it is not scaled, whatever the ceiling."""
    limits = engine.model.limits
    height = 1000 * limits.min_input_side  # so large that nothing is rounded
    made = plan(ResolutionMode.AUTO, round(aspect * height), height, limits)
    return made.width, made.height


def photo_at(size: tuple[int, int]) -> Image.Image:
    """The bundled photo at a size."""
    return picture_at(PICTURES[0], size)


def exactly(config: EngineConfig) -> EngineConfig:
    """The same, with blocks that are diffusers' own to the bit: in full precision, uncompiled, by torch's attention.

    The `none` of an operator's table may round otherwise (`Preset.is_exact`); that of the shipped one does not.
    """
    return replace(config, presets=SHIPPED, precision="full", compile="off", attention="native", kernels="off")


def arguments(config: EngineConfig) -> list[str]:
    """What to call this module with for the same engine in another process."""
    return [
        str(config.model or "-"),
        config.device,
        config.dtype,
        config.memory_mode.value,
        str(config.max_area or "-"),
    ]


def main() -> None:
    model, device, dtype, mode, area = sys.argv[1:]
    folder, max_area = None if model == "-" else Path(model), None if area == "-" else int(area)
    config = EngineConfig(model=folder, device=device, dtype=dtype, memory_mode=MemoryMode(mode), max_area=max_area)
    print(fingerprint(load_engine(exactly(config))))


if __name__ == "__main__":
    main()
