"""What the demonstration LoRAs make of a picture: for each one the exact style, as arithmetic on pixels.

The training targets and the yardstick of the evaluation. Images are float tensors [3, H, W] in 0..1. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kontextd_models.embedded.edits import blurred, grey

Style = Callable[[Tensor], Tensor]

_NIGHT, _SAND = (0.10, 0.08, 0.36), (1.0, 0.86, 0.58)
_EDGE_LIGHT = 0.15  # of the light in the middle
_CELL = 16  # pixels
_FINE_SIGMA, _COARSE_SIGMA, _INK = 1.5, 4.0, 6.0


def duotone(image: Tensor) -> Tensor:
    """From a night blue to a sand yellow, by luma."""
    dark, light = (image.new_tensor(colour).view(3, 1, 1) for colour in (_NIGHT, _SAND))
    return torch.lerp(dark, light, grey(image))


def vignette(image: Tensor) -> Tensor:
    """Darker from three tenths of the half diagonal on, down to the corners."""
    y, x = (torch.linspace(-1, 1, side, dtype=image.dtype, device=image.device) for side in image.shape[1:])
    radius = ((y[:, None] ** 2 + x[None, :] ** 2) / 2).sqrt()  # 1 in the corners
    rise = ((radius - 0.3) / 0.7).clamp(0, 1)
    return image * (1 - (1 - _EDGE_LIGHT) * rise**2 * (3 - 2 * rise))


def pixelate(image: Tensor) -> Tensor:
    """Flat cells of 16 × 16 pixels. Sides are multiples of 16."""
    cells = functional.avg_pool2d(image, _CELL)
    return cells.repeat_interleave(_CELL, 1).repeat_interleave(_CELL, 2)


def line_drawing(image: Tensor) -> Tensor:
    """Ink on white where the picture is darker than its surroundings: a difference of Gaussians."""
    luma = grey(image)
    darker = (blurred(luma, _COARSE_SIGMA) - blurred(luma, _FINE_SIGMA)).clamp(min=0)
    return 1 - (_INK * darker).clamp(0, 1)


STYLES: Mapping[str, Style] = {
    "duotone": duotone,
    "vignette": vignette,
    "pixelate": pixelate,
    "line-drawing": line_drawing,
}
