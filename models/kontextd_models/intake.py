"""Image intake: bytes or a file to an upright sRGB picture. Knows formats and limits; knows no model and no network.

An image of 14142×14142 passes. Its sides are checked before anything is decoded, and what is kept of it is at most the
working area (8 MP unless told otherwise: 32 MiB). Peak of the process above an idle one at that size, measured with
Pillow 13.0 (the last row at 8192×8192), the file itself not counted; no form takes more than the last row. A smaller
picture takes at most its bytes a pixel and 225 MiB: those, a JPEG that just cannot be decoded at half its size.

| file | decoded | bytes a pixel | peak |
|---|---|---|---|
| JPEG, baseline | at 1/4 (draft mode: 1/2, 1/4 or 1/8) | 0.6 | 120 MiB, grey 53 |
| JPEG, progressive | at 1/4, but libjpeg holds every coefficient | 3.3; 4:4:4 6.3; CMYK 8.3 | 0.6; 1.2; 1.5 GiB |
| PNG in grey of 1 to 8 bits | whole, 1 byte a pixel | 1.2 | 230 MiB |
| PNG with a palette, GIF | whole, 1 byte a pixel, to colour in bands | 1.6; see-through 1.9 | 310; 360 MiB |
| PNG 16-bit grey | whole, 2 bytes a pixel | 2.5 | 470 MiB |
| PNG, BMP, TIFF in colour, grey with alpha, floats | whole, 4 bytes a pixel; reduced in bands | 4.9 | 0.9 GiB |
| TIFF in one deflated strip | the strip besides | 7.0; 16-bit RGBA 12.0 | 1.3; 2.2 GiB |
| the same, to be turned | Pillow's turned copy besides | 11.0; 16-bit RGBA 16.0 | 2.1; 3.0 GiB |
| AVIF, 8 bits | planes, bytes, pixels | 9.2; 4:4:4 10.8; alpha 11.5 | 1.7; 2.0; 2.1 GiB |
| WebP | four canvases of 4 bytes a pixel (libwebp's animation decoder) | 16.0 | 3.0 GiB |
| AVIF, 10 or 12 bits, 4:4:4 | planes of 2 bytes | 14.3; alpha 17.4 | 2.7; 3.3 GiB |

Whoever opens several at once multiplies that: the server bounds how many.
"""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from kontextd_models.colour import brightest_value, plain, to_srgb
from kontextd_models.errors import ImageLoadError, ImageTooLarge, ImageTooSmall, InputError, UnsupportedImageFormat
from kontextd_models.image_formats import HEAD_BYTES, identify
from kontextd_models.limits import ModelLimits

log = logging.getLogger(__name__)

