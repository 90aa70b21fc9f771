"""Training pictures for the embedded model: crops of freely licensed photos, and procedural images. Knows no model.

All randomness comes from the `random.Random` that is passed in, so a run can be repeated.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

_SCALES = (1.0, 0.8, 0.64, 0.5)
_LONGEST = 400  # pixels: larger photos are reduced first, so that crops show as much as a 256 px picture does


class Photos:
    """The photos of a folder as tensors [3, H, W], uint8, at several scales."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.iterdir() if path.suffix in {".webp", ".jpg", ".jpeg", ".png"})
        if not paths:
            raise FileNotFoundError(f"no photos in {folder}: make them with kontextd_models.embedded.photos")
        self._photos = [scaled for path in paths for scaled in _pyramid(path)]

    def crop(self, height: int, width: int, rng: random.Random) -> Tensor:
        """A random piece [3, height, width], float 0..1, sometimes mirrored, turned or re-lit."""
        if rng.random() < 0.12:
            return procedural(height, width, rng)
        turned = rng.random() < 0.2
        piece = _cut(rng.choice(self._photos), *((width, height) if turned else (height, width)), rng)
        if turned:
            piece = piece.transpose(1, 2)
        if rng.random() < 0.5:
            piece = piece.flip(2)
        return _relight(piece, rng)


def _pyramid(path: Path) -> list[Tensor]:
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    sizes = [(round(photo.width * scale), round(photo.height * scale)) for scale in _SCALES]
    return [
        torch.from_numpy(np.array(photo.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1).contiguous()
        for size in sizes
    ]


def _cut(photo: Tensor, height: int, width: int, rng: random.Random) -> Tensor:
    enlarge = max(height / photo.shape[1], width / photo.shape[2])
    if enlarge > 1:
        size = (max(height, round(photo.shape[1] * enlarge)), max(width, round(photo.shape[2] * enlarge)))
        photo = functional.interpolate(photo[None].float(), size, mode="bilinear", align_corners=False)[0]
    top = rng.randint(0, photo.shape[1] - height)
    left = rng.randint(0, photo.shape[2] - width)
    return photo[:, top : top + height, left : left + width].float() / 255


def _relight(piece: Tensor, rng: random.Random) -> Tensor:
    if rng.random() < 0.4:
        gain = torch.tensor([rng.uniform(0.7, 1.3) for _ in range(3)]).view(3, 1, 1)
        piece = piece * gain + rng.uniform(-0.15, 0.15)
    if rng.random() < 0.1:
        piece = piece[torch.tensor(rng.sample(range(3), 3))]
    return piece.clamp(0, 1)


def procedural(height: int, width: int, rng: random.Random) -> Tensor:
    """A made-up picture [3, height, width], 0..1: a gradient, smooth noise, then a few flat shapes."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    corners = torch.rand(1, 3, 2, 2, generator=generator)
    picture = functional.interpolate(corners, (height, width), mode="bilinear", align_corners=True)[0]
    cells = rng.choice((2, 4, 8, 16))
    noise = torch.rand(1, 3, max(2, height // cells), max(2, width // cells), generator=generator)
    texture = functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)[0]
    picture = torch.lerp(picture, texture, rng.choice((0.0, 0.2, 0.5)))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(rng.randint(0, 5)):
        centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
        radius_y, radius_x = rng.uniform(4, height / 2), rng.uniform(4, width / 2)
        distance_y, distance_x = (y - centre_y).abs() / radius_y, (x - centre_x).abs() / radius_x
        inside = torch.maximum(distance_y, distance_x) < 1 if rng.random() < 0.5 else distance_y**2 + distance_x**2 < 1
        colour = torch.rand(3, 1, generator=generator)
        picture[:, inside] = colour if rng.random() < 0.8 else 1 - picture[:, inside]
    return picture.clamp(0, 1)
