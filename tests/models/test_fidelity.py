"""PSNR and SSIM, against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kontextd_models.fidelity import psnr, ssim
from PIL import Image
from skimage import data, metrics


@pytest.fixture(scope="module")
def pair() -> tuple[Image.Image, Image.Image]:
    photo = data.astronaut()[:160, 100:300]
    noise = np.random.default_rng(0).normal(0, 12, photo.shape)
    return Image.fromarray(photo), Image.fromarray(np.clip(photo + noise, 0, 255).astype(np.uint8))


def test_psnr_is_that_of_scikit_image(pair: tuple[Image.Image, Image.Image]) -> None:
    expected = metrics.peak_signal_noise_ratio(*map(np.asarray, pair))
    assert psnr(*pair) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_that_of_scikit_image_with_the_window_of_the_paper(pair: tuple[Image.Image, Image.Image]) -> None:
    expected = metrics.structural_similarity(
        *map(np.asarray, pair), channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(*pair) == pytest.approx(expected, abs=1e-9)


def test_equal_pictures_are_perfectly_alike(pair: tuple[Image.Image, Image.Image]) -> None:
    assert psnr(pair[0], pair[0]) == math.inf
    assert ssim(pair[0], pair[0]) == pytest.approx(1)


def test_a_picture_smaller_than_the_window_is_refused_with_its_size() -> None:
    small = Image.new("RGB", (64, 10))
    with pytest.raises(ValueError, match="64x10"):
        ssim(small, small)
