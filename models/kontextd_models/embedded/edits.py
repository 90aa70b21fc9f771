"""What the embedded model's instructions mean: for each one the exact edit, as arithmetic on pixels.

The training targets and the yardstick of the evaluation. Images are float tensors [3, H, W] in 0..1. Knows no model.
Edits of the kind "random" draw something else each time: they have no exact result, and curved denoising trajectories.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Exact = Callable[[Tensor], Tensor]
Drawn = Callable[[Tensor, random.Random], Tensor]
Kind = Literal["colour", "flip", "local", "random"]

_LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as in Pillow's mode L
# The sepia matrix of the W3C Filter Effects specification, at full strength.
_SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
_BLUR_SIGMA, _POSTER_SIGMA = 5.0, 2.0  # pixels
_POSTER_SOFTNESS = 0.5  # width of a step between two levels, in steps
_BORDER = 16  # pixels
_CIRCLE_RADIUS = 0.25  # of the shorter side
_RED = (0.86, 0.12, 0.12)
_BLUE = (0.12, 0.24, 0.86)
_PALETTE = ((0.9, 0.15, 0.2), (1.0, 0.75, 0.1), (0.15, 0.7, 0.25), (0.15, 0.4, 0.9), (0.65, 0.2, 0.8), (1.0, 0.5, 0.75))
_PIXELS_PER_DISC, _PIXELS_PER_STAR = 2400, 900
_TILE = 32  # pixels


@dataclass(frozen=True)
class Edit:
    """One instruction: its name, its kind, and how it is drawn. Colour edits can be joined two by two."""

    name: str
    kind: Kind
    draw: Drawn


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


def grey(image: Tensor) -> Tensor:
    """Its luma (Rec. 601) in all channels."""
    return (image * _column(_LUMA, image)).sum(0, keepdim=True).expand_as(image)


def _sepia(image: Tensor) -> Tensor:
    matrix = torch.tensor(_SEPIA, dtype=image.dtype, device=image.device)
    return torch.einsum("oc,chw->ohw", matrix, image).clamp(0, 1)


def _contrast(image: Tensor) -> Tensor:
    return ((image - 0.5) * 1.75 + 0.5).clamp(0, 1)


def _desaturate(image: Tensor) -> Tensor:
    luma = grey(image)
    return luma + 0.25 * (image - luma)


def _tint(red: float, green: float, blue: float) -> Exact:
    return lambda image: (image * _column((red, green, blue), image)).clamp(0, 1)


def blurred(image: Tensor, sigma: float = _BLUR_SIGMA) -> Tensor:
    """By a Gaussian of `sigma` pixels; the border is continued."""
    radius = int(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    rows = functional.conv2d(functional.pad(image[:, None], (radius, radius, 0, 0), "replicate"), kernel)
    columns = functional.conv2d(functional.pad(rows, (0, 0, radius, radius), "replicate"), kernel.transpose(2, 3))
    return columns[:, 0]


def _posterize(image: Tensor) -> Tensor:
    """Three levels a channel, of a smoothed picture and with soft steps: hard ones are finer than the latents show."""
    steps = 2 * blurred(image, _POSTER_SIGMA)
    level = steps.floor()
    rise = ((steps - level - 0.5) / _POSTER_SOFTNESS + 0.5).clamp(0, 1)
    return ((level + rise**2 * (3 - 2 * rise)) / 2).clamp(0, 1)


def circle_mask(height: int, width: int, like: Tensor) -> Tensor:
    """[H, W] coverage, 0..1, of the circle in the middle; the edge is one pixel soft."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5 - height / 2
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5 - width / 2
    distance = (y[:, None] ** 2 + x[None, :] ** 2).sqrt()
    return (_CIRCLE_RADIUS * min(height, width) - distance + 0.5).clamp(0, 1)


def border_mask(height: int, width: int, like: Tensor) -> Tensor:
    """[H, W], 1 on the border."""
    mask = torch.ones(height, width, dtype=like.dtype, device=like.device)
    mask[_BORDER:-_BORDER, _BORDER:-_BORDER] = 0
    return mask


