"""Where the command line writes pictures: names, refusals and safe writing. Knows no engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


class UsageError(Exception):
    """A mistake on the command line; the message names the value and the remedy."""


def targets(source: Path, out: Path | None, count: int) -> list[Path]:
    """One path a picture: OUT itself, or OUT-0.png, OUT-1.png, … Without OUT, NAME.edited.png beside the input.

    A file that is there already is replaced, but never the input. Raises `UsageError`.
    """
    base = out or source.with_name(f"{source.stem}.edited.png")
    if base.suffix.lower() not in _FORMATS:
        raise UsageError(f"{base} ends in {base.suffix or 'nothing'!r}; name it .png, .jpg or .jpeg.")
    if not base.parent.is_dir():
        raise UsageError(f"the folder {base.parent} does not exist; make it first.")
    if not os.access(base.parent, os.W_OK):
        raise UsageError(f"the folder {base.parent} cannot be written; choose another with -o.")
    paths = [base] if count == 1 else [base.with_name(f"{base.stem}-{index}{base.suffix}") for index in range(count)]
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file.")
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(f"{path} is the input itself; choose another name with -o.")
    return paths


def save(image: Image.Image, path: Path) -> None:
    """Write PNG or JPEG by the name's ending, whole or not at all: a reader never meets half a picture."""
    from kontextd_server.pictures import PictureFormat, encode  # numpy and Pillow: not needed to parse a command

    picture = encode(image, PictureFormat(_FORMATS[path.suffix.lower()]))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(picture.data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
