"""Pixels of every Pillow mode to 8-bit sRGB. Knows modes, profiles and alpha; knows nothing of files and sizes."""

from __future__ import annotations

import io
import logging
import math

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

_PLAIN = frozenset({"L", "LA", "RGB", "RGBA", "CMYK"})
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
_MODE_OF_SPACE = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # ICC.1:2022, table 19
# What Photoshop does by default: white to white, black to black, colours both gamuts hold unchanged.
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


def plain(image: Image.Image, brightest: float | None = None) -> Image.Image:
    """The image as L, LA, RGB, RGBA or CMYK with 8 bits a channel, in its own colour space; itself where it is that.

    `brightest` is what `brightest_value` says of the whole, where `image` is only a part of it.
    """
    if image.mode in _DEEP:
        return _eight_bits(image, brightest_value(image) if brightest is None else brightest)
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    keyed = "transparency" in image.info and image.mode != "CMYK"
    if image.mode in _PLAIN and not keyed:
        return image
    alpha = image.has_transparency_data
    if image.mode in {"1", "L", "LA", "La"}:
        return image.convert("LA" if alpha else "L")
    return image.convert("RGBA" if alpha else "RGB")


def brightest_value(image: Image.Image) -> float:
    """What stands for white in a mode of more than 8 bits; 255 in the others.

    16 bits are known by their mode. In 32-bit files nothing says it: the smallest of 1 (floats only), 255, 65535 that
    no pixel exceeds, else the largest pixel.
    """
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode not in _DEEP:
        return 255.0
    extrema = image.getextrema()
    largest = float(extrema[1])  # type: ignore[arg-type]  # one channel, so two numbers, not a pair for each channel
    if not math.isfinite(largest):
        return 1.0
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((value for value in usual if largest <= value), largest)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A `plain` image as RGB in sRGB, laid over white. A profile that cannot be used is ignored with a warning."""
    alpha = image.getchannel("A") if image.mode in {"LA", "RGBA"} else None
    opaque = image if alpha is None else image.convert(image.mode.removesuffix("A"))
    colours = _to_srgb_opaque(opaque, profile)
    if alpha is None:
        return colours
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(colours, mask=alpha)
    return canvas


def _to_srgb_opaque(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            return _through_profile(image, profile)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            log.warning("the image's colour profile is ignored: %s", error)
    return image if image.mode == "RGB" else image.convert("RGB")


def _through_profile(image: Image.Image, data: bytes) -> Image.Image:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    if space == "RGB" and image.mode == "L":  # a grey picture saved with the RGB profile of its editor: common
        image = image.convert("RGB")
    if _MODE_OF_SPACE.get(space) != image.mode:
        raise ValueError(f"it describes {space} pixels, the image has {image.mode}")
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(profile, srgb, image.mode, "RGB", _INTENT, _FLAGS).apply(image)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", _INTENT).apply(image)


def _eight_bits(image: Image.Image, brightest: float) -> Image.Image:
    values = np.asarray(image)
    scaled = np.nan_to_num(values.astype(np.float32)).clip(0, brightest) * np.float32(255 / brightest)
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    key = image.info.get("transparency")  # the one grey of a 16-bit PNG that is see-through
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey
