"""How the embedded model behaves besides following: alignment, few steps, guidance, references of another size.

    python benchmarks/behaviour.py [--out FILE]

Four photos of scikit-image and scikit-learn that were not trained on. Writes JSON into benchmarks/results/ and prints
one line a figure.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from kontextd_models import Done, EditRequest, EngineConfig, ResolutionMode, load_engine
from kontextd_models.alignment import displacement
from kontextd_models.embedded import edits, wordings
from kontextd_models.embedded.evaluate import as_tensor, edited, fitted, psnr
from kontextd_models.engine import Engine
from kontextd_models.stock import StockEdit, snapped, stock_picture
from PIL import Image
from result_file import RESULTS, write
from skimage import data
from sklearn.datasets import load_sample_images

STEPS, SEED, GUIDANCE = 30, 3, 2.5
SIZES = ((256, 256), (384, 256), (192, 320))
FOLLOWED = ("black and white", "warmer", "turn upside down", "white border")
FEW_STEPS, SCALES = (2, 4, 8, 30), (1.0, 2.5, 5.0)
UNEQUAL = ((384, 216, ResolutionMode.R1_1), (256, 256, ResolutionMode.R16_9))


def main() -> None:
    options = parse()
    engine = load_engine(EngineConfig(model=options.model, device="cpu"))
    report = {
        "steps": STEPS,
        "figures": {
            "alignment_px": list(alignment(engine)),
            "db_by_steps": dict(followed(engine, FEW_STEPS, (GUIDANCE,))),
            "db_by_guidance": dict(followed(engine, (STEPS,), SCALES)),
            "unequal_reference": list(unequal(engine)),
        },
    }
    write(options.out, report)
    print(f"written: {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the one in the package")
    parser.add_argument("--out", type=Path, default=RESULTS / "behaviour.json")
    return parser.parse_args()


def photos() -> Mapping[str, Image.Image]:
    china, flower = load_sample_images().images
    return {
        "astronaut": Image.fromarray(data.astronaut()),
        "chelsea": Image.fromarray(data.chelsea()),
        "china": Image.fromarray(china),
        "flower": Image.fromarray(flower),
    }


def alignment(engine: Engine) -> Iterator[Mapping[str, object]]:
    """Pixels that an edit which changes nothing is displaced by, and what the stock pipeline does by default."""
    for name, photo in photos().items():
        for size in SIZES:
            before, prompt = fitted(photo, size), engine.model.card.identity_prompt
            after = edited(engine, before, prompt, STEPS, SEED, GUIDANCE)
            reference = snapped(before, engine.model.limits.preferred_sizes)  # as diffusers does by default
            stock = StockEdit(reference, prompt, *size, STEPS, GUIDANCE, SEED)
            row = {
                "photo": name,
                "size": list(size),
                "ours_px": worst(before, after),
                "stock_px": worst(before, stock_picture(engine.model, stock)),
            }
            print(row, flush=True)
            yield row


def worst(before: Image.Image, after: Image.Image) -> float:
    """The larger of the two components."""
    return float(np.abs(displacement(np.asarray(before), np.asarray(after))).max())


def followed(engine: Engine, steps: Sequence[int], scales: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Mean PSNR in dB against the exact edit, over the photos and four instructions of different kinds, at 256²."""
    for count in steps:
        for scale in scales:
            values = []
            for photo in photos().values():
                before = fitted(photo, (256, 256))
                for name in FOLLOWED:
                    index = edits.NAMES.index(name)
                    prompt = wordings.WORDINGS[index][0].replace("{o}", "it")
                    after = as_tensor(edited(engine, before, prompt, count, SEED, scale))
                    values.append(psnr(after, edits.apply(as_tensor(before), (index,), random.Random(0))))
            key, value = f"{count} steps, guidance {scale:g}", statistics.fmean(values)
            print(f"{key}: {value:.1f} dB", flush=True)
            yield key, value


def unequal(engine: Engine) -> Iterator[Mapping[str, object]]:
    """An edit that changes nothing, with a reference on a grid of its own: dB where the two grids overlap.

    The transformer numbers the tokens of both grids from the top left, so the overlap is there.
    """
    for width, height, mode in UNEQUAL:
        for name, photo in photos().items():
            before = fitted(photo, (width, height))
            request = EditRequest(
                before, engine.model.card.identity_prompt, STEPS, SEED, GUIDANCE, resolution_mode=mode,
                enable_safety_checker=False,
            )  # fmt: skip
            *_, done = engine.edit(request)
            assert isinstance(done, Done)
            plan = done.size
            reference = before.resize((plan.reference_width, plan.reference_height), Image.Resampling.LANCZOS)
            box = (0, 0, min(plan.width, plan.reference_width), min(plan.height, plan.reference_height))
            overlap = psnr(as_tensor(done.images[0].crop(box)), as_tensor(reference.crop(box)))
            squeezed = psnr(as_tensor(done.images[0]), as_tensor(before.resize((plan.width, plan.height))))
            row = {
                "photo": name,
                "reference": [plan.reference_width, plan.reference_height],
                "output": [plan.width, plan.height],
                "overlap_db": overlap,
                "against_a_squeezed_photo_db": squeezed,
            }
            print(row, flush=True)
            yield row


if __name__ == "__main__":
    main()
