"""How well the embedded model follows its instructions, on photos it never saw. Knows the engine's door, no training.

Each photo is edited by each instruction, worded differently each time, at 256 × 256 and 384 × 256 in turn, and compared
with the exact edit. `benchmarks/embedded.py` prints the table; the tests hold it against the gates.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kontextd_models import Done, EditRequest
from kontextd_models.embedded import edits, wordings
from kontextd_models.engine import Engine

SIZES = ((256, 256), (384, 256))
_MIN_GAIN_DB = 5.0


@dataclass(frozen=True)
class Gate:
    """The least a row may have, in dB. `gain` is over the unedited photo, `untouched` outside of what was painted."""

    exact: float
    gain: float | None = None
    untouched: float | None = None


GATES: Mapping[str, Gate] = {
    "colour": Gate(24, gain=_MIN_GAIN_DB),
    "joined": Gate(24, gain=_MIN_GAIN_DB),
    "flip": Gate(22),
    "local": Gate(22, untouched=24),
    "identity": Gate(26),
}


@dataclass(frozen=True)
class Row:
    """Means over photos of PSNR in dB: the result, and the unedited photo, against the exact edit."""

    instruction: str
    kind: str
    photos: int
    exact: float
    unedited: float | None = None
    untouched: float | None = None

    def misses(self, margin: float = 0.0) -> list[str]:
        """What falls short of the gate of its kind, by more than `margin` dB."""
        gate, gain = GATES[self.kind], None if self.unedited is None else self.exact - self.unedited
        short = (
            ("exact edit", self.exact, gate.exact),
            ("gain over the unedited photo", gain, gate.gain),
            ("untouched region", self.untouched, gate.untouched),
        )
        return [
            f"{self.instruction}: {what} {value:.1f} dB, below {least:g}"
            for what, value, least in short
            if value is not None and least is not None and not value >= least - margin
        ]


def evaluate(engine: Engine, photos: Sequence[Image.Image], steps: int) -> Iterator[Row]:
    """A row for each instruction that has an exact result, one for joined ones, one for any other prompt."""
    pictures = [fitted(photo, SIZES[index % len(SIZES)]) for index, photo in enumerate(photos)]
    for index, edit in enumerate(edits.EDITS):
        if edit.kind != "random":
            prompts = [wordings.single(index, random.Random(f"{index} {seed}")) for seed in range(len(pictures))]
            yield _row(engine, pictures, edit.name, edit.kind, prompts, [(index,)] * len(pictures), steps)
    pairs = [tuple(random.Random(seed).sample(edits.COLOUR, 2)) for seed in range(len(pictures))]
    joined = [wordings.joined(pair[0], pair[1], random.Random(seed)) for seed, pair in enumerate(pairs)]
    yield _row(engine, pictures, "two joined", "joined", joined, pairs, steps)
    known = wordings.known_prompts()
    others = [wordings.other(random.Random(seed), known) for seed in range(len(pictures))]
    yield _row(engine, pictures, "any other prompt", "identity", others, [(edits.IDENTITY,)] * len(pictures), steps)


def _row(
    engine: Engine,
    pictures: Sequence[Image.Image],
    name: str,
    kind: str,
    prompts: Sequence[str],
    classes: Sequence[tuple[int, ...]],
    steps: int,
) -> Row:
    exact, unedited, untouched = [], [], []
    for seed, (picture, prompt, wanted) in enumerate(zip(pictures, prompts, classes, strict=True)):
        before = as_tensor(picture)
        after = as_tensor(edited(engine, picture, prompt, steps, seed))
        target = edits.apply(before, wanted, random.Random(0))
        exact.append(psnr(after, target))
        unedited.append(psnr(before, target))
        if name in edits.MASKS:
            mask = edits.MASKS[name](before.shape[1], before.shape[2], before)
            untouched.append(psnr(after[:, mask == 0], before[:, mask == 0]))
    row = Row(name, kind, len(pictures), statistics.fmean(exact))
    if kind == "identity":
        return row
    return replace(
        row, unedited=statistics.fmean(unedited), untouched=statistics.fmean(untouched) if untouched else None
    )


def edited(
    engine: Engine, picture: Image.Image, prompt: str, steps: int, seed: int, guidance_scale: float = 2.5
) -> Image.Image:
    """The one image of an edit."""
    *_, done = engine.edit(EditRequest(picture, prompt, steps, seed, guidance_scale, enable_safety_checker=False))
    assert isinstance(done, Done)
    return done.images[0]


def fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a photo at `size`, RGB."""
    return ImageOps.fit(photo.convert("RGB"), size, Image.Resampling.LANCZOS)


def as_tensor(picture: Image.Image) -> Tensor:
    """[3, H, W], 0..1."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in 0..1."""
    error = (one.double() - other.double()).square().mean()
    return float(-10 * torch.log10(error.clamp(min=1e-10)))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| Instruction | Exact edit, dB | Unedited photo, dB | Untouched region, dB |", "|---|---|---|---|"]
    for row in rows:
        cells = (row.exact, row.unedited, row.untouched)
        lines.append(
            f"| {row.instruction} | " + " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells) + " |"
        )
    return "\n".join(lines)
