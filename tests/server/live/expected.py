"""What every client has to be told, whichever way it came. Knows fal's output; knows no way."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import httpx
from PIL import Image

from .studio import PHOTO_SIDE, Studio

PROMPT, SEED = "make it black and white", 7
STEPS = 8  # a preview whose check is not done by the next step is dropped: of two steps, perhaps both
_STEP = re.compile(r" *\d+%\|.*\| (\d+)/(\d+) \[")


def edit_of(studio: Studio, **fields: object) -> dict[str, object]:
    """An input that is done in about a second."""
    return {"image_url": studio.photo, "prompt": PROMPT, "seed": SEED, "num_inference_steps": STEPS, **fields}


def endless(studio: Studio) -> dict[str, object]:
    """One that takes minutes: to be interrupted."""
    return {"image_url": studio.large, "prompt": PROMPT, "num_inference_steps": 50, "num_images": 4}


def check_output(output: dict[str, Any], files: str) -> None:
    """A whole result whose picture is at an address that begins with `files`."""
    (image,) = output["images"]
    assert (output["seed"], output["prompt"], output["has_nsfw_concepts"]) == (SEED, PROMPT, [False])
    assert image["url"].startswith(files), image["url"]
    assert (image["width"], image["height"], image["content_type"]) == (PHOTO_SIDE, PHOTO_SIDE, "image/png")
    assert output["timings"]["inference"] > 0


def check_stream(events: Sequence[dict[str, Any]], files: str) -> None:
    """Previews in the output's shape, and at last the output."""
    *previews, output = events
    check_output(output, files)
    assert previews
    for preview in previews:
        assert preview["images"][0]["url"].startswith("data:image/jpeg;base64,")


def check_lines(lines: Sequence[str]) -> None:
    """A line a step, in tqdm's form."""
    assert lines
    for line in lines:
        found = _STEP.match(line)
        assert found, line
        assert int(found[2]) == STEPS


def check_picture(picture: bytes) -> None:
    """The edit was made: the picture is all but grey, which the photo is not."""
    with Image.open(io.BytesIO(picture)) as opened:
        red, _, blue = opened.convert("RGB").resize((8, 8)).split()
    differences = [abs(one - other) for one, other in zip(red.tobytes(), blue.tobytes(), strict=True)]
    assert sum(differences) / len(differences) < 30


def picture_of(output: dict[str, Any]) -> bytes:
    url = output["images"][0]["url"]
    if url.startswith("data:"):
        return base64.b64decode(url.partition(",")[2])
    return httpx.get(url, trust_env=False).content
