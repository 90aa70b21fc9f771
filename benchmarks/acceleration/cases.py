"""The edits that presets are judged by: photos, instructions, and exact results where there are. Knows no presets.

Each photo is edited by each instruction at 256×256 and 384×256 in turn, worded and seeded as in
`kontextd_models.embedded.evaluate`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kontextd_models import EditRequest, LoraWeight
from kontextd_models.embedded import edits, lora_file, wordings
from kontextd_models.embedded.evaluate import SIZES, as_tensor, fitted
from kontextd_models.embedded.styles import STYLES
from PIL import Image
from torch import Tensor

STEPS = 30
LORAS = ("duotone", "pixelate")  # of the pairs that ship, the two that go together best (results/loras.json)
# One of each kind, and the random ones: what the mechanisms are measured on in many settings.
FEW_INSTRUCTIONS = (
    "black and white", "turn upside down", "red circle",
    "confetti", "starry sky over the upper half", "mosaic of random tiles",
)  # fmt: skip
FEW_PHOTOS = ("astronaut", "chelsea", "coffee", "flower")


@dataclass(frozen=True)
class Case:
    """One edit: a photo, and an index into `edits.EDITS`."""

    photo: str
    before: Image.Image
    index: int
    prompt: str
    seed: int
    loras: tuple[str, ...] = ()

    @property
    def instruction(self) -> str:
        return edits.NAMES[self.index]

    @property
    def kind(self) -> edits.Kind:
        return edits.EDITS[self.index].kind

    @property
    def request(self) -> EditRequest:
        loras = tuple(LoraWeight(lora_file(style)) for style in self.loras)
        return EditRequest(self.before, self.prompt, STEPS, self.seed, loras=loras, enable_safety_checker=False)

    @property
    def key(self) -> tuple[object, ...]:
        """What its result depends on, but for the preset."""
        return (self.photo, self.before.size, self.prompt, self.seed, self.loras)

    @property
    def exact(self) -> Tensor | None:
        """[3, H, W], 0..1; the LoRAs' styles are drawn over what the instruction makes of the photo."""
        if self.kind == "random":
            return None
        exact = edits.apply(as_tensor(self.before), (self.index,), random.Random(0))
        for style in self.loras:
            exact = STYLES[style](exact)
        return exact

    @property
    def untouched(self) -> Tensor | None:
        """[H, W], True outside of what a local edit paints; None for the others."""
        if self.instruction not in edits.MASKS:
            return None
        pixels = as_tensor(self.before)
        return edits.MASKS[self.instruction](pixels.shape[1], pixels.shape[2], pixels) == 0


def cases(photos: Mapping[str, Image.Image], names: Sequence[str] = edits.NAMES) -> Iterator[Case]:
    """Every photo by every one of the instructions, one instruction after the other."""
    pictures = [fitted(picture, SIZES[seed % len(SIZES)]) for seed, picture in enumerate(photos.values())]
    for name in names:
        index = edits.NAMES.index(name)
        for seed, (photo, before) in enumerate(zip(photos, pictures, strict=True)):
            yield Case(photo, before, index, wordings.single(index, random.Random(f"{index} {seed}")), seed)
