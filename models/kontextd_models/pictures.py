"""The pictures that proofs are made with, at any size. Knows files and pixels; knows no model and judges nothing.

| name | by | licence |
|---|---|---|
| chelsea | Stéfan van der Walt | CC0 |
| coffee | Rachel Michetti | CC0 |
| rocket | SpaceX | public domain |
| shapes | made up here: gradients, noise of all scales, flat shapes | |

The photos come from scikit-image; the demonstration model was trained on none of them.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from kontextd_models.embedded import sample_photo

PICTURES = ("chelsea", "coffee", "rocket", "shapes")
_SAMPLES = Path(__file__).parent / "samples"


def picture_at(name: str, size: tuple[int, int]) -> Image.Image:
    """The middle of the picture of that name, cut to the aspect of `size` (width, height) and scaled to it; RGB."""
    if name == "shapes":
        return _fitted(_shapes(), size)
    with Image.open(sample_photo() if name == "chelsea" else _SAMPLES / f"{name}.jpg") as photo:
        return _fitted(photo.convert("RGB"), size)


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    width = min(picture.width, round(picture.height * size[0] / size[1]))
    height = min(picture.height, round(width * size[1] / size[0]))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)


def _shapes() -> Image.Image:
    from kontextd_models.preview import training_pictures  # torch: not for whoever wants a photo only

    pixels = training_pictures()[0].add(1).mul(127.5).round().byte()  # [3, H, W]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
