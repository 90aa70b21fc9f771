"""What the LoRAs that ship do to photos: a table, one row a LoRA and one a pair.

    python benchmarks/loras.py [FOLDER ...] [--steps 30] [--out FILE]

Measured on ten photos of scikit-image and scikit-learn, and on those in the folders: none was trained on. Writes
JSON into benchmarks/results/, prints the table and what falls short, and fails where a LoRA does. Pairs are told of:
not every two styles go together.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from embedded import photos
from kontextd_models import EngineConfig, load_engine
from kontextd_models.embedded.evaluate_styles import EXACT_DB, evaluate_pairs, evaluate_styles
from result_file import RESULTS, write


def main() -> int:
    options = parse()
    named = dict(photos(options.folders))
    engine = load_engine(EngineConfig(device="cpu"))
    pictures = list(named.values())
    print("| LoRA | Without it, dB | Scale 0.5, dB | Scale 1, dB |\n|---|---|---|---|", flush=True)
    rows = []
    for row in evaluate_styles(engine, pictures, options.steps):
        rows.append(row)
        print(f"| {row.style} | {row.plain:.1f} | {row.half:.1f} | {row.full:.1f} |", flush=True)
    print("\n| Two at once | Both, dB | First alone, dB | Second alone, dB |\n|---|---|---|---|", flush=True)
    pairs = []
    for pair in evaluate_pairs(engine, pictures, options.steps):
        pairs.append(pair)
        print(f"| {' + '.join(pair.styles)} | {pair.both:.1f} | {pair.first:.1f} | {pair.second:.1f} |", flush=True)
    report = {
        "steps": options.steps,
        "photos": list(named),
        "gate_db": EXACT_DB,
        "rows": [asdict(row) for row in rows],
        "pairs": [asdict(pair) for pair in pairs],
    }
    write(options.out, report)
    print(f"means over {len(named)} photos, {options.steps} steps; written: {options.out}")
    misses = [miss for row in rows for miss in row.misses()]
    print("\n".join([*misses, *(miss for pair in pairs for miss in pair.misses())]), file=sys.stderr)
    return 1 if misses else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="more photos")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "loras.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