# The classes, not `Image.open`: it warns of "bombs" from half of Pillow's limit on, where only our limit should speak.
_READERS: dict[str, Callable[[IO[bytes]], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "AVIF": AvifImageFile,
}
# EXIF 2.32, tag 0x0112: how the stored picture has to be turned to stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = {5, 6, 7, 8}
_BAND_PIXELS = 2**22  # large images are converted in bands of about so many pixels
_TILE_MARGIN = 16  # a TIFF tile is a multiple of 16, so that it may be a little over the image

_pillow_guard = threading.Lock()


@dataclass(frozen=True)
class IntakeLimits:
    """`max_side` in pixels; `working_area` in pixels is what a picture is reduced to, 4 × Kontext's ceiling."""

    max_side: int = 14142
    working_area: int = 8 * 1024 * 1024

    @classmethod
    def for_model(cls, limits: ModelLimits) -> IntakeLimits:
        """Four pixels for each one the model can take, so that the last scaling still has detail to choose from."""
        return cls(working_area=4 * limits.max_area)


@dataclass(frozen=True)
class Intake:
    """An upright sRGB picture, and the size it had (upright) before it was reduced to the working area."""

    image: Image.Image
    width: int
    height: int


_DEFAULT = IntakeLimits()


def open_image(source: bytes | Path, limits: IntakeLimits = _DEFAULT) -> Intake:
    """Read the first picture of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF; its content decides which it is.

    Raises `ImageLoadError` (no image, broken, unreadable), `UnsupportedImageFormat` and `ImageTooLarge`.
    """
    with _stream(source) as file:
        name = identify(file.read(HEAD_BYTES))
        file.seek(0)
        _raise_pillow_guard(limits.max_side)
        with _decoding(name):
            image = _READERS[name](file)
            if isinstance(image, TiffImageFile):
                _check_tiff(image, limits)
            size = image.size
            _check_sides(size, limits)
            box = _draft(image, limits)
            image.load()
        return _finish(image, size, box, limits)


def prepare(image: Image.Image | Intake, limits: IntakeLimits = _DEFAULT) -> Intake:
    """What the engine edits, from what a caller holds: an `Intake` as it is, or a PIL image of any mode."""
    if isinstance(image, Intake):
        return image
    _check_sides(image.size, limits)
    with _decoding(image.format or "image"):
        image.load()  # a caller's image may still be a file
    return _finish(image, image.size, (0.0, 0.0, *image.size), limits)


def normalise(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as upright sRGB RGB, at its full size; itself where it is that already."""
    return prepare(image, IntakeLimits(working_area=image.width * image.height)).image


@contextmanager
def _stream(source: bytes | Path) -> Iterator[IO[bytes]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        file = source.open("rb")
    except OSError as error:
        raise ImageLoadError(f"{source} cannot be read: {error.strerror}. Check the path.") from error
    with file:
        yield file


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise on broken or hostile bytes into our errors."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the {name} is too large: {error} Resize it first.") from error
    except Exception as error:  # from struct.error to RuntimeError: decoders promise no set of classes
        raise ImageLoadError(
            f"the {name} is broken or truncated, or of a kind that is not read: {error}. "
            "Send it again, whole, or save it as an ordinary JPEG or PNG."
        ) from error


def _raise_pillow_guard(max_side: int) -> None:
    """Make Pillow's decompression guard no tighter than ours.

    It is one number for the whole process, by default 89 MP with an error from 179 MP, and its WebP and TIFF readers
    consult it by themselves. It is raised once, under a lock, and never lowered, so that no thread can see it change
    back under its hands. Our own check comes before each decode, and so is what counts here.
    """
    with _pillow_guard:
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_side * max_side)


def _check_sides(size: tuple[int, int], limits: IntakeLimits) -> None:
    if max(size) > limits.max_side:
        raise ImageTooLarge(
            f"image is {size[0]}x{size[1]}; the largest side allowed is {limits.max_side} px. Resize it first."
        )
    if min(size) < 1:
        raise ImageTooSmall(f"image is {size[0]}x{size[1]}; it has no pixels. Use another picture.")


def _check_tiff(image: TiffImageFile, limits: IntakeLimits) -> None:
    """Refuse camera raw files, whose first picture is a thumbnail, and tiles that would take more than the image."""
    if int(image.tag_v2.get(ExifTags.Base.NewSubfileType, 0)) & 1:
        raise UnsupportedImageFormat(
            "the first picture in the TIFF is only a preview, as in camera raw files. Develop it to JPEG or PNG first."
        )
    for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength):
        if int(image.tag_v2.get(tag, 0)) > limits.max_side + _TILE_MARGIN:
            raise ImageTooLarge(f"the TIFF has tiles of {image.tag_v2[tag]} px a side; save it in strips.")


def _draft(image: ImageFile.ImageFile, limits: IntakeLimits) -> tuple[float, float, float, float]:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 where that is enough. Returns the box that the picture then fills."""
    width, height = image.size
    drafted = image.draft(None, _working_size(image.size, limits)) if isinstance(image, JpegImageFile) else None
    return drafted[1] if drafted else (0.0, 0.0, float(width), float(height))


def _finish(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float], limits: IntakeLimits
) -> Intake:
    """From decoded pixels to the result: reduce, then convert the colours of what is left, then turn upright."""
    orientation = _orientation(image)
    small = _reduce(image, box, _working_size(size, limits))
    upright = to_srgb(small, image.info.get("icc_profile"))
    if orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[orientation])
    width, height = reversed(size) if orientation in _SIDES_SWAPPED else size
    return Intake(_without_metadata(upright, image), width, height)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 for a TIFF, which Pillow turns upright while loading."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # the EXIF parser promises no set of classes either
        log.warning("the image's EXIF data is ignored, it may lie on its side: %s", error)
        return 1
    return value if isinstance(value, int) else 1


def _working_size(size: tuple[int, int], limits: IntakeLimits) -> tuple[int, int]:
    width, height = size
    scale = math.sqrt(limits.working_area / (width * height))
    return size if scale >= 1 else (max(1, int(width * scale)), max(1, int(height * scale)))


def _reduce(image: Image.Image, box: tuple[float, float, float, float], target: tuple[int, int]) -> Image.Image:
    """Scale the part `box` to `target`, in the image's own colour space; a whole factor first, band by band."""
    factor = max(1, min(int(box[2] / target[0]), int(box[3] / target[1])))
    small = plain(image) if factor == 1 else _reduce_in_bands(image, factor)
    if small.size == target:
        return small
    right, lower = (min(side / factor, limit) for side, limit in zip(box[2:], small.size, strict=True))
    return small.resize(target, Image.Resampling.LANCZOS, (0.0, 0.0, right, lower))


def _reduce_in_bands(image: Image.Image, factor: int) -> Image.Image:
    """`plain(image)`, each square of `factor` pixels averaged, with no second copy of the image."""
    brightest = brightest_value(image)
    rows = factor * max(1, _BAND_PIXELS // (image.width * factor))
    reduced: Image.Image | None = None
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows)))
        part = plain(band, brightest).reduce(factor)
        if reduced is None:
            reduced = Image.new(part.mode, (part.width, -(-image.height // factor)))
        reduced.paste(part, (0, top // factor))
    assert reduced is not None  # _check_sides: there is at least one row
    return reduced


def _without_metadata(image: Image.Image, source: Image.Image) -> Image.Image:
    """Profile and orientation are used up: left in place, the next reader would apply them again."""
    if image is source:
        if not image.info.keys() & {"icc_profile", "exif", "xmp", "XML:com.adobe.xmp"} and type(image) is Image.Image:
            return image
        image = image.copy()
    image.info = {}
    return image
