"""What the embedded model's presets cost in fidelity and gain in time, and what each mechanism does by itself: tables.

    python benchmarks/presets.py [FOLDER ...] [--photos N] [--quick] [--only PART ...] [--keep DIR] [--out FILE]

fidelity: photos of scikit-image and scikit-learn, and those in the folders, none of which was trained on, by every
instruction, 30 steps at 256×256 and 384×256. loras: the same with two LoRAs merged. mechanisms: the same by each
that leaves something out, alone. settings, ready_made: four photos by six instructions. speed: 512×512. --quick does
these six and four, fidelity and speed only, one round of times. Writes JSON into benchmarks/results/, prints tables and
what misses its gate, and fails where something does. An interrupted run goes on from the folder that --keep names. What
--only leaves out stays in the file as it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acceleration import report, speed
from acceleration.cases import FEW_INSTRUCTIONS, FEW_PHOTOS, LORAS, STEPS, Case, cases
from acceleration.features import experiments
from acceleration.measuring import Bench, Compared
from acceleration.ready_made import NOT_INSTALLED, cache_dit_version, ready_made
from acceleration.ways import Own, Way, mechanisms, presets, settings
from embedded import photos
from engine import machine
from kontextd_models import EngineConfig, load_engine
from kontextd_models.acceleration.table import row_as_json
from kontextd_models.embedded import edits
from kontextd_models.engine import Engine
from PIL import Image
from result_file import RESULTS, write

Part = dict[str, Any]  # Any: what goes into the JSON file; "misses" is there in all
SIDE, ROUNDS = 512, 5


@dataclass(frozen=True)
class Asked:
    """What a run is about."""

    photos: Mapping[str, Image.Image]
    instructions: Sequence[str]
    is_quick: bool
    rounds: int
    keep: Path

    def cases(self) -> list[Case]:
        return self.few(self.instructions) if self.is_quick else list(cases(self.photos, self.instructions))

    def few(self, instructions: Sequence[str]) -> list[Case]:
        """Of a few photos, seeded as among all of them."""
        return [case for case in cases(self.photos, instructions) if case.photo in FEW_PHOTOS]


def main() -> int:
    options = parse()
    named = dict(list(photos(options.folders))[: options.photos])
    engine = load_engine(EngineConfig(device="cpu"))
    with kept(options.keep) as folder:
        instructions = FEW_INSTRUCTIONS if options.quick else edits.NAMES
        asked = Asked(named, instructions, options.quick, 1 if options.quick else ROUNDS, folder)
        parts = options.only or (("fidelity", "speed") if options.quick else tuple(PARTS))
        found = {part: PARTS[part](engine, asked) for part in parts}
    whole = {
        "machine": machine(),
        "cache-dit": cache_dit_version(),
        "steps": STEPS,
        "photos": sorted({case.photo for case in asked.cases()}),
        "rows": {way.name: row_as_json(way.preset) for way in presets(engine)},
        "gates": {**{name: asdict(gate) for name, gate in report.GATES.items()}, **report.OTHER_GATES},
        "parts": {**before(options.out), **found},
    }
    write(options.out, whole)
    misses = [miss for part in found.values() for miss in part["misses"]]
    print(f"written: {options.out}")
    print("\n".join(misses), file=sys.stderr)
    return 1 if misses else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="more photos")
    parser.add_argument("--photos", type=int, metavar="N", help="the first N only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=(), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "presets.json")
    return parser.parse_args()


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def before(file: Path) -> Mapping[str, object]:
    """The parts of an earlier run."""
    return json.loads(file.read_text(encoding="utf-8"))["parts"] if file.exists() else {}


def fidelity(engine: Engine, asked: Asked) -> Part:
    return by_instruction(Bench(engine, asked.keep), presets(engine), asked.cases())


def with_two_loras(engine: Engine, asked: Asked) -> Part:
    over = [replace(case, loras=LORAS) for case in asked.cases()]
    return {"loras": LORAS, **by_instruction(Bench(engine, asked.keep), presets(engine), over)}


def each_mechanism(engine: Engine, asked: Asked) -> Part:
    return by_way(Bench(engine, asked.keep), [*mechanisms()], asked.cases())


def many_settings(engine: Engine, asked: Asked) -> Part:
    of: list[Way] = [*presets(engine), *settings(), *experiments()]
    return by_way(Bench(engine, asked.keep), of, asked.few(FEW_INSTRUCTIONS))


def each_ready_made(_: Engine, asked: Asked) -> Part:
    """On an engine of their own: cache-dit leaves its model patched."""
    if cache_dit_version() == NOT_INSTALLED:
        print("cache-dit is not installed: its rows are left out. They take `pip install --no-deps cache-dit==1.5.3`.")
    engine = load_engine(EngineConfig(device="cpu"))
    return by_way(Bench(engine, asked.keep), [*ready_made()], asked.few(FEW_INSTRUCTIONS))


def times(engine: Engine, asked: Asked) -> Part:
    figures = speed.measure(engine, SIDE, asked.rounds)
    for name, of in figures.items():
        print(f"{name}: {'  '.join(f'{key} {value:.2f}' for key, value in of.items())}")
    misses = report.speed_misses(figures)
    return {"date": now(), "size": [SIDE, SIDE], "rounds": asked.rounds, **figures, "misses": misses}


PARTS: Mapping[str, Callable[[Engine, Asked], Part]] = {
    "fidelity": fidelity,
    "loras": with_two_loras,
    "mechanisms": each_mechanism,
    "settings": many_settings,
    "ready_made": each_ready_made,
    "speed": times,
}


def by_instruction(bench: Bench, of: Sequence[Own], over: Sequence[Case]) -> Part:
    rows = [row for way in of for row in report.rows(way.name, noted(way, bench.compare(way, over)))]
    print(report.table(rows))
    misses = [miss for row in rows for miss in row.misses()]
    return {"date": now(), "rows": [asdict(row) for row in rows], "misses": misses}


def by_way(bench: Bench, of: Sequence[Way], over: Sequence[Case]) -> Part:
    rows = [report.summary(way.group, way.name, list(noted(way, bench.compare(way, over)))) for way in of]
    print(report.ways_table(rows))
    return {"date": now(), "rows": [asdict(row) for row in rows], "misses": []}


def noted(way: Way, compared: Iterable[Compared]) -> Iterator[Compared]:
    """Say how far it is, once an instruction."""
    last = ""
    for one in compared:
        if one.case.instruction != last:
            last = one.case.instruction
            print(f"{now()} {way.group}: {way.name}, {last}", file=sys.stderr, flush=True)
        yield one


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
