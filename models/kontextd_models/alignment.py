"""How far one picture lies beside another: sub-pixel phase correlation. Knows arrays; knows no model and no files.

The displacement of b against a shows in the phase of their cross-power spectrum alone:

    R(f) = G(f) F(f)* / |G(f) F(f)*|,   r(x) = DFT⁻¹[R](x) peaks at the displacement

(Kuglin and Hines, "The phase correlation image alignment method", 1975). The peak is found to a fraction of a pixel by
evaluating r on a fine raster about the coarse peak only, as a product of two small DFT matrices (Guizar-Sicairos,
Thurman and Fienup, "Efficient subpixel image registration algorithms", Optics Letters 33, 156, 2008).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as in Pillow's mode L
# Frequencies above about a quarter cycle a pixel carry what an autoencoder changes, and little of where things lie.
_LOW_PASS = 0.12  # cycles a pixel, standard deviation of a Gaussian
_RASTER = 0.02  # pixels between the points of the fine raster
_REFINEMENTS = 3
_LEAST_DEVIATION = 1e-3  # of full scale; below it there is nothing to correlate


def displacement(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[float, float]:
    """By how many pixels (to the right, down) the content of `b` lies from where it lies in `a`.

    Both are [H, W] or [H, W, 3] of one size, on any scale. Raises `ValueError` for unlike sizes, and for a picture
    without detail, where every displacement fits: a black picture is not aligned with anything.
    """
    first, second = _grey(a), _grey(b)
    if first.shape != second.shape:
        raise ValueError(f"the pictures are {first.shape} and {second.shape}; bring them to one size first.")
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    reference = np.fft.fft2(first * window)
    right, down = 0.0, 0.0
    # The window stays where it is while the content moves, which draws the estimate towards zero; shifting b back by
    # what is known so far and measuring the rest takes that away.
    for _ in range(_REFINEMENTS):
        step = _peak(reference, np.fft.fft2(shifted(second, -right, -down) * window))
        right, down = right + step[0], down + step[1]
    return right, down


def shifted(picture: Floats, right: float, down: float) -> Floats:
    """[H, W] moved by any fraction of a pixel, in the Fourier domain; what leaves on one side comes in on the other."""
    spectrum = np.fft.fft2(picture)
    rows, columns = np.fft.fftfreq(picture.shape[0]), np.fft.fftfreq(picture.shape[1])
    phase = np.exp(-2j * np.pi * (rows[:, None] * down + columns[None, :] * right))
    return np.asarray(np.fft.ifft2(spectrum * phase).real)


def _grey(picture: npt.ArrayLike) -> Floats:
    values = np.asarray(picture, dtype=np.float64)
    if values.ndim == 3:
        values = values[..., :3] @ np.array(_LUMA)
    deviation = float(values.std())
    scale = 255.0 if values.max(initial=0.0) > 1 else 1.0
    if not deviation > _LEAST_DEVIATION * scale:  # NaN fails too
        raise ValueError(f"a picture has no detail (deviation {deviation:.2g}); use a photo.")
    return np.asarray((values - values.mean()) / deviation)


def _peak(reference: npt.NDArray[np.complex128], moved: npt.NDArray[np.complex128]) -> tuple[float, float]:
    """(right, down) of the peak of r, from the spectra of both pictures."""
    height, width = reference.shape
    cross = moved * reference.conj()
    rows, columns = np.fft.fftfreq(height), np.fft.fftfreq(width)
    low = np.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * _LOW_PASS**2))
    cross *= low / np.maximum(np.abs(cross), np.finfo(np.float64).tiny)
    coarse = np.unravel_index(np.argmax(np.fft.ifft2(cross).real), cross.shape)
    down, right = (int(_signed(int(place), side)) for place, side in zip(coarse, cross.shape, strict=True))
    around = np.arange(-1.0, 1.0 + _RASTER / 2, _RASTER)
    from_rows = np.exp(2j * np.pi * np.outer(down + around, rows))  # [P, H]
    from_columns = np.exp(2j * np.pi * np.outer(columns, right + around))  # [W, P]
    fine = (from_rows @ cross @ from_columns).real
    best = np.unravel_index(np.argmax(fine), fine.shape)
    return right + float(around[best[1]]), down + float(around[best[0]])


def _signed(place: int, side: int) -> int:
    """A place in a circular array as a displacement: the second half of it lies to the left, or above."""
    return place - side if place > side // 2 else place
