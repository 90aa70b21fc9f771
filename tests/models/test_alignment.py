"""Phase correlation against shifts that are known to a fraction of a pixel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from kontextd_models.alignment import displacement, shifted
from skimage import data

TOLERANCE_PX = 0.05
SHIFTS = ((0.0, 0.0), (0.3, -0.7), (-0.5, 0.25), (1.5, 2.25), (-7.1, 4.6), (16.0, -16.0), (0.0, 0.12))


def photo(name: str, width: int = 256, height: int = 192) -> npt.NDArray[np.float64]:
    """The middle of a photo in grey, 0..255."""
    picture = getattr(data, name)().astype(float)
    picture = picture.mean(axis=2) if picture.ndim == 3 else picture
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def moved(name: str, right: float, down: float, width: int, height: int) -> npt.NDArray[np.float64]:
    """The same cut from the photo after it moved: what comes in at the edges is the photo's own, as in a real shift."""
    margin = 32
    whole = photo(name, width + 2 * margin, height + 2 * margin)
    return shifted(whole, right, down)[margin:-margin, margin:-margin]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_a_known_shift_is_measured_within_a_twentieth_of_a_pixel(name: str, shift: tuple[float, float]) -> None:
    found = displacement(photo(name, 224, 160), moved(name, *shift, 224, 160))
    assert np.abs(np.subtract(found, shift)).max() < TOLERANCE_PX


@pytest.mark.parametrize("size", [(128, 200), (200, 128), (97, 131)])
def test_any_aspect_and_odd_sides_will_do(size: tuple[int, int]) -> None:
    found = displacement(photo("chelsea", *size), moved("chelsea", 0.4, -1.3, *size))
    assert np.abs(np.subtract(found, (0.4, -1.3))).max() < TOLERANCE_PX


def test_noise_and_another_brightness_do_not_move_a_picture() -> None:
    before = photo("astronaut")
    after = shifted(before, 0.6, -0.4) * 0.5 + 40 + np.random.default_rng(0).normal(0, 8, before.shape)
    found = displacement(before, after)
    assert np.abs(np.subtract(found, (0.6, -0.4))).max() < TOLERANCE_PX


def test_colour_pictures_are_measured_by_their_luma() -> None:
    before = data.astronaut()[100:300, 100:356].astype(float)
    after = np.stack([shifted(before[..., channel], -0.8, 0.2) for channel in range(3)], axis=2)
    found = displacement(before, after)
    assert np.abs(np.subtract(found, (-0.8, 0.2))).max() < TOLERANCE_PX


def test_two_unlike_photos_are_not_called_aligned() -> None:
    found = displacement(photo("astronaut"), photo("coffee"))
    assert np.abs(found).max() > 0.5


def test_a_picture_without_detail_is_refused() -> None:
    with pytest.raises(ValueError, match="no detail"):
        displacement(photo("astronaut"), np.zeros((192, 256)))


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        displacement(photo("astronaut"), photo("astronaut", 128, 128))
