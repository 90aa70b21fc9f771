"""One fixed edit, boiled down to a SHA-256: two engines agree if they print the same. Knows no checks.

`python -m kontextd_models.fingerprint MODEL DEVICE DTYPE MODE` prints it from a process of its own; MODEL "-" is the
embedded demonstration model.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from kontextd_models import Done, EditRequest, EngineConfig, MemoryMode, load_engine
from kontextd_models.embedded import sample_photo

if TYPE_CHECKING:
    from kontextd_models.engine import Engine

_STEPS, _SEED = 2, 20260
_PROMPT = "make it black and white"


def fingerprint(engine: Engine) -> str:
    """Of the picture that this engine makes of the sample photo at the model's native area."""
    request = EditRequest(
        image=photo_at(native_size(engine, 1.5)),
        prompt=_PROMPT,
        num_inference_steps=_STEPS,
        seed=_SEED,
        enable_safety_checker=False,
    )
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return hashlib.sha256(done.images[0].tobytes()).hexdigest()


def native_size(engine: Engine, aspect: float) -> tuple[int, int]:
    """The model's preferred (width, height) nearest to an aspect, so that an edit at it is not scaled."""
    fitting = [
        size for size in engine.model.limits.preferred_sizes if size[0] * size[1] <= engine.model.limits.max_area
    ]
    return min(fitting or engine.model.limits.preferred_sizes, key=lambda size: abs(size[0] / size[1] / aspect - 1))


def photo_at(size: tuple[int, int]) -> Image.Image:
    """The middle of the bundled photo, cut to the aspect of `size` and scaled to it."""
    with Image.open(sample_photo()) as photo:
        width = min(photo.width, round(photo.height * size[0] / size[1]))
        height = min(photo.height, round(width * size[1] / size[0]))
        left, top = (photo.width - width) // 2, (photo.height - height) // 2
        cut = photo.convert("RGB").crop((left, top, left + width, top + height))
    return cut.resize(size, Image.Resampling.LANCZOS)


def arguments(config: EngineConfig) -> list[str]:
    """What to call this module with for the same engine in another process."""
    return [str(config.model or "-"), config.device, config.dtype, config.memory_mode.value]


def main() -> None:
    model, device, dtype, mode = sys.argv[1:]
    folder = None if model == "-" else Path(model)
    engine = load_engine(EngineConfig(model=folder, device=device, dtype=dtype, memory_mode=MemoryMode(mode)))
    print(fingerprint(engine))


if __name__ == "__main__":
    main()