def left_mask(height: int, width: int, like: Tensor) -> Tensor:
    """[H, W], 1 on the left half."""
    mask = torch.zeros(height, width, dtype=like.dtype, device=like.device)
    mask[:, : width // 2] = 1
    return mask


MASKS = {"red circle": circle_mask, "white border": border_mask, "left half blue": left_mask}


def _paint(name: str, colour: Sequence[float]) -> Exact:
    def paint(image: Tensor) -> Tensor:
        mask = MASKS[name](image.shape[1], image.shape[2], image)
        return image * (1 - mask) + _column(colour, image) * mask

    return paint


def _spots(image: Tensor, centres: Sequence[tuple[float, float]], radii: Sequence[float]) -> Tensor:
    """[S, H, W] coverage, 0..1, of discs at (y, x); their edges are one pixel soft."""
    height, width = image.shape[1:]
    at, radius = torch.tensor(centres).view(-1, 2), torch.tensor(radii).view(-1, 1, 1)
    y = torch.arange(height)[None, :, None] + 0.5 - at[:, 0, None, None]
    x = torch.arange(width)[None, None, :] + 0.5 - at[:, 1, None, None]
    return (radius - (y**2 + x**2).sqrt() + 0.5).clamp(0, 1)


def _confetti(image: Tensor, rng: random.Random) -> Tensor:
    height, width = image.shape[1:]
    count = max(1, height * width // _PIXELS_PER_DISC)
    centres = [(rng.uniform(0, height), rng.uniform(0, width)) for _ in range(count)]
    discs = _spots(image, centres, [rng.uniform(5, 9) for _ in range(count)])
    for disc in discs:
        image = torch.lerp(image, _column(rng.choice(_PALETTE), image), disc)
    return image


def _starry_sky(image: Tensor, rng: random.Random) -> Tensor:
    """The upper half becomes a night sky with stars."""
    height, width = image.shape[1] // 2, image.shape[2]
    count = max(1, height * width // _PIXELS_PER_STAR)
    centres = [(rng.uniform(0, height), rng.uniform(0, width)) for _ in range(count)]
    sky = image[:, :height]
    stars = _spots(sky, centres, [rng.uniform(1.0, 2.0) for _ in range(count)]).amax(0)
    dusk = torch.linspace(0, 1, height)[:, None]
    night = torch.lerp(_column((0.04, 0.05, 0.16), image), _column((0.12, 0.14, 0.34), image), dusk)
    return torch.cat([torch.lerp(night, torch.ones(()), stars), image[:, height:]], dim=1)


def _random_tiles(image: Tensor, rng: random.Random) -> Tensor:
    rows, columns = -(-image.shape[1] // _TILE), -(-image.shape[2] // _TILE)
    colours = torch.tensor([rng.choice(_PALETTE) for _ in range(rows * columns)]).T.view(3, rows, columns)
    tiles = colours.repeat_interleave(_TILE, 1).repeat_interleave(_TILE, 2)
    return torch.lerp(image, tiles[:, : image.shape[1], : image.shape[2]], 0.5)


def _exactly(exact: Exact) -> Drawn:
    return lambda image, _: exact(image)


EDITS: tuple[Edit, ...] = (
    Edit("black and white", "colour", _exactly(grey)),
    Edit("sepia", "colour", _exactly(_sepia)),
    Edit("invert", "colour", _exactly(lambda image: 1 - image)),
    Edit("darker", "colour", _exactly(lambda image: image * 0.5)),
    Edit("brighter", "colour", _exactly(lambda image: image * 0.5 + 0.5)),
    Edit("more contrast", "colour", _exactly(_contrast)),
    Edit("less saturated", "colour", _exactly(_desaturate)),
    Edit("warmer", "colour", _exactly(_tint(1.3, 1.0, 0.6))),
    Edit("cooler", "colour", _exactly(_tint(0.6, 1.0, 1.3))),
    Edit("swap red and blue", "colour", _exactly(lambda image: image.flip(0))),
    Edit("blur", "colour", _exactly(blurred)),
    Edit("posterize", "colour", _exactly(_posterize)),
    Edit("flip horizontally", "flip", _exactly(lambda image: image.flip(2))),
    Edit("turn upside down", "flip", _exactly(lambda image: image.flip(1))),
    Edit("red circle", "local", _exactly(_paint("red circle", _RED))),
    Edit("white border", "local", _exactly(_paint("white border", (1.0, 1.0, 1.0)))),
    Edit("left half blue", "local", _exactly(_paint("left half blue", _BLUE))),
    Edit("confetti", "random", _confetti),
    Edit("starry sky over the upper half", "random", _starry_sky),
    Edit("mosaic of random tiles", "random", _random_tiles),
)
NAMES = tuple(edit.name for edit in EDITS)
IDENTITY = len(EDITS)  # the class index of "no known instruction": the photo comes back unchanged
COLOUR = tuple(index for index, edit in enumerate(EDITS) if edit.kind == "colour")


def apply(image: Tensor, classes: Sequence[int], rng: random.Random) -> Tensor:
    """The edit of `image` [3, H, W], 0..1, by class indices in order; `IDENTITY` changes nothing.

    Only edits of the kind "random" draw from `rng`.
    """
    for index in classes:
        if index != IDENTITY:
            image = EDITS[index].draw(image, rng)
    return image
