"""How well the embedded demonstration model follows its instructions: a table, one row an instruction.

    python benchmarks/embedded.py [FOLDER ...] [--steps 30] [--out FILE]

Measured on ten photos of scikit-image and scikit-learn, and on those in the folders: none was trained on. Writes
JSON into benchmarks/results/, prints the table and what misses its gate, and fails where something does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from kontextd_models import EngineConfig, load_engine
from kontextd_models.embedded.evaluate import GATES, evaluate, table
from PIL import Image
from result_file import RESULTS, write
from skimage import data
from sklearn.datasets import load_sample_images

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
# Colour photos only: a grey one is its own black and white version.
OF_SCIKIT_IMAGE = (
    "astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina",
)  # fmt: skip


def main() -> int:
    options = parse()
    named = dict(photos(options.folders))
    engine = load_engine(EngineConfig(model=options.model, device="cpu"))
    rows = []
    for row in evaluate(engine, list(named.values()), options.steps):
        rows.append(row)
        print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    report = {
        "steps": options.steps,
        "photos": list(named),
        "gates_db": {kind: asdict(gate) for kind, gate in GATES.items()},
        "rows": [asdict(row) for row in rows],
    }
    write(options.out, report)
    print(f"{table(rows)}\nmeans over {len(named)} photos, {options.steps} steps; written: {options.out}")
    misses = [miss for row in rows for miss in row.misses()]
    print("\n".join(misses), file=sys.stderr)
    return 1 if misses else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="more photos")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", type=Path, help="default: the one in the package")
    parser.add_argument("--out", type=Path, default=RESULTS / "embedded.json")
    return parser.parse_args()


def photos(folders: list[Path]) -> Iterator[tuple[str, Image.Image]]:
    """Name and photo."""
    for name in OF_SCIKIT_IMAGE:
        yield name, Image.fromarray(getattr(data, name)())
    yield "motorcycle", Image.fromarray(data.stereo_motorcycle()[0])
    yield from zip(("china", "flower"), map(Image.fromarray, load_sample_images().images), strict=True)
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.suffix.lower() in ENDINGS):
        yield path.stem, Image.open(path)


if __name__ == "__main__":
    sys.exit(main())
