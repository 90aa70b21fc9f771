"""Pictures as PNG and JPEG bytes, fast. Knows pixels and file formats; knows no files on disk, no engine.

Pillow filters each row of a PNG five ways and deflates at level 6: 250 to 350 ms a megapixel, longer than a step of the
model on many a GPU. Here one filter is chosen for the whole picture from a sample of its rows, and libdeflate does the
rest: a seventh of the time, with files 1.4 % larger on average and 12 % at worst (benchmarks/png.py). Other threads run
meanwhile.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import deflate
import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 95
DEFLATE_LEVEL = 3
_SAMPLED = 8  # one row in so many is looked at to choose the filter
# PNG 3rd edition (W3C), 11.2.1: colour types with 8 bits a sample.
_COLOUR_TYPES = {"L": 0, "RGB": 2, "RGBA": 6}
_DEFAULT_PNG_LEVEL = 1  # of Pillow, for the other modes

Bytes = NDArray[np.uint8]
Predictor = Callable[[Bytes, Bytes, int], Bytes]


class PictureFormat(StrEnum):
    """By fal's names for `output_format`."""

    PNG = "png"
    JPEG = "jpeg"


@dataclass(frozen=True)
class EncodedPicture:
    data: bytes
    content_type: str


def encode(image: Image.Image, format: PictureFormat) -> EncodedPicture:
    """A picture as a file's bytes, without metadata. PNG is lossless. Raises `OSError` for a mode that JPEG lacks."""
    if format is PictureFormat.JPEG:
        return EncodedPicture(_saved(image, "JPEG", quality=JPEG_QUALITY, subsampling=0), "image/jpeg")
    return EncodedPicture(encode_png(image), "image/png")


def encode_png(image: Image.Image) -> bytes:
    """PNG of 8-bit grey, RGB or RGBA by our own encoder; Pillow writes the modes that no result has."""
    if image.mode not in _COLOUR_TYPES or not image.width or not image.height:
        return _saved(image, "PNG", compress_level=_DEFAULT_PNG_LEVEL)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, _COLOUR_TYPES[image.mode], 0, 0, 0)
    pixels = deflate.zlib_compress(_filtered(image), DEFLATE_LEVEL)
    chunks = (b"\x89PNG\r\n\x1a\n", *_chunk(b"IHDR", header), *_chunk(b"IDAT", pixels), *_chunk(b"IEND", b""))
    return b"".join(chunks)


def _chunk(kind: bytes, data: bytes | bytearray) -> Iterator[bytes | bytearray]:
    yield struct.pack(">I", len(data)) + kind
    yield data
    yield struct.pack(">I", deflate.crc32(data, deflate.crc32(kind)))


def _filtered(image: Image.Image) -> Bytes:
    """The rows, each after the number of its filter, as differences from what the filter predicts (PNG, clause 9)."""
    pixel_bytes = len(image.getbands())
    rows = np.asarray(image).reshape(image.height, -1)  # [H, W * pixel_bytes]
    number, predict = min(_FILTERS, key=lambda each: _cost(each[1], rows, pixel_bytes))
    above = np.zeros_like(rows)
    above[1:] = rows[:-1]
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = number
    np.subtract(rows, predict(rows, above, pixel_bytes), out=filtered[:, 1:])
    return filtered


def _cost(predict: Predictor, rows: Bytes, pixel_bytes: int) -> int:
    """The sum of absolute differences over a sample of rows: the heuristic that PNG, 12.7, recommends."""
    sample = rows[1::_SAMPLED]
    difference = sample - predict(sample, rows[::_SAMPLED][: len(sample)], pixel_bytes)
    return int(np.minimum(difference, -difference).sum(dtype=np.uint64))


def _left(rows: Bytes, above: Bytes, pixel_bytes: int) -> Bytes:
    left = np.zeros_like(rows)
    left[:, pixel_bytes:] = rows[:, :-pixel_bytes]
    return left


def _above(rows: Bytes, above: Bytes, pixel_bytes: int) -> Bytes:
    return above


def _average(rows: Bytes, above: Bytes, pixel_bytes: int) -> Bytes:
    """⌊(left + above) / 2⌋ without a wider type: what both have, and half of what one has."""
    left = _left(rows, above, pixel_bytes)
    return (left & above) + ((left ^ above) >> 1)


_FILTERS: tuple[tuple[int, Predictor], ...] = ((1, _left), (2, _above), (3, _average))


def _saved(image: Image.Image, format: str, **options: int) -> bytes:
    plain = image.copy()  # Pillow also writes what lies in `info`, such as a profile or a comment of the input
    plain.info = {key: value for key, value in image.info.items() if key == "transparency"}
    buffer = io.BytesIO()
    plain.save(buffer, format, **options)
    return buffer.getvalue()
