"""Pictures inside a page, and what differs between two. Knows pixels and HTML; knows no figures."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image, ImageChops

LONGEST_SIDE = 768  # px, of a picture in a page
AMPLIFIED = 10  # times, in a map of differences
_QUALITY = 88


def inlined(picture: Image.Image) -> str:
    """A `data:` URI that holds the picture as a JPEG, scaled down where it is larger than a page shows."""
    shown = picture.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Absolute differences of two RGB pictures of one size, channel by channel, `AMPLIFIED` times: black is equal."""
    levels = [min(255, level * AMPLIFIED) for level in range(256)]
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).point(levels * 3)


def figure(uri: str, name: str, note: str, kind: str = "") -> str:
    """A picture with its caption; `kind` names the preset, whose colour it has."""
    return (
        f'<figure class="{escape(kind)}"><img src="{uri}" alt="{escape(name)}">'
        f"<figcaption><b>{escape(name)}</b> {escape(note)}</figcaption></figure>\n"
    )
