"""An engine that computes nothing, for tests and for measuring everything around the real one. Knows no torch.

Nothing selects it by a setting or a name: a test or a benchmark builds it and hands it to the worker.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass

from kontextd_models import Done, EditRequest, PresetUse, Step
from kontextd_models.intake import prepare
from kontextd_models.request import seeds
from kontextd_models.resolution import SizePlan
from PIL import Image

from kontextd_server.worker.loaded import LoadedEngine

_PREVIEW_SIDE = 8


@dataclass(frozen=True)
class NullEngine:
    """Returns the input, its first pixel apart, `step_s` seconds after each step was asked for."""

    step_s: float = 0.0

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        picture = prepare(request.image)
        return self._events(request, picture.image)

    def _events(self, request: EditRequest, image: Image.Image) -> Generator[Step | Done, None, None]:
        began = time.perf_counter()
        steps, images = request.num_inference_steps, request.num_images
        for index in range(1, steps * images + 1):
            if self.step_s:  # sleep(0) would still give up the interpreter, and take the kernel 60 µs a step
                time.sleep(self.step_s)
            preview = image.resize((_PREVIEW_SIDE, _PREVIEW_SIDE)) if request.preview_interval else None
            yield Step(index, steps * images, time.perf_counter() - began, (index - 1) // steps, preview)
        total_s, chosen = time.perf_counter() - began, seeds(request.seed, images)
        yield Done(
            images=tuple(_marked(image, seed) for seed in chosen),
            seeds=chosen,
            has_nsfw_concepts=(False,) * images,
            timings={"denoise": total_s, "total": total_s},
            cache_hits={"prompt": False, "reference": False},
            size=SizePlan(*image.size, *image.size, asked=image.size),
            preset=PresetUse(request.acceleration, full=steps * images),
        )


def _marked(image: Image.Image, seed: int) -> Image.Image:
    """No two results are alike: the file store would keep equal ones once."""
    copy = image.copy()
    copy.putpixel((0, 0), (seed % 251, seed % 241, seed % 239))
    return copy


def load_null(engine: NullEngine | None = None) -> LoadedEngine:
    """What `load_kontext` is to the real one."""
    short = EditRequest(Image.new("RGB", (8, 8)), "", num_inference_steps=1)
    return LoadedEngine(engine or NullEngine(), device="null", version="null", warm_up=short)
