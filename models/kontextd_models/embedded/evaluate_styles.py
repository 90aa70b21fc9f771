"""What the demonstration LoRAs do to photos they never saw. Knows the engine's door and the exact styles, no training.

`benchmarks/loras.py` prints the table; the tests hold it against the gates.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from kontextd_models import Done, EditRequest, LoraWeight
from kontextd_models.embedded import lora_file
from kontextd_models.embedded.evaluate import SIZES, as_tensor, fitted, psnr
from kontextd_models.embedded.styles import STYLES
from kontextd_models.engine import Engine

EXACT_DB = 20.0  # the least against the exact style


@dataclass(frozen=True)
class StyleRow:
    """Means over photos of PSNR in dB, against the exact style but for `half_plain`, against the unedited photo.

    `plain`: the model without the LoRA; `half`: the LoRA at scale 0.5, `full`: at scale 1.
    """

    style: str
    photos: int
    plain: float
    half: float
    full: float
    full_plain: float
    half_plain: float

    def misses(self, margin: float = 0.0) -> list[str]:
        """What falls short: the exact style, or the place of scale 0.5 between none and all."""
        told = []
        if not self.full >= EXACT_DB - margin:
            told.append(f"{self.style}: exact style {self.full:.1f} dB, below {EXACT_DB:g}")
        if not self.plain < self.half < self.full:
            told.append(
                f"{self.style}: at scale 0.5 {self.half:.1f} dB, not between {self.plain:.1f} and {self.full:.1f}"
            )
        if not self.half_plain > self.full_plain:
            told.append(f"{self.style}: scale 0.5 is no nearer to the photo than scale 1")
        return told


@dataclass(frozen=True)
class PairRow:
    """Means over photos of PSNR in dB against both exact styles, one after the other: with both LoRAs, and with one."""

    styles: tuple[str, str]
    photos: int
    both: float
    first: float
    second: float

    def misses(self) -> list[str]:
        """Both together must be nearer to both styles than either alone."""
        if self.both > max(self.first, self.second):
            return []
        return [f"{' + '.join(self.styles)}: {self.both:.1f} dB, no better than one alone"]


def evaluate_styles(engine: Engine, photos: Sequence[Image.Image], steps: int) -> Iterator[StyleRow]:
    """A row for each LoRA that ships."""
    pictures = _pictures(photos)
    for style, exact in STYLES.items():
        befores = [as_tensor(picture) for picture in pictures]
        targets = [exact(before) for before in befores]
        plain, half, full = (
            [_styled(engine, picture, {style: scale}, steps, seed) for seed, picture in enumerate(pictures)]
            for scale in (0.0, 0.5, 1.0)
        )
        yield StyleRow(
            style,
            len(pictures),
            plain=_mean(plain, targets),
            half=_mean(half, targets),
            full=_mean(full, targets),
            full_plain=_mean(full, befores),
            half_plain=_mean(half, befores),
        )


def evaluate_pairs(engine: Engine, photos: Sequence[Image.Image], steps: int) -> Iterator[PairRow]:
    """A row for each two LoRAs that ship, both at scale 1, against the better of the two orders."""
    pictures = _pictures(photos)
    for pair in itertools.combinations(STYLES, 2):
        scales: tuple[dict[str, float], ...] = (dict.fromkeys(pair, 1.0), {pair[0]: 1.0}, {pair[1]: 1.0})
        results = [
            [_styled(engine, picture, each, steps, seed) for seed, picture in enumerate(pictures)] for each in scales
        ]
        orders = (pair, pair[::-1])
        targets = [[_after(as_tensor(picture), order) for picture in pictures] for order in orders]
        nearest = max(targets, key=lambda target: _mean(results[0], target))
        both, first, second = (_mean(result, nearest) for result in results)
        yield PairRow(pair, len(pictures), both, first, second)


def styled(
    engine: Engine, picture: Image.Image, scales: dict[str, float], steps: int, seed: int, prompt: str | None = None
) -> Image.Image:
    """The one image of an edit that asks for nothing but the LoRAs."""
    loras = tuple(LoraWeight(lora_file(style), scale) for style, scale in scales.items())
    request = EditRequest(
        picture, prompt or engine.model.card.identity_prompt, steps, seed, loras=loras, enable_safety_checker=False
    )
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done.images[0]


def _styled(engine: Engine, picture: Image.Image, scales: dict[str, float], steps: int, seed: int) -> Tensor:
    return as_tensor(styled(engine, picture, scales, steps, seed))


def _pictures(photos: Sequence[Image.Image]) -> list[Image.Image]:
    return [fitted(photo, SIZES[index % len(SIZES)]) for index, photo in enumerate(photos)]


def _after(picture: Tensor, order: Sequence[str]) -> Tensor:
    for style in order:
        picture = STYLES[style](picture)
    return picture


def _mean(results: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    return statistics.fmean(psnr(result, target) for result, target in zip(results, targets, strict=True))
