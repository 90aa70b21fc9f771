"""How alike two pictures are: PSNR and SSIM. Knows pixels; knows no models and no presets."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# The constants of Wang, Bovik, Sheikh & Simoncelli 2004: a Gaussian window of 11 with σ 1.5, K₁ 0.01, K₂ 0.03.
_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Pixels = NDArray[np.float64]


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of one size, in dB; infinite where they are equal."""
    error = float(np.mean((_pixels(one) - _pixels(other)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(one: Image.Image, other: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004) of two RGB pictures of one size, up to 1: mean over pixels and channels.

    Windows that would reach over the edge are left out, so both sides must be at least 11 px.
    """
    x, y = _pixels(one), _pixels(other)
    if min(x.shape[:2]) <= 2 * _RADIUS:
        raise ValueError(
            f"the pictures are {one.width}x{one.height}; SSIM needs sides of at least {2 * _RADIUS + 1} px."
        )
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variance_x, variance_y = _smoothed(x * x) - mean_x**2, _smoothed(y * y) - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float(np.mean(luminance * structure))


def _smoothed(pixels: Pixels) -> Pixels:
    """[H, W, 3] through the window, along one side and then the other: [H − 10, W − 10, 3]."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    for axis in (0, 1):
        length = pixels.shape[axis] - 2 * _RADIUS
        shifted = (np.take(pixels, range(start, start + length), axis) for start in range(2 * _RADIUS + 1))
        pixels = sum(weight * piece for weight, piece in zip(weights / weights.sum(), shifted, strict=True))
    return pixels


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"), dtype=np.float64)
