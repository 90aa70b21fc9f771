"""Makes the pictures of the README with the software itself: docs/images/before_after.jpg and loras.jpg.

.venv/bin/python scripts/pictures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kontextd_models import Done, EditRequest, EngineConfig, LoraWeight, load_engine
from kontextd_models.embedded import lora_file
from kontextd_models.embedded.styles import STYLES
from kontextd_models.engine import Engine
from kontextd_models.pictures import picture_at
from PIL import Image

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
GAP = 8
SCALES = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    engine = load_engine(EngineConfig(device="cpu"))
    wide, square = picture_at("chelsea", (448, 304)), picture_at("chelsea", (256, 256))
    edited = [edit(engine, wide, prompt) for prompt in ("make it black and white", "invert the colours")]
    sheet([[wide, *edited]]).save(IMAGES / "before_after.jpg", quality=88)
    rows = [[styled(engine, square, {style: scale}) for scale in SCALES] for style in STYLES]
    rows.append([styled(engine, square, pair) for pair in pairs()])
    sheet(rows).save(IMAGES / "loras.jpg", quality=88)


def pairs() -> list[dict[str, float]]:
    """Some of two LoRAs at once."""
    return [
        {"duotone": 1.0, "vignette": 1.0},
        {"pixelate": 1.0, "duotone": 1.0},
        {"pixelate": 1.0, "vignette": 1.0},
        {"pixelate": 0.5, "vignette": 0.5},
    ]


def styled(engine: Engine, picture: Image.Image, scales: dict[str, float]) -> Image.Image:
    loras = tuple(LoraWeight(lora_file(style), scale) for style, scale in scales.items())
    return edit(engine, picture, str(engine.model.card.identity_prompt), loras)


def edit(engine: Engine, picture: Image.Image, prompt: str, loras: tuple[LoraWeight, ...] = ()) -> Image.Image:
    *_, done = engine.edit(EditRequest(picture, prompt, seed=7, loras=loras))
    assert isinstance(done, Done)
    return done.images[0]


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """All pictures, which are of one size, with white between them."""
    width, height = rows[0][0].size
    canvas = Image.new("RGB", (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            canvas.paste(picture, (across * (width + GAP), down * (height + GAP)))
    return canvas


if __name__ == "__main__":
    main()
